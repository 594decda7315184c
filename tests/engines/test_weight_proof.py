"""The proof on a model small enough to see: two checkpoint tensors fused into one parameter, one row of padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from rlpost.engines.weight_proof import load_in_place, prove
from tests.engines.conftest import make_update


class Fused(nn.Module):
    """`fused` holds left [2, 4] above right [3, 4]; `table` holds 5 published rows of 4 and one of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.full((5, 4), torch.nan), requires_grad=False)
        self.table = nn.Parameter(torch.full((6, 4), torch.nan), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "left":
                self.fused.data[:2].copy_(tensor)
            elif name == "right":
                self.fused.data[2:].copy_(tensor)
            elif name == "table":
                self.table.data[:5].copy_(tensor)
                self.table.data[5:].fill_(0)


def make_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"left": torch.randn(2, 4), "right": torch.randn(3, 4), "table": torch.randn(5, 4)}


def test_what_was_loaded_is_proved_and_the_proof_writes_nothing() -> None:
    model, update = Fused(), make_update(7, make_weights())
    load_in_place(model, update)
    loaded = {name: parameter.clone() for name, parameter in model.named_parameters()}
    prove(model, update)
    assert all(torch.equal(parameter, loaded[name]) for name, parameter in model.named_parameters())
    with pytest.raises(RuntimeError, match="weight update 8: left: 8 of 8 values in the model differ"):
        prove(model, make_update(8, {name: tensor + 1 for name, tensor in make_weights().items()}))
    assert all(torch.equal(parameter, loaded[name]) for name, parameter in model.named_parameters())


def test_values_are_compared_by_their_bits() -> None:
    """-0.0 equals 0.0 but is not the same weight; a NaN differs from itself but is."""
    weights = make_weights()
    weights["left"][0, 0], weights["left"][0, 1] = 0.0, torch.nan
    model = Fused()
    load_in_place(model, make_update(1, weights))
    prove(model, make_update(1, weights))
    negated = dict(weights, left=weights["left"].clone())
    negated["left"][0, 0] = -0.0
    with pytest.raises(RuntimeError, match="left: 1 of 8"):
        prove(model, make_update(1, negated))


def _spoil_padding(model: Fused) -> None:
    model.table.data[5, 3] = 1.0


def _spoil_last_value(model: Fused) -> None:
    model.fused.data[4, 3] += 1.0


@pytest.mark.parametrize(
    ("spoil", "message"), [(_spoil_padding, "table: 1 of 4"), (_spoil_last_value, "right: 1 of 12")]
)
def test_one_wrong_value_is_found_and_named(spoil: Callable[[Fused], None], message: str) -> None:
    model, update = Fused(), make_update(1, make_weights())
    load_in_place(model, update)
    spoil(model)
    with pytest.raises(RuntimeError, match=message):
        prove(model, update)


def test_a_parameter_that_no_tensor_reached_is_named_with_what_is_missing() -> None:
    """`right` covers 12 of the fused parameter's 20 values."""
    model, weights = Fused(), make_weights()
    load_in_place(model, make_update(1, weights))
    del weights["left"]
    with pytest.raises(RuntimeError, match="8 of 20 values of the model's fused"):
        prove(model, make_update(1, weights))


def test_a_tensor_that_the_loader_ignored_is_named() -> None:
    model, update = Fused(), make_update(1, make_weights() | {"extra": torch.zeros(3)})
    load_in_place(model, update)
    with pytest.raises(RuntimeError, match="extra: the model's loader used 0 of its 3 values"):
        prove(model, update)


def test_a_tensor_stretched_to_fit_is_refused() -> None:
    """copy_ repeats one column four times without complaint; what was published is not what is served."""
    model, update = Fused(), make_update(1, make_weights() | {"right": torch.ones(3, 1)})
    load_in_place(model, update)
    with pytest.raises(RuntimeError, match=r"right: the model takes torch.float32 \[3, 4\]"):
        prove(model, update)


def test_a_loader_that_writes_in_a_way_that_hides_the_value_is_refused() -> None:
    class Adding(Fused):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            for _, tensor in weights:
                self.fused.data[:2].add_(tensor)

    with pytest.raises(RuntimeError, match=r"aten.add_.Tensor, which cannot be proved"):
        prove(Adding(), make_update(1, {"left": torch.ones(2, 4)}))


def test_an_error_of_the_loader_names_the_tensor() -> None:
    with pytest.raises(RuntimeError, match="weight update 3: right: "):
        load_in_place(Fused(), make_update(3, make_weights() | {"right": torch.ones(7, 7)}))
