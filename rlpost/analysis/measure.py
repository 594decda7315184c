"""Which weights updates moved, what shape each update has, and what several have in common: one pass over their versions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rlpost.analysis.stored import Versions, open_versions
from rlpost.core.agreement import Agreement, agreement, pooled_agreement
from rlpost.core.overlap import Overlap, overlap, overlap_with_mask, pooled_overlap
from rlpost.core.patch import naming
from rlpost.core.rank import numerical_rank
from rlpost.core.sparsity import (
    RELATIVE,
    TOLERANCES,
    Sparsity,
    UpdateCounts,
    changed_grid,
    in_pieces,
    pooled,
)
from rlpost.core.spectrum import (
    Ranks,
    decompose,
    intruder_dimensions,
    principal_cosines,
    ranks,
    rounded_approximation,
    singular_values,
    spectral_shift,
)
from rlpost.core.subnetwork import low_magnitude_mask, principal_mask
from rlpost.core.weights import dtype_name, in_model_order, weight_kind, weight_layer

TOP = 10
"""Leading directions that are compared."""
PRINCIPAL = 0.1
"""Principal entries are the largest of an approximation of this share of full rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """Of the update to one matrix, and of what it did to the matrix."""

    ranks: Ranks
    singular_values: tuple[float, ...]
    """Of the float32 difference, descending."""
    shift: float | None
    """`core.spectrum.spectral_shift`."""
    smallest_cosine: float
    """Of the angles between the top directions before and after."""
    intruders: int
    """Intruder dimensions among the top directions."""
    null_ranks: Ranks
    """Of the rounding null: as if the update had been its best approximation of rank `ranks.energy_90`, and then been
    rounded; see `core.spectrum.rounded_approximation`."""
    principal: Overlap
    """Of the changed entries with as many principal ones of the matrix before (LIFT)."""
    low_magnitude: Overlap
    """With as many that were smallest before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRow:
    """What an update did to one weight of the model.

    Example:
        WeightRow(name="model.layers.0.mlp.up_proj.weight", kind="up", layer=0, shape=(344, 128), dtype="bfloat16", ...)
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    sparsity: Sparsity
    untouched_rows: int | None
    """Rows without a changed entry; None of anything but a matrix."""
    untouched_columns: int | None
    rank: int | None
    """Numerical, of the update to a matrix; None where neither it nor spectra were asked for."""
    spectrum: Spectrum | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """From the version that all began with to one of the others."""

    after: str
    """Where that lies, as it was given."""
    rows: tuple[WeightRow, ...]
    notes: tuple[str, ...]
    """What is not compared as it stands; see `stored.Versions`."""
    pictures: Mapping[str, Tensor]
    """`core.sparsity.changed_grid` of the matrices of the layer in the middle of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two updates share, by kind of weight, then of "all".

    The version that both began with agrees with either in what that left unchanged: that is in their rows.
    """

    first: str
    second: str
    overlaps: Mapping[str, Overlap]
    agreements: Mapping[str, Agreement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """One or more updates of one model, and every two of them compared."""

    before: str
    updates: tuple[Update, ...]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Untouched:
    """Shares of the rows and columns of matrices without a changed entry."""

    rows: float
    columns: float
    chance_rows: float
    """The same if as many entries of each matrix were changed, evenly spread: (unchanged share) ^ (entries of a row)."""
    chance_columns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanSpectrum:
    """Of several matrices, each counting alike."""

    num_matrices: int
    entropy: float
    """Ranks here are shares of the most there could be."""
    energy_90: float
    null_numerical: float
    null_entropy: float
    shift: float | None
    smallest_cosine: float
    """The smallest of any of them."""
    intruders: int
    """In all of them."""
    principal: Overlap
    """Pooled, as `low_magnitude`: here each entry counts alike."""
    low_magnitude: Overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """Several weights, such as those of a kind or of a layer."""

    num_weights: int
    sparsity: Sparsity
    untouched: Untouched | None
    """None without a matrix."""
    rank: float | None
    """Numerical, as a share of the most there could be: the mean of the matrices that have one."""
    spectrum: MeanSpectrum | None
    """None without a matrix that was decomposed."""


def analyze(
    before: str, after: Sequence[str], *, dtype: torch.dtype | None = None, rank: bool = False, spectra: bool = False
) -> Analysis:
    """Every weight of the versions; of those in files a piece of one is in memory at a time, or one weight of each where ranks,
    spectra or several updates are asked for.

    Args:
        before, after: as `open_version` takes them.
        dtype: what all are rounded to first, such as the one that samplers serve; None: as they are stored.
        rank: the numerical rank of each matrix's update too, which seldom takes a decomposition.
        spectra: every rank and the geometry, which take several.

    Raises:
        ValueError: as `stored.open_versions`; or naming a weight that is not finite.
    """
    return measure(open_versions([before, *after], dtype=dtype), rank=rank, spectra=spectra)


def measure(versions: Versions, *, rank: bool = False, spectra: bool = False, largest: int | None = None) -> Analysis:
    """As `analyze`, of opened versions.

    Args:
        largest: matrices with more singular values are not decomposed; None: all are, if `spectra`.
    """
    before, *after = versions.places
    rows: list[list[WeightRow]] = [[] for _ in after]
    pictures: list[dict[str, Tensor]] = [{} for _ in after]
    pairs = list(itertools.combinations(range(len(after)), 2))
    shared: list[dict[str, list[tuple[Overlap, Agreement]]]] = [{} for _ in pairs]
    pictured = _middle_layer(versions.names)
    for name in versions.names:
        shape = versions.shape(name)
        counts = [UpdateCounts(shape) for _ in after]
        is_matrix = counts[0].is_matrix
        whole = versions.tensors(name) if pairs or (is_matrix and (rank or spectra)) else None
        changed: list[list[Tensor]] = [[] for _ in after]
        for base_N, *others_N in versions.pieces(name) if whole is None else zip(*map(in_pieces, whole), strict=True):
            for index, other_N in enumerate(others_N):
                with naming(f"{before} and {after[index]}: {name}"):
                    changed_N = counts[index].add(base_N, other_N)
                if is_matrix and name in pictured:
                    changed[index].append(changed_N)
        small = largest is None or min(shape, default=0) <= largest
        for index, where in enumerate(after):
            if changed[index]:
                pictures[index][name] = changed_grid(torch.cat(changed[index]).view(shape))
            pair = (whole[0], whole[1 + index]) if whole is not None and is_matrix else None
            with naming(f"{before} and {where}: {name}"):
                row = _row(name, versions.dtype(name), counts[index], pair, rank=rank, spectra=spectra and small)
            rows[index].append(row)
        for kinds, (first, second) in zip(shared, pairs, strict=True):
            assert whole is not None
            three = whole[0], whole[1 + first], whole[1 + second]
            with naming(f"{after[first]} and {after[second]}: {name}"):
                found = overlap(*three), agreement(*three)
            kinds.setdefault(weight_kind(name), []).append(found)
    return Analysis(
        before=before,
        updates=tuple(
            Update(after=where, rows=tuple(found), notes=tuple(notes), pictures=drawn)
            for where, found, notes, drawn in zip(after, rows, versions.notes[1:], pictures, strict=True)
        ),
        comparisons=tuple(
            _comparison(after[first], after[second], kinds)
            for kinds, (first, second) in zip(shared, pairs, strict=True)
        ),
    )


def by_kind(rows: Sequence[WeightRow]) -> dict[str, list[WeightRow]]:
    """The rows of each kind of weight, in the order of a model; then all of them under "all"."""
    kinds = in_model_order({row.kind for row in rows})
    return {kind: [row for row in rows if row.kind == kind] for kind in kinds} | {"all": list(rows)}


def by_layer(rows: Sequence[WeightRow]) -> dict[int, list[WeightRow]]:
    """The rows of each layer, in order; those of no layer are left out."""
    layers = sorted({row.layer for row in rows if row.layer is not None})
    return {layer: [row for row in rows if row.layer == layer] for layer in layers}


def pool(rows: Sequence[WeightRow]) -> Pooled:
    ranks_of_full = [row.rank / min(row.shape) for row in rows if row.rank is not None]
    return Pooled(
        num_weights=len(rows),
        sparsity=pooled(row.sparsity for row in rows),
        untouched=_untouched([row for row in rows if row.untouched_rows is not None]),
        rank=fmean(ranks_of_full) if ranks_of_full else None,
        spectrum=_mean_spectrum([row.spectrum for row in rows if row.spectrum is not None]),
    )


def plain(analysis: Analysis) -> dict[str, Any]:
    """Every figure as plain data, for JSON: of each update pooled by kind and of each weight, and the comparisons."""
    return {
        "before": analysis.before,
        "tolerances": TOLERANCES,
        "relative": RELATIVE,
        "updates": {
            update.after: {
                "notes": update.notes,
                "kinds": {kind: _plain_pooled(pool(rows)) for kind, rows in by_kind(update.rows).items()},
                "weights": [asdict(row) | {"sparsity": _plain(row.sparsity)} for row in update.rows],
            }
            for update in analysis.updates
        },
        "comparisons": [
            asdict(found) | {"agreements": {kind: _plain_agreement(a) for kind, a in found.agreements.items()}}
            for found in analysis.comparisons
        ],
    }


def _row(
    name: str,
    dtype: torch.dtype,
    counts: UpdateCounts,
    matrices: tuple[Tensor, Tensor] | None,
    *,
    rank: bool,
    spectra: bool,
) -> WeightRow:
    """`matrices`, before and after, where rank or spectra are asked for."""
    found = counts.sparsity()
    spectrum = _spectrum(*matrices, changed=found.numel - found.bit_equal) if spectra and matrices is not None else None
    numerical = None if spectrum is None else spectrum.ranks.numerical
    if rank and matrices is not None and spectrum is None:
        numerical = numerical_rank(matrices[1].float() - matrices[0].float())
    return WeightRow(
        name=name,
        kind=weight_kind(name),
        layer=weight_layer(name),
        shape=tuple(counts.shape),
        dtype=dtype_name(dtype),
        sparsity=found,
        untouched_rows=int((~counts.rows_M).sum()) if counts.is_matrix else None,
        untouched_columns=int((~counts.columns_K).sum()) if counts.is_matrix else None,
        rank=numerical,
        spectrum=spectrum,
    )


def _middle_layer(names: Sequence[str]) -> set[str]:
    """Weights of the layer in the middle; of no layer, where a model has none."""
    layers = {name: weight_layer(name) for name in names}
    numbers = sorted({layer for layer in layers.values() if layer is not None})
    middle = numbers[len(numbers) // 2] if numbers else None
    return {name for name, layer in layers.items() if layer == middle}


def _comparison(first: str, second: str, of_kind: Mapping[str, Sequence[tuple[Overlap, Agreement]]]) -> Comparison:
    groups = {kind: of_kind[kind] for kind in in_model_order(of_kind)}
    groups["all"] = [part for parts in of_kind.values() for part in parts]
    return Comparison(
        first=first,
        second=second,
        overlaps={kind: pooled_overlap(shared for shared, _ in parts) for kind, parts in groups.items()},
        agreements={kind: pooled_agreement(agreed for _, agreed in parts) for kind, parts in groups.items()},
    )


def _spectrum(before_MK: Tensor, after_MK: Tensor, *, changed: int) -> Spectrum:
    shape = (before_MK.shape[0], before_MK.shape[1])
    sigma_R = singular_values(before_MK, after_MK)
    found = ranks(sigma_R, shape)
    null_MK = rounded_approximation(before_MK, after_MK, found.energy_90)
    old, new = decompose(before_MK), decompose(after_MK)
    rank, density = max(1, round(PRINCIPAL * found.full)), changed / before_MK.numel()
    principal_MK = principal_mask(before_MK, rank=rank, density=density, left_MR=old.left_MR)
    return Spectrum(
        ranks=found,
        singular_values=tuple(sigma_R.tolist()),
        shift=spectral_shift(old, new),
        smallest_cosine=float(principal_cosines(old, new, TOP)[-1]),
        intruders=intruder_dimensions(old, new, k=TOP),
        null_ranks=ranks(singular_values(before_MK, null_MK), shape),
        principal=overlap_with_mask(before_MK, after_MK, principal_MK),
        low_magnitude=overlap_with_mask(before_MK, after_MK, low_magnitude_mask(before_MK, density=density)),
    )


def _untouched(matrices: Sequence[WeightRow]) -> Untouched | None:
    if not matrices:
        return None
    num_rows, num_columns = (sum(row.shape[axis] for row in matrices) for axis in (0, 1))
    return Untouched(
        rows=sum(row.untouched_rows or 0 for row in matrices) / num_rows,
        columns=sum(row.untouched_columns or 0 for row in matrices) / num_columns,
        chance_rows=sum(row.shape[0] * row.sparsity.unchanged ** row.shape[1] for row in matrices) / num_rows,
        chance_columns=sum(row.shape[1] * row.sparsity.unchanged ** row.shape[0] for row in matrices) / num_columns,
    )


def _mean_spectrum(spectra: Sequence[Spectrum]) -> MeanSpectrum | None:
    if not spectra:
        return None
    shifts = [spectrum.shift for spectrum in spectra if spectrum.shift is not None]
    return MeanSpectrum(
        num_matrices=len(spectra),
        entropy=fmean(s.ranks.entropy / s.ranks.full for s in spectra),
        energy_90=fmean(s.ranks.energy_90 / s.ranks.full for s in spectra),
        null_numerical=fmean(s.null_ranks.numerical / s.ranks.full for s in spectra),
        null_entropy=fmean(s.null_ranks.entropy / s.ranks.full for s in spectra),
        shift=fmean(shifts) if shifts else None,
        smallest_cosine=min(s.smallest_cosine for s in spectra),
        intruders=sum(s.intruders for s in spectra),
        principal=pooled_overlap(s.principal for s in spectra),
        low_magnitude=pooled_overlap(s.low_magnitude for s in spectra),
    )


def _plain_pooled(found: Pooled) -> dict[str, Any]:
    spectrum = None if found.spectrum is None else asdict(found.spectrum)
    return _plain(found.sparsity) | {"rank": found.rank, "spectrum": spectrum}


def _plain_agreement(found: Agreement) -> dict[str, Any]:
    return asdict(found) | {"difference": _plain(found.difference), "cosine": found.cosine}


def _plain(counts: Sparsity) -> dict[str, Any]:
    return asdict(counts) | {
        "within": {f"{tolerance:g}": count for tolerance, count in counts.within.items()},
        "unchanged": counts.unchanged,
        "rms_update": counts.rms_update,
    }
