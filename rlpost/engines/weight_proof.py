"""Weights into a model whose layout only its own loader knows, and the proof that they are there.

A served model fuses, slices and pads checkpoint tensors into parameters of its own. Its `load_weights` is the one
authority on that mapping, so the proof runs it a second time with every write turned into a comparison.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlpost.core.weights import bits
from rlpost.types import WeightUpdate


def load_in_place(model: nn.Module, update: WeightUpdate) -> None:
    """Write the update into the storage the model computes from.

    Raises:
        RuntimeError: naming the tensor that the model's loader refuses.
    """
    _feed(model, update, None)


def prove(model: nn.Module, update: WeightUpdate) -> None:
    """Show that the model holds `update` bit for bit and nothing else; reads only.

    Every element of every parameter must be compared, and every element of every tensor used.

    Raises:
        RuntimeError: naming the tensor or parameter that differs, was left out or was ignored by the loader.
    """
    with _CompareInsteadOfWriting(model) as comparison:
        _feed(model, update, comparison)
    for name, tensor in update.tensors.items():
        if (num_used := comparison.num_used[name]) != tensor.numel():
            raise RuntimeError(
                f"weight update {update.version}: {name}: the model's loader used {num_used} of its {tensor.numel()}"
                " values. Publish only tensors that the served model has a place for"
            )
    for name, parameter in model.named_parameters():
        if missing := comparison.num_missing(parameter):
            raise RuntimeError(
                f"weight update {update.version}: {missing} of {parameter.numel()} values of the model's {name} are in"
                " no published tensor"
            )


class _CompareInsteadOfWriting(TorchDispatchMode):
    """While active, writing into the model compares bits instead, and raises where they differ."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._storages = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._regions: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
        self.tensor_name = ""
        """The update's tensor that the loader was given last."""
        self.num_used: Counter[str] = Counter()
        """Elements of each tensor that were compared; constants (zeroed vocabulary padding) come from no tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        arguments = func._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | (kwargs or {})
        outputs = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        written = [tensor for tensor in outputs if tensor is not None and _storage(tensor) in self._storages]
        if not written:
            return func(*args, **(kwargs or {}))
        (target,) = written
        if func is torch.ops.aten.copy_.default:
            self._compare(target, args[1])
            self.num_used[self.tensor_name] += target.numel()
        elif func is torch.ops.aten.fill_.Scalar:
            self._compare(target, torch.full_like(target, args[1]))
        else:
            raise RuntimeError(f"the model's loader writes with {func}, which cannot be proved")
        return target

    def _compare(self, target: Tensor, value: Tensor) -> None:
        if (target.shape, target.dtype) != (value.shape, value.dtype):
            raise RuntimeError(
                f"the model takes {target.dtype} {list(target.shape)}, the update has {value.dtype} {list(value.shape)}"
            )
        if not target.is_contiguous():
            raise RuntimeError("the model keeps it in pieces, which cannot be proved")
        held, published = bits(target), bits(value.to(target.device))
        if not torch.equal(held, published):
            num_different = int((held != published).sum())
            raise RuntimeError(f"{num_different} of {target.numel()} values in the model differ from the update")
        start = target.storage_offset()
        self._regions[_storage(target)].add((start, start + target.numel()))  # pyright: ignore[reportArgumentType]

    def num_missing(self, parameter: Tensor) -> int:
        """Elements of `parameter` that were not compared."""
        reached, stop = parameter.storage_offset(), parameter.storage_offset() + parameter.numel()
        missing = 0
        for region_start, region_stop in sorted(self._regions[_storage(parameter)]):
            missing += max(min(region_start, stop) - reached, 0)
            reached = max(reached, region_stop)
        return missing + max(stop - reached, 0)  # pyright: ignore[reportReturnType]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _feed(model: nn.Module, update: WeightUpdate, comparison: _CompareInsteadOfWriting | None) -> None:
    """Run the model's loader over the update.

    What it compares belongs to the tensor it was given last: loaders take one at a time. One that gathered several
    first would be charged for the wrong tensor, and the proof would fail, not pass.
    """
    latest = "before its first tensor"

    def one_by_one() -> Iterator[tuple[str, Tensor]]:
        nonlocal latest
        for latest, tensor in update.tensors.items():
            if comparison is not None:
                comparison.tensor_name = latest
            yield latest, tensor

    try:
        model.load_weights(one_by_one())  # pyright: ignore[reportCallIssue]
    except Exception as error:
        raise RuntimeError(f"weight update {update.version}: {latest}: {error}") from error
