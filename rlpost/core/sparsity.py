"""How many entries of a weight an update left as they were, by bits and by tolerance, and how many it should have by arithmetic.

Source: Mukherjee et al., "Reinforcement Learning Finetunes Small Subnetworks in Large Language Models" (arXiv 2505.11711):
section 3 for the definition, table 6 for the tolerances; their code takes the difference in the stored dtype. The relative
probe is that of "The Path Not Taken" (arXiv 2511.08567). N entries, [M, K] a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

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


class UpdateCounts:
    """Of one weight, given in pieces as `in_pieces` makes them; it keeps a flag for each row and column, and a sample.

    Example:
        counts = UpdateCounts(before.shape)
        for old_N, new_N in zip(in_pieces(before), in_pieces(after), strict=True):
            counts.add(old_N, new_N)
        counts.sparsity()
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape, self._numel, self._num_given = shape, shape.numel(), 0
        self._num_changed, self._relative, self._squared = 0, 0, 0.0
        self._beyond = dict.fromkeys(TOLERANCES, 0)
        self._sample: list[Tensor] = []
        self.is_matrix = len(shape) == 2 and self._numel > 0
        if self.is_matrix:
            self.rows_M, self.columns_K = (torch.zeros(size, dtype=torch.bool) for size in shape)
            """Of a matrix: whether any entry of the row, or of the column, changed."""

    def add(self, before_N: Tensor, after_N: Tensor) -> Tensor:
        """Count the next entries; only changed ones are subtracted.

        Returns:
            [N] bool: which of them changed.

        Raises:
            ValueError: when a changed entry is not finite.
        """
        start, stride = self._num_given, max(1, self._numel // NULL_SAMPLE)
        self._num_given += len(before_N)
        self._sample.append(before_N[-start % stride :: stride].clone())
        changed_N = bits(before_N) != bits(after_N)
        if self.is_matrix:
            self._add_rows_and_columns(start, changed_N)
        # numpy's flatnonzero, as torch's takes twice to nine times as long.
        changed = torch.from_numpy(np.flatnonzero(changed_N.numpy()))
        old, new = before_N[changed], after_N[changed]
        difference = (new - old).abs()
        if not difference.isfinite().all():
            raise ValueError("an entry changed to or from a value that is not finite, or by more than the dtype holds")
        self._num_changed += len(old)
        for tolerance in TOLERANCES:
            self._beyond[tolerance] += int((difference > torch.tensor(tolerance, dtype=old.dtype)).sum())
        old, new = old.double(), new.double()
        exact = (new - old).abs()
        self._relative += int((exact > RELATIVE * torch.maximum(new.abs(), old.abs())).sum())
        self._squared += float(exact.square().sum())
        return changed_N

    def sparsity(self) -> Sparsity:
        """Once every entry was given."""
        assert self._num_given == self._numel
        rms = math.sqrt(self._squared / self._numel) if self._numel else 0.0
        return Sparsity(
            numel=self._numel,
            bit_equal=self._numel - self._num_changed,
            within={tolerance: self._numel - count for tolerance, count in self._beyond.items()},
            within_relative=self._numel - self._relative,
            squared_update=self._squared,
            predicted=self._numel * (absorption_null(torch.cat(self._sample), rms) if rms else 1.0),
        )

    def _add_rows_and_columns(self, start: int, changed_N: Tensor) -> None:
        num_columns = self.shape[1]
        first, stop = start // num_columns, -(-self._num_given // num_columns)
        ends = (start - first * num_columns, stop * num_columns - self._num_given)
        # Of bytes, the largest takes a twentieth of the time of `any`.
        changed_RK = pad(changed_N.view(torch.uint8), ends).view(-1, num_columns)
        self.rows_M[first:stop] |= changed_RK.amax(1).bool()
        self.columns_K |= changed_RK.amax(0).bool()


def in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Its entries in row-major order, CHUNK at a time."""
    flat_N = tensor.detach().flatten()
    return (flat_N[low : low + CHUNK] for low in range(0, len(flat_N), CHUNK))


def sparsity(before: Tensor, after: Tensor) -> Sparsity:
    """Of one weight.

    Raises:
        ValueError: when shapes or dtypes differ, they are no floating-point numbers, or a changed entry is not finite.
    """
    if not before.is_floating_point():
        raise ValueError(f"{before.dtype} is no dtype of weights")
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        raise ValueError(
            f"{before.dtype} {tuple(before.shape)} and {after.dtype} {tuple(after.shape)} cannot be compared entry by entry"
        )
    counts = UpdateCounts(torch.Size((before.numel(),)))
    for old_N, new_N in zip(in_pieces(before), in_pieces(after), strict=True):
        counts.add(old_N, new_N)
    return counts.sparsity()


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
    # Spacing is the exponent's alone, and there are few of them.
    num_fraction_bits = round(-math.log2(torch.finfo(before_N.dtype).eps))
    num_exponents = 1 << (8 * before_N.element_size() - 1 - num_fraction_bits)
    powers = (torch.arange(num_exponents) << num_fraction_bits).to(bits(before_N).dtype).view(before_N.dtype)
    absorbed = torch.erf(spacing(powers) / (2 * math.sqrt(2) * rms_update))
    return float(absorbed[(bits(before_N) >> num_fraction_bits).long() & (num_exponents - 1)].mean())


def spacing(values: Tensor) -> Tensor:
    """float64: the distance from each value's magnitude to the next larger one of its dtype."""
    info = torch.finfo(values.dtype)
    smallest = info.smallest_normal * info.eps
    exponent = torch.frexp(values.double())[1] - 1
    steps = torch.ldexp(torch.full(values.shape, info.eps, dtype=torch.float64), exponent).clamp_min(smallest)
    return torch.where(values == 0, smallest, steps)


def changed_grid(changed_MK: Tensor, *, size: int = 96) -> Tensor:
    """A picture of which entries changed: their share in each cell of a grid of at most `size` by `size`, row by row."""
    num_rows, num_columns = changed_MK.shape
    down, across = min(size, num_rows), min(size, num_columns)
    edges = [(num_rows * row // down, -(-num_rows * (row + 1) // down)) for row in range(down)]
    return torch.cat([adaptive_avg_pool2d(changed_MK[None, low:high].float(), (1, across))[0] for low, high in edges])
