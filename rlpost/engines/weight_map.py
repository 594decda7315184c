"""Where each checkpoint tensor lies inside a served model, so that patches change it in place and it can be read back.

A served model fuses, slices and pads checkpoint tensors into parameters of its own. Its `load_weights` is the one authority on
that, so the map is what it does with stand-ins: every write into the model is noted instead of done. So for an adapter that
is served beside the weights: its layers' own `set_lora` says where A and s B lie. N entries of a tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlpost.core.delta import TensorPatch, apply_pieces, check_result
from rlpost.core.patch import WeightPatch, naming
from rlpost.core.weights import adapter_names, bits, is_of_adapter
from rlpost.engines.sampling import check_fits

SLOT = 0
"""Of the one adapter a sampler holds, in vLLM's layers."""


class WeightMap:
    """A served model as the checkpoint tensors it was made of.

    Raises:
        RuntimeError: naming the tensor that the model's loader refuses, computes with, leaves out or stores otherwise, or the
            parameter that no tensor reaches. The model is as it was.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, TensorPatch]) -> None:
        """
        Args:
            tensors: every name a version has, for its shape and dtype.
        """
        # Written by nobody, so no memory is taken for them; all at once, so that an address is that of one tensor.
        stand_ins = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        recorder = _Recorder(model, stand_ins)
        _feed(model, recorder, stand_ins)
        self._model = model
        self._layout = {name: tensor.to("meta") for name, tensor in stand_ins.items()}
        self._placements, self._constants = recorder.placements, recorder.constants
        self._regions = recorder.regions
        for name, tensor in stand_ins.items():
            _check_used(name, tensor.numel(), self._placements[name])
        self._check_covered()

    def apply(self, patch: WeightPatch) -> None:
        """Write the patch into the storage the model computes from.

        Raises:
            ValueError: naming the tensor that does not fit, or whose patch is broken. Others may have been written.
        """
        check_fits(patch, self._layout)
        if patch.base is None:
            for constant in self._constants:
                constant.target.fill_(constant.value)
        for name, tensor in patch.tensors.items():
            if tensor.pieces:
                with naming(name), self._edited(name, whole=patch.base is None) as held_N:
                    apply_pieces(tensor.pieces, held_N)

    def prove(self, patch: WeightPatch) -> None:
        """Show that the model holds the patch's version bit for bit and nothing else; reads only.

        Raises:
            ValueError: naming the tensor that is not as published.
            RuntimeError: naming the padding that is not, or the parameter whose storage is not the one that was mapped.
        """
        self._check_covered()
        for name, tensor in patch.tensors.items():
            with naming(name):
                check_result(tensor, self._read(name))
        for constant in self._constants:
            constant.check()

    @contextmanager
    def _edited(self, name: str, *, whole: bool) -> Iterator[Tensor]:
        """[N] on the CPU: the tensor, to be changed.

        Args:
            whole: every entry will be written, so none need be read.
        """
        flat_N = self._direct(name)
        if flat_N is not None:
            yield flat_N
            return
        flat_N = torch.empty(self._layout[name].numel(), dtype=self._layout[name].dtype) if whole else self._read(name)
        yield flat_N
        for placement in self._placements[name]:
            placement.target.copy_(placement.inside(flat_N))

    def _read(self, name: str) -> Tensor:
        """[N] on the CPU: the tensor as the model holds it now; its own storage or a copy."""
        flat_N = self._direct(name)
        if flat_N is None:
            flat_N = torch.empty(self._layout[name].numel(), dtype=self._layout[name].dtype)
            for placement in self._placements[name]:
                placement.inside(flat_N).copy_(placement.target)
        return flat_N

    def _direct(self, name: str) -> Tensor | None:
        """[N] view into the model, where it keeps the tensor on the CPU, in one piece and in its own order."""
        match self._placements[name]:
            case [placement] if placement.in_one_piece and placement.target.device.type == "cpu":
                return placement.target.view(-1)
        return None

    def _check_covered(self) -> None:
        for name, parameter in _served(self._model):
            if missing := _num_missing(parameter, self._regions[_storage(parameter)]):
                raise RuntimeError(
                    f"{missing} of {parameter.numel()} values of the model's {name} are in no published tensor"
                )


@dataclass(frozen=True, slots=True, eq=False)
class _Placement:
    """Entries of a checkpoint tensor, as a strided view of it, and where the model keeps them."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    in_order: bool
    """Whether they are consecutive entries of the tensor."""
    target: Tensor
    """Of `size`."""

    @property
    def in_one_piece(self) -> bool:
        return self.in_order and self.target.is_contiguous()

    def inside(self, flat_N: Tensor) -> Tensor:
        return flat_N.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, slots=True, eq=False)
class _Constant:
    """Entries of the model that come from no tensor: those of a padded vocabulary, or of an adapter's padded rank."""

    name: str
    """The tensor that the loader was given last, or the layer of an adapter."""
    target: Tensor
    value: Any
    inside: list[Tensor] = field(default_factory=list)
    """Parts of `target` that tensors were written to afterwards."""

    def check(self) -> None:
        num_different = self._num_different(self.target) - sum(map(self._num_different, self.inside))
        if num_different:
            size = self.target.numel() - sum(part.numel() for part in self.inside)
            raise RuntimeError(f"{self.name}: {num_different} of {size} values of its padding are not {self.value}")

    def _num_different(self, held: Tensor) -> int:
        return int((bits(held) != bits(torch.full_like(held, self.value))).sum())


class _Recorder(TorchDispatchMode):
    """While active, what would be written into the model is noted."""

    def __init__(self, model: nn.Module, stand_ins: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._storages = {_storage(t) for t in (*model.buffers(), *(tensor for _, tensor in _served(model)))}
        self._stand_ins = {_storage(tensor): (name, tensor.dtype) for name, tensor in stand_ins.items()}
        self.latest = "before its first tensor"
        """Name of the tensor that the loader was given last."""
        self.placements: defaultdict[str, list[_Placement]] = defaultdict(list)
        self.constants: list[_Constant] = []
        self.regions: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
        """By storage, the entries written: [start, stop)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        arguments = func._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | (kwargs or {})
        outputs = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        written = [tensor for tensor in outputs if tensor is not None and _storage(tensor) in self._storages]
        if not written:
            return func(*args, **(kwargs or {}))
        (target,) = written
        around = [constant for constant in self.constants if _covers(constant.target, target)]
        if not target.is_contiguous() and not around:
            raise RuntimeError("the model keeps it in pieces, which cannot be proved")
        match func:
            case torch.ops.aten.copy_.default:
                self._place(target.detach(), args[1])
                for constant in around:
                    constant.inside.append(target.detach())
            case torch.ops.aten.fill_.Scalar | torch.ops.aten.fill_.Tensor:
                self.constants.append(_Constant(self.latest, target.detach(), torch.as_tensor(args[1]).item()))
            case _:
                raise RuntimeError(f"the model's loader writes with {func}, which cannot be proved")
        if not around:
            start = target.storage_offset()
            self.regions[_storage(target)].add((start, start + target.numel()))
        return target

    def _place(self, target: Tensor, source: Tensor) -> None:
        if (target.shape, target.dtype) != (source.shape, source.dtype):
            raise RuntimeError(
                f"the model takes {target.dtype} {list(target.shape)}, the update has {source.dtype} {list(source.shape)}"
            )
        name, dtype = self._stand_ins.get(_storage(source), (None, None))
        if name is None or dtype != source.dtype:
            raise RuntimeError(
                "the model's loader computes new values from published tensors, and only their own can be followed into"
                " the model"
            )
        offset, in_order = int(source.storage_offset()), source.is_contiguous()
        self.placements[name].append(_Placement(tuple(source.shape), source.stride(), offset, in_order, target))


def _feed(model: nn.Module, recorder: _Recorder, stand_ins: Mapping[str, Tensor]) -> None:
    adapted = list(_adapted_layers(model))

    def one_by_one() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stand_ins.items():
            if not (adapted and is_of_adapter(name)):
                recorder.latest = name
                yield name, tensor

    try:
        with recorder:
            model.load_weights(one_by_one())  # pyright: ignore[reportCallIssue]
            for name, layer, parts in adapted:
                recorder.latest = name
                _set_adapter(layer, parts, stand_ins)
    except Exception as error:
        raise RuntimeError(f"{recorder.latest}: {error}") from error


def _set_adapter(layer: Any, parts: Sequence[str], stand_ins: Mapping[str, Tensor]) -> None:
    """Give a layer its adapter as vLLM does: each part's A and s B, None of a part without, as lists where there are several."""
    matrices = [[stand_ins.get(name) for name in adapter_names(f"{part}.weight")] for part in parts]
    a, b = ([pair[i] for pair in matrices] for i in (0, 1))
    if not any(matrix is not None for matrix in a):
        layer.reset_lora(SLOT)
    elif len(parts) == 1:
        layer.set_lora(SLOT, *a, *b)
    else:
        layer.set_lora(SLOT, a, b)


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any, Sequence[str]]]:
    """(name, vLLM's layer that adds an adapter to what it wraps, names of the layers that are fused there); none without LoRA."""
    manager: Any = getattr(model, "lora_manager", None)
    if manager is not None:
        for name, layer in manager.modules.items():
            yield name, layer, manager.packed_modules.get(name, [name])


def _served(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a version of the model consists of: its parameters, and the adapter's matrices, which are none of them."""
    yield from model.named_parameters()
    for name, layer, _ in _adapted_layers(model):
        for kind in ("lora_a_stacked", "lora_b_stacked"):
            yield from ((f"{name}.{kind}.{index}", matrix) for index, matrix in enumerate(getattr(layer, kind)))


def _check_used(name: str, numel: int, placements: list[_Placement]) -> None:
    """Raises RuntimeError unless the model has one place for each entry of the tensor."""
    num_used = sum(placement.target.numel() for placement in placements)
    if num_used == numel and not (len(placements) == 1 and placements[0].in_order):
        used_N = torch.zeros(numel, dtype=torch.bool)
        for placement in placements:
            placement.inside(used_N).fill_(True)
        num_used = int(used_N.sum())
    if num_used != numel:
        raise RuntimeError(
            f"{name}: the model's loader used {num_used} of its {numel} values. Publish only tensors that the served"
            " model has a place for"
        )


def _num_missing(parameter: Tensor, regions: set[tuple[int, int]]) -> int:
    """Entries of `parameter` in none of its storage's `regions`."""
    reached, stop = int(parameter.storage_offset()), int(parameter.storage_offset()) + parameter.numel()
    missing = 0
    for region_start, region_stop in sorted(regions):
        missing += max(min(region_start, stop) - reached, 0)
        reached = max(reached, region_stop)
    return missing + max(stop - reached, 0)


def _covers(region: Tensor, part: Tensor) -> bool:
    """Whether all entries of `part` are between the first and the last one of `region`, which is contiguous."""
    first = part.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    start = region.storage_offset()
    return _storage(region) == _storage(part) and start <= first and last < start + region.numel()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
