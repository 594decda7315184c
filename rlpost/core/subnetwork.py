"""Which entries of each weight a stage may change. Axes: M rows and N columns of a matrix, R singular values.

"Reinforcement Learning Finetunes Small Subnetworks in Large Language Models" (https://arxiv.org/abs/2505.11711) trains
again from the same start, on the entries alone that a full run had changed. Every mask here is a function of tensors and
seeds: the same on every machine and in every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from rlpost.core.weights import bits

Control = Literal["random", "complement"]
"""As many entries in each weight, but others: chosen at random of all, or of those left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Controlled:
    control: Control | None = None
    seed: int = 0
    """Of the control."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatedEntries(_Controlled):
    """Those that differ between two model directories."""

    before: str
    after: str
    dtype: str | None = None
    """What both are rounded to; None: the dtype that samplers serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrincipalEntries(_Controlled):
    """Of each linear layer but the output layer, those that carry its leading singular values; nothing else."""

    rank: int
    density: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomEntries:
    """The same share of every weight, chosen at random."""

    density: float
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntries(_Controlled):
    """Those of a mask file, as `rlpost mask` writes one."""

    path: str


Subnetwork = UpdatedEntries | PrincipalEntries | RandomEntries | FileEntries
SUBNETWORKS: Mapping[str, type[Subnetwork]] = {
    "update": UpdatedEntries,
    "principal": PrincipalEntries,
    "random": RandomEntries,
    "file": FileEntries,
}
"""By their names in a recipe."""

Coverage = Mapping[str, tuple[int, int]]
"""Weight name to (entries that may change, all entries)."""


def updated_mask(before: Tensor, after: Tensor, *, dtype: torch.dtype) -> Tensor:
    """True where the two differ in any bit once rounded to `dtype`."""
    assert before.shape == after.shape
    return bits(before.to(dtype)) != bits(after.to(dtype))


def principal_mask(weight_MN: Tensor, *, rank: int, density: float, left_MR: Tensor | None = None) -> Tensor:
    """True at the `density` share of entries that are largest, in absolute value, in the best approximation of rank
    `rank`. LIFT, https://arxiv.org/abs/2506.00772; it gives the count as r (M + N), a share compares across shapes.

    Of equal entries the first in row-major order goes first.

    Args:
        left_MR: the left singular vectors, if known.
    """
    known = left_MR is not None
    top_MR = (left_MR if known else torch.linalg.svd(weight_MN.float(), full_matrices=False).U)[:, :rank]
    approximation_MN = top_MR @ (top_MR.T @ weight_MN.float())
    return _largest(approximation_MN.abs(), round(density * weight_MN.numel()))


def low_magnitude_mask(weight: Tensor, *, density: float) -> Tensor:
    """True at the `density` share of entries that are smallest in absolute value. "The Path Not Taken",
    https://arxiv.org/abs/2511.08567. Of equal entries the first in row-major order goes first."""
    return _largest(-weight.abs(), round(density * weight.numel()))


def random_mask(shape: torch.Size, *, count: int, seed: int, name: str) -> Tensor:
    """True at `count` entries chosen uniformly; another choice for each weight's name."""
    return _largest(_noise(shape, seed, name), count)


def complement_mask(mask: Tensor, *, seed: int, name: str) -> Tensor:
    """True at as many entries as in `mask`, chosen uniformly from those it leaves out; at all of these if they are fewer."""
    count = min(int(mask.sum()), int((~mask).sum()))
    return _largest(_noise(mask.shape, seed, name).masked_fill(mask.cpu(), -1.0), count)


def with_control(mask: Tensor, control: Control | None, *, seed: int, name: str) -> Tensor:
    """`mask`, or the control experiment of the same size that stands for it."""
    if control == "random":
        return random_mask(mask.shape, count=int(mask.sum()), seed=seed, name=name)
    return complement_mask(mask, seed=seed, name=name) if control == "complement" else mask


def packed(mask: Tensor) -> Tensor:
    """uint8 [ceil(entries / 8)]: entry i, in row-major order, is bit i % 8 of byte i // 8, counted from the lowest."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpacked(data: Tensor, shape: torch.Size) -> Tensor:
    """The mask of `packed`."""
    flat = np.unpackbits(data.numpy(), count=shape.numel(), bitorder="little")
    return torch.from_numpy(flat).view(torch.bool).view(shape)


def coverage(masks: Mapping[str, Tensor]) -> Coverage:
    return {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}


def _largest(values: Tensor, count: int) -> Tensor:
    order = values.flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[order[:count]] = True
    return mask.view(values.shape)


def _noise(shape: torch.Size, seed: int, name: str) -> Tensor:
    """Uniform in [0, 1), on the CPU, whose generator is the same everywhere."""
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) >> 1)
    return torch.rand(shape, generator=generator)
