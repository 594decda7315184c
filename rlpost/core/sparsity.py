"""How many entries of a weight an update left as they were, by bits and by tolerance, and how many it should have by arithmetic.

Source: Mukherjee et al., "Reinforcement Learning Finetunes Small Subnetworks in Large Language Models" (arXiv 2505.11711):
section 3 for the definition, table 6 for the tolerances; their code takes the difference in the stored dtype. The relative
probe is that of "The Path Not Taken" (arXiv 2511.08567). N entries, [M, K] a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlpost.core.weights import bits

TOLERANCES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
RELATIVE = 1e-3
"""Below 2^-9, so that two different bfloat16 values never pass: a wider dtype is asked bfloat16's question."""
CHUNK = 1 << 22
NULL_SAMPLE = 1 << 20
"""Entries of a weight, evenly spaced, whose spacing the absorption null is averaged over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Counts of one weight; `pooled` adds those of several, so that sizes are the weights of every share.

    Example:
        Sparsity(numel=4, bit_equal=3, within={1e-5: 3, ...}, within_relative=3, squared_update=0.25, predicted=3.4)
    """

    numel: int
    bit_equal: int
    within: Mapping[float, int]
    """Tolerance to the entries with |after - before| at most that; difference and tolerance are rounded to the stored dtype."""
    within_relative: int
    """|after - before| <= RELATIVE max(|after|, |before|)."""
    squared_update: float
    """Sum of (after - before)^2."""
    predicted: float
    """Entries that `absorption_null` expects to be unchanged."""

    @property
    def unchanged(self) -> float:
        """Share of bit-identical entries; 1 of no entries."""
        return self.share(self.bit_equal)

    @property
    def rms_update(self) -> float:
        return math.sqrt(self.squared_update / self.numel) if self.numel else 0.0

    def share(self, count: float) -> float:
        return count / self.numel if self.numel else 1.0


def sparsity(before: Tensor, after: Tensor) -> Sparsity:
    """Of one weight; a chunk at a time, and only changed entries are subtracted.

    Raises:
        ValueError: when shapes or dtypes differ, they are no floating-point numbers, or a changed entry is not finite.
    """
    if not before.is_floating_point():
        raise ValueError(f"{before.dtype} is no dtype of weights")
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        raise ValueError(
            f"{before.dtype} {tuple(before.shape)} and {after.dtype} {tuple(after.shape)} cannot be compared entry by entry"
        )
    before_N, after_N = before.detach().flatten(), after.detach().flatten()
    numel, num_changed, relative, squared = before_N.numel(), 0, 0, 0.0
    beyond = dict.fromkeys(TOLERANCES, 0)
    for low in range(0, numel, CHUNK):
        old, new = before_N[low : low + CHUNK], after_N[low : low + CHUNK]
        # numpy's flatnonzero, as torch's takes twice to nine times as long.
        changed = torch.from_numpy(np.flatnonzero((bits(old) != bits(new)).numpy()))
        old, new = old[changed], new[changed]
        difference = (new - old).abs()
        if not difference.isfinite().all():
            raise ValueError("an entry changed to or from a value that is not finite, or by more than the dtype holds")
        num_changed += len(old)
        for tolerance in TOLERANCES:
            beyond[tolerance] += int((difference > torch.tensor(tolerance, dtype=old.dtype)).sum())
        old, new = old.double(), new.double()
        exact = (new - old).abs()
        relative += int((exact > RELATIVE * torch.maximum(new.abs(), old.abs())).sum())
        squared += float(exact.square().sum())
    rms = math.sqrt(squared / numel) if numel else 0.0
    return Sparsity(
        numel=numel,
        bit_equal=numel - num_changed,
        within={tolerance: numel - count for tolerance, count in beyond.items()},
        within_relative=numel - relative,
        squared_update=squared,
        predicted=numel * absorption_null(before_N, rms),
    )


def pooled(parts: Iterable[Sparsity]) -> Sparsity:
    """Of several weights as if they were one."""
    every = list(parts)
    return Sparsity(
        numel=sum(s.numel for s in every),
        bit_equal=sum(s.bit_equal for s in every),
        within={tolerance: sum(s.within[tolerance] for s in every) for tolerance in TOLERANCES},
        within_relative=sum(s.within_relative for s in every),
        squared_update=math.fsum(s.squared_update for s in every),
        predicted=math.fsum(s.predicted for s in every),
    )


def absorption_null(before_N: Tensor, rms_update: float) -> float:
    """Share of entries that stay as they are if each moves by a normal step of this size and is rounded to its dtype.

    mean erf(ulp(w) / (2 sqrt(2) rms)): a step is absorbed while it is below half the spacing at w. No more than update size
    and spacing go into it, so what an observed share has beyond it is what the update itself owes to sparsity.
    """
    if not before_N.numel() or rms_update == 0.0:
        return 1.0
    sample = bits(before_N)[:: max(1, before_N.numel() // NULL_SAMPLE)]
    # Spacing is the exponent's alone, and there are few of them.
    num_fraction_bits = round(-math.log2(torch.finfo(before_N.dtype).eps))
    num_exponents = 1 << (8 * sample.element_size() - 1 - num_fraction_bits)
    powers = (torch.arange(num_exponents) << num_fraction_bits).to(sample.dtype).view(before_N.dtype)
    absorbed = torch.erf(spacing(powers) / (2 * math.sqrt(2) * rms_update))
    return float(absorbed[(sample >> num_fraction_bits).long() & (num_exponents - 1)].mean())


def spacing(values: Tensor) -> Tensor:
    """float64: the distance from each value's magnitude to the next larger one of its dtype."""
    info = torch.finfo(values.dtype)
    smallest = info.smallest_normal * info.eps
    exponent = torch.frexp(values.double())[1] - 1
    steps = torch.ldexp(torch.full(values.shape, info.eps, dtype=torch.float64), exponent).clamp_min(smallest)
    return torch.where(values == 0, smallest, steps)


def changed_rows_and_columns(before_MK: Tensor, after_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Whether any entry of each row [M] and of each column [K] changed; of a matrix with entries, some rows at a time."""
    num_rows, num_columns = before_MK.shape
    rows_M, columns_K = torch.zeros(num_rows, dtype=torch.bool), torch.zeros(num_columns, dtype=torch.bool)
    step = max(1, CHUNK // num_columns)
    for low in range(0, num_rows, step):
        rows = slice(low, low + step)
        # Of bytes, the largest takes a twentieth of the time of `any`.
        changed = (bits(before_MK[rows]) != bits(after_MK[rows])).view(torch.uint8)
        rows_M[rows] = changed.amax(1).bool()
        columns_K |= changed.amax(0).bool()
    return rows_M, columns_K


def changed_grid(before_MK: Tensor, after_MK: Tensor, *, size: int = 96) -> Tensor:
    """A picture of which entries changed: their share in each cell of a grid of at most `size` by `size`, row by row."""
    changed_MK = (bits(before_MK) != bits(after_MK)).float()
    cells = (min(size, changed_MK.shape[0]), min(size, changed_MK.shape[1]))
    return torch.nn.functional.adaptive_avg_pool2d(changed_MK[None], cells)[0]
