"""The map of models small enough to see, against what their own loaders do with the whole version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlpost.core.weights import bits
from rlpost.engines.weight_map import WeightMap, _served
from rlpost.types import WeightImage
from tests.engines.conftest import make_update, stepped


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)


class Model(nn.Module):
    """Everything that loaders do.

    `fused` [5, 32] is left above right. `table` [6, 32] is five published rows and one of zeros. `turned` [32, 3] is the
    transpose of conv. `query` and `key` [2, 32] are the even and the odd rows of pairs. `norm` [32] is norm.
    """

    shapes: Mapping[str, tuple[int, ...]] = {
        "left": (2, 32),
        "right": (3, 32),
        "table": (5, 32),
        "conv": (3, 32),
        "pairs": (4, 32),
        "norm": (32,),
    }

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fused, self.table = nans(5, 32, dtype=dtype), nans(6, 32, dtype=dtype)
        self.turned, self.norm = nans(32, 3, dtype=dtype), nans(32, dtype=dtype)
        self.query, self.key = nans(2, 32, dtype=dtype), nans(2, 32, dtype=dtype)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.load(name, tensor)

    def load(self, name: str, tensor: Tensor) -> None:
        match name:
            case "left":
                self.fused.data[:2].copy_(tensor)
            case "right":
                self.fused.data[2:].copy_(tensor)
            case "table":
                self.table.data[:5].copy_(tensor)
                self.table.data[5:].fill_(0)
            case "conv":
                self.turned.data.copy_(tensor.t())
            case "pairs":
                self.query.data.copy_(tensor[::2])
                self.key.data.copy_(tensor[1::2])
            case "norm":
                self.norm.data.copy_(tensor)


def make_weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape).to(dtype) for name, shape in Model.shapes.items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(parameter).clone() for name, parameter in model.named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loaded(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What the model's own loader makes of the weights."""
    model = Model(dtype)
    model.load_weights(weights.items())
    return state(model)


def holding(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> tuple[Model, WeightMap]:
    """A model that was given the weights as version 1."""
    model, update = Model(dtype), make_update(1, weights)
    weight_map = WeightMap(model, update.tensors)
    weight_map.apply(update)
    return model, weight_map


def nudged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every value becomes the next one: patches of them are differences, right only on the right base."""
    return {name: (bits(tensor) + 1).view(tensor.dtype) for name, tensor in weights.items()}


# -- what is right -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chain_of_patches_leaves_what_the_loader_makes_of_each_version(dtype: torch.dtype, num_ranks: int) -> None:
    """Complete, then sparse, dense, differences, nothing and complete again."""
    weights = make_weights(0, dtype)
    model, weight_map = holding(weights, dtype)
    assert same(state(model), loaded(weights, dtype))
    sparse, dense = stepped(weights, 0.2, 1), make_weights(2, dtype)
    next_to_dense = nudged(dense)
    for version, after in enumerate([sparse, dense, next_to_dense, next_to_dense, make_weights(3, dtype)], 2):
        base = WeightImage(version=version - 1, tensors=weights) if version < 6 else None
        patch, weights = make_update(version, after, base=base, num_ranks=num_ranks), after
        weight_map.apply(patch)
        weight_map.prove(patch)
        assert same(state(model), loaded(weights, dtype)), version


def test_making_the_map_and_proving_write_nothing() -> None:
    model = Model()
    model.load_weights(make_weights().items())
    before = state(model)
    weight_map = WeightMap(model, make_update(1, make_weights()).tensors)
    weight_map.prove(make_update(1, make_weights()))
    with pytest.raises(ValueError, match="left: entries 0 to 64 have checksum"):
        weight_map.prove(make_update(1, make_weights(1)))
    assert same(state(model), before)


def test_values_are_compared_by_their_bits() -> None:
    """-0.0 equals 0.0 but is not the same weight; a NaN differs from itself but is."""
    weights = make_weights()
    weights["left"][0, 0], weights["left"][0, 1] = 0.0, torch.nan
    _, weight_map = holding(weights)
    weight_map.prove(make_update(1, weights))
    negated = dict(weights, left=weights["left"].clone())
    negated["left"][0, 0] = -0.0
    with pytest.raises(ValueError, match="left: "):
        weight_map.prove(make_update(1, negated))


def test_loaders_may_take_several_tensors_before_they_write() -> None:
    class Gathering(Model):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            super().load_weights(sorted(weights, reverse=True))

    model, update = Gathering(), make_update(1, make_weights())
    weight_map = WeightMap(model, update.tensors)
    weight_map.apply(update)
    weight_map.prove(update)
    assert same(state(model), loaded(make_weights()))


# -- what the model lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("fused", "right: entries 0 to 96"),
        ("turned", "conv: entries 0 to 96"),
        ("key", "pairs: entries 0 to 128"),
        ("norm", "norm: entries 0 to 32"),
        ("table", "table: 1 of 32 values of its padding are not 0"),
    ],
)
@pytest.mark.parametrize("change", [lambda w: w, lambda w: stepped(w, 0.3, 1), nudged])
def test_one_lost_bit_is_found_after_any_delta_and_a_complete_update_heals_it(
    parameter: str, named: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """The lowest one of each parameter's last value."""
    weights = make_weights()
    model, weight_map = holding(weights)
    bits(getattr(model, parameter).data).view(-1)[-1] ^= 1
    after = change(weights)
    patch = make_update(2, after, base=WeightImage(version=1, tensors=weights))
    weight_map.apply(patch)
    with pytest.raises((ValueError, RuntimeError), match=named):
        weight_map.prove(patch)
    weight_map.apply(make_update(3, after))
    weight_map.prove(make_update(3, after))
    assert same(state(model), loaded(after))


def test_a_parameter_that_was_moved_after_the_map_was_made_is_named() -> None:
    model, weight_map = holding(make_weights())
    model.norm.data = model.norm.data.clone()
    with pytest.raises(RuntimeError, match="32 of 32 values of the model's norm"):
        weight_map.prove(make_update(1, make_weights()))


# -- patches that do not fit -------------------------------------------------------------------------------------------


def _lose(tensors: dict[str, Tensor]) -> None:
    del tensors["left"]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["extra"] = torch.zeros(3)


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors["left"] = tensors["left"].view(4, 16)


def _widen(tensors: dict[str, Tensor]) -> None:
    tensors["left"] = tensors["left"].double()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_lose, "left is only in the model \\(1 such names in all\\)"),
        (_add, "extra is only in the update \\(1 such names in all\\)"),
        (_reshape, r"left is torch.float32 \[4, 16\], the model has torch.float32 \[2, 32\]"),
        (_widen, r"left is torch.float64 \[2, 32\], the model has torch.float32 \[2, 32\]"),
    ],
)
def test_a_version_of_another_model_is_refused_before_anything_is_written(
    spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model, weight_map = holding(make_weights())
    before, tensors = state(model), make_weights(1)
    spoil(tensors)
    with pytest.raises(ValueError, match=message):
        weight_map.apply(make_update(2, tensors))
    assert same(state(model), before)


def test_a_patch_without_a_base_that_needs_one_is_refused() -> None:
    model, weight_map = holding(make_weights())
    before = state(model)
    patch = make_update(2, stepped(make_weights(), 0.2, 1), base=WeightImage(version=1, tensors=make_weights()))
    with pytest.raises(ValueError, match="left: the update applies to no version, and is not all of it"):
        weight_map.apply(replace(patch, base=None))
    assert same(state(model), before)


def test_a_broken_piece_changes_nothing_of_its_tensor_in_several_places() -> None:
    model, weight_map = holding(make_weights())
    before = state(model)
    patch = make_update(2, {n: t + 1 for n, t in make_weights().items()}, num_ranks=2)
    pairs = patch.tensors["pairs"]
    pieces = (pairs.pieces[0], replace(pairs.pieces[1], payload=b"no"))
    with pytest.raises(ValueError, match="pairs: the raw piece of entries 64 to 128 is broken"):
        weight_map.apply(replace(patch, tensors=dict(patch.tensors, pairs=replace(pairs, pieces=pieces))))
    after = state(model)
    assert torch.equal(after["query"], before["query"]) and torch.equal(after["key"], before["key"])


# -- loaders that cannot be followed -----------------------------------------------------------------------------------


def loader(own: str, load: Callable[[Model, Tensor], Any]) -> Model:
    """A model that loads one tensor in its own way."""

    class Own(Model):
        def load(self, name: str, tensor: Tensor) -> None:
            if name == own:
                load(self, tensor)
            else:
                super().load(name, tensor)

    return Own()


def _twice(model: Model, tensor: Tensor) -> None:
    """Two of its rows to both places and two to none: as many values as it has, and not all of them."""
    model.query.data.copy_(tensor[:2])
    model.key.data.copy_(tensor[:2])


@pytest.mark.parametrize(
    ("name", "load", "message"),
    [
        ("left", lambda m, t: m.fused.data[:2].copy_(torch.cat([t[:1], t[1:]])), "left: .* computes new values"),
        ("right", lambda m, t: m.fused.data[2:].copy_(m.fused.data[2:]), "right: .* computes new values"),
        ("left", lambda m, t: m.fused.data[:2].add_(t), r"left: .*aten.add_.Tensor, which cannot be proved"),
        ("left", lambda m, t: m.fused.data[:2].copy_(t.double()), r"left: the model takes torch.float32 \[2, 32\]"),
        ("left", lambda m, t: m.fused.data[:2].copy_(t[:, :1]), r"left: .*has torch.float32 \[2, 1\]"),
        ("norm", lambda m, t: m.norm.data.copy_(t[:16].repeat(2)), "norm: .* computes new values"),
        ("left", lambda m, t: m.fused.data[:2, :3].copy_(t[:, :3]), "left: the model keeps it in pieces"),
        ("norm", lambda m, t: None, "norm: the model's loader used 0 of its 32 values"),
        ("pairs", lambda m, t: m.query.data.copy_(t[:2]), "pairs: the model's loader used 64 of its 128 values"),
        ("pairs", _twice, "pairs: the model's loader used 64 of its 128 values"),
        ("table", lambda m, t: m.table.data[:5].copy_(t), "32 of 192 values of the model's table are in no published"),
        ("left", lambda m, t: t[7], "left: index 7 is out of bounds"),
    ],
)
def test_a_loader_that_cannot_be_followed_is_refused(
    name: str, load: Callable[[Model, Tensor], Any], message: str
) -> None:
    model = loader(name, load)
    before = state(model)
    with pytest.raises(RuntimeError, match=message):
        WeightMap(model, make_update(1, make_weights()).tensors)
    assert same(state(model), before)


def test_a_parameter_that_no_tensor_reaches_is_named_with_what_is_missing() -> None:
    """`right` covers 96 of the fused parameter's 160 values."""
    weights = make_weights()
    del weights["left"]
    with pytest.raises(RuntimeError, match="64 of 160 values of the model's fused"):
        WeightMap(Model(), make_update(1, weights).tensors)


def test_a_tensor_that_the_loader_ignores_is_named() -> None:
    with pytest.raises(RuntimeError, match="extra: the model's loader used 0 of its 3 values"):
        WeightMap(Model(), make_update(1, make_weights() | {"extra": torch.zeros(3)}).tensors)


# -- an adapter beside the weights -------------------------------------------------------------------------------------


class AdaptedLayer:
    """As vLLM's: a place of rank 8 for each layer that is fused there, zeroed before the adapter is written into a corner."""

    def __init__(self, *rows: int) -> None:
        self.lora_a_stacked = tuple(torch.full((1, 1, 8, 32), torch.nan) for _ in rows)
        self.lora_b_stacked = tuple(torch.full((1, 1, m, 8), torch.nan) for m in rows)

    def reset_lora(self, index: int) -> None:
        for matrix in (*self.lora_a_stacked, *self.lora_b_stacked):
            matrix[index] = 0

    def set_lora(self, index: int, a: Any, b: Any) -> None:
        self.reset_lora(index)
        for stacked, given in ((self.lora_a_stacked, a), (self.lora_b_stacked, b)):
            for matrix, part in zip(stacked, given if isinstance(given, list) else [given], strict=True):
                if part is not None:
                    matrix[index, 0, : part.shape[0], : part.shape[1]].copy_(part, non_blocking=True)


class Adapted(Model):
    """`fused` has an adapter for its second part, `turned` has one, `query` none."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"fused": AdaptedLayer(2, 3), "conv": AdaptedLayer(3), "query": AdaptedLayer(2)}
        self.lora_manager = SimpleNamespace(modules=layers, packed_modules={"fused": ["left", "right"]})

    def give(self, tensors: Mapping[str, Tensor]) -> None:
        """The whole version, as vLLM would load it."""
        self.load_weights(item for item in tensors.items() if ".lora_" not in item[0])
        a, b = ({n: t for n, t in tensors.items() if f".lora_{which}." in n} for which in "AB")
        layers = self.lora_manager.modules
        layers["fused"].set_lora(0, [None, a["right.lora_A.weight"]], [None, b["right.lora_B.weight"]])
        layers["conv"].set_lora(0, a["conv.lora_A.weight"], b["conv.lora_B.weight"])
        layers["query"].reset_lora(0)


def adapted_weights(seed: int = 0) -> dict[str, Tensor]:
    weights = make_weights(seed)
    for name in ("right", "conv"):
        weights |= {f"{name}.lora_A.weight": torch.randn(3, 32), f"{name}.lora_B.weight": torch.randn(3, 3)}
    return weights


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(tensor).clone() for name, tensor in _served(model)}


def with_adapter(weights: Mapping[str, Tensor]) -> tuple[Adapted, WeightMap]:
    model, update = Adapted(), make_update(1, weights)
    weight_map = WeightMap(model, update.tensors)
    weight_map.apply(update)
    return model, weight_map


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_chain_of_patches_leaves_what_the_layers_make_of_each_adapter(num_ranks: int) -> None:
    weights = adapted_weights()
    model, weight_map = with_adapter(weights)
    only_adapter = weights | {n: t for n, t in adapted_weights(1).items() if ".lora_" in n}
    sparse = stepped(only_adapter, 0.2, 2)
    for version, after in enumerate([only_adapter, sparse, nudged(sparse), adapted_weights(3)], 2):
        base = WeightImage(version=version - 1, tensors=weights) if version < 5 else None
        patch, weights = make_update(version, after, base=base, num_ranks=num_ranks), after
        weight_map.apply(patch)
        weight_map.prove(patch)
        expected = Adapted()
        expected.give(weights)
        assert same(whole_state(model), whole_state(expected)), version


@pytest.mark.parametrize(
    ("matrix", "named"),
    [
        ("fused.lora_a_stacked.0", "fused: 1 of 256 values of its padding are not 0"),
        ("fused.lora_b_stacked.1", "fused: 1 of 15 values of its padding are not 0"),
        ("query.lora_b_stacked.0", "query: 1 of 16 values of its padding are not 0"),
        ("conv.lora_a_stacked.0", "conv: 1 of 160 values of its padding are not 0"),
    ],
)
def test_one_lost_bit_beside_an_adapter_is_found_and_a_complete_update_heals_it(matrix: str, named: str) -> None:
    """The lowest one of each place's last value, which is of no adapter."""
    weights = adapted_weights()
    model, weight_map = with_adapter(weights)
    patch = make_update(2, weights, base=WeightImage(version=1, tensors=weights))
    bits(dict(_served(model))[matrix]).view(-1)[-1] ^= 1
    weight_map.apply(patch)
    with pytest.raises(RuntimeError, match=named):
        weight_map.prove(patch)
    complete = make_update(3, weights)
    weight_map.apply(complete)
    weight_map.prove(complete)


def test_an_adapter_of_a_layer_that_has_none_is_named() -> None:
    weights = adapted_weights() | {"norm.lora_A.weight": torch.zeros(3, 32), "norm.lora_B.weight": torch.zeros(1, 3)}
    with pytest.raises(RuntimeError, match=r"norm.lora_A.weight: the model's loader used 0 of its 96 values"):
        WeightMap(Adapted(), make_update(1, weights).tensors)


def test_a_place_that_was_moved_after_the_map_was_made_is_named() -> None:
    model, weight_map = with_adapter(adapted_weights())
    layer = model.lora_manager.modules["conv"]
    layer.lora_a_stacked = (layer.lora_a_stacked[0].clone(),)
    with pytest.raises(RuntimeError, match=r"256 of 256 values of the model's conv.lora_a_stacked.0"):
        weight_map.prove(make_update(1, adapted_weights()))


def test_an_adapter_for_a_model_without_one_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"right.lora_A.weight: the model's loader used 0"):
        WeightMap(Model(), make_update(1, adapted_weights()).tensors)
