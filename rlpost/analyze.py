"""Which weights an update moved, and what shape it has: two versions of a model, compared one weight at a time.

A version is a model directory, or RUN@N: version N of the archive in a run's directory.

`core.sparsity`, `core.spectrum` and `core.overlap` have the measures; here they are streamed over files, pooled by kind of
weight, and shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlpost.archive import VERSIONS, VersionArchive
from rlpost.core.overlap import Overlap, overlap, pooled_overlap
from rlpost.core.sparsity import RELATIVE, TOLERANCES, Sparsity, changed_rows_and_columns, pooled, sparsity
from rlpost.core.spectrum import (
    Ranks,
    decompose,
    intruder_dimensions,
    principal_cosines,
    ranks,
    singular_values,
    spectral_shift,
)
from rlpost.core.weights import in_model_order, weight_kind, weight_layer
from rlpost.engines.pretrained import StoredTensors, check_weights

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

TOP = 10
"""Leading directions that are compared."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRow:
    """One weight of the model.

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
    spectrum: Spectrum | None


def analyze(before: Path, after: Path, *, dtype: torch.dtype | None = None, spectra: bool = False) -> list[WeightRow]:
    """Every weight of two versions of a model; of directories, one weight of each is in memory at a time.

    Args:
        dtype: what both are rounded to first, such as the one that samplers serve; None: as they are stored.

    Raises:
        ValueError: when a version has no whole weights; naming the weight, when only one has it, shapes or dtypes differ, or
            it is not finite.
    """
    old, new = _open(before, after)
    return [_row(name, _read(old, name, dtype), _read(new, name, dtype), spectra=spectra) for name in old.names]


def compare(before: Path, first: Path, second: Path, *, dtype: torch.dtype | None = None) -> dict[str, Overlap]:
    """By kind of weight, and of "all", what two updates of one model have in common.

    Raises:
        ValueError: as `analyze`.
    """
    old, one, other = _open(before, first, second)
    of_kind: dict[str, list[Overlap]] = {}
    for name in old.names:
        tensors = [_read(stored, name, dtype) for stored in (old, one, other)]
        if len({(tensor.shape, tensor.dtype) for tensor in tensors}) != 1:
            raise ValueError(f"{name} differs in shape or dtype between {before}, {first} and {second}")
        of_kind.setdefault(weight_kind(name), []).append(overlap(*tensors))
    every = [part for parts in of_kind.values() for part in parts]
    return {kind: pooled_overlap(of_kind[kind]) for kind in in_model_order(of_kind)} | {"all": pooled_overlap(every)}


class _Archived:
    """A version of a run's archive, whole in memory, with the face of `StoredTensors`."""

    def __init__(self, run_dir: Path, version: int) -> None:
        self._tensors = VersionArchive(run_dir / VERSIONS).rebuild(version).tensors

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def _open(*paths: Path) -> list[StoredTensors | _Archived]:
    """The versions, which hold weights of the same names."""
    opened = [_open_one(path) for path in paths]
    for path, stored in zip(paths[1:], opened[1:], strict=True):
        if lonely := sorted(set(opened[0].names) ^ set(stored.names)):
            where = paths[0] if lonely[0] in opened[0].names else path
            raise ValueError(
                f"{lonely[0]} is only in {where} ({len(lonely)} such weights): compare two versions of one model"
            )
    return opened


def _open_one(path: Path) -> StoredTensors | _Archived:
    run, at, version = str(path).rpartition("@")
    if at and version.isdecimal() and not path.exists():
        return _Archived(Path(run), int(version))
    check_weights(path)
    return StoredTensors(path)


def _read(stored: StoredTensors | _Archived, name: str, dtype: torch.dtype | None) -> Tensor:
    tensor = stored.tensor(name)
    return tensor if dtype is None else tensor.to(dtype)


def _row(name: str, before: Tensor, after: Tensor, *, spectra: bool) -> WeightRow:
    try:
        counts = sparsity(before, after)
    except ValueError as error:
        remedy = ". Give the dtype to compare them in (--dtype)" if before.dtype != after.dtype else ""
        raise ValueError(f"{name}: {error}{remedy}") from error
    is_matrix = before.ndim == 2 and before.numel() > 0
    untouched = (
        [int((share == 0).sum()) for share in changed_rows_and_columns(before, after)] if is_matrix else [None] * 2
    )
    return WeightRow(
        name=name,
        kind=weight_kind(name),
        layer=weight_layer(name),
        shape=tuple(before.shape),
        dtype=str(before.dtype).removeprefix("torch."),
        sparsity=counts,
        untouched_rows=untouched[0],
        untouched_columns=untouched[1],
        spectrum=_spectrum(before, after) if spectra and is_matrix else None,
    )


def _spectrum(before_MK: Tensor, after_MK: Tensor) -> Spectrum:
    sigma_R = singular_values(before_MK, after_MK)
    old, new = decompose(before_MK), decompose(after_MK)
    return Spectrum(
        ranks=ranks(sigma_R, (before_MK.shape[0], before_MK.shape[1])),
        singular_values=tuple(sigma_R.tolist()),
        shift=spectral_shift(old, new),
        smallest_cosine=float(principal_cosines(old, new, TOP)[-1]),
        intruders=intruder_dimensions(old, new, k=TOP),
    )


def by_kind(rows: Sequence[WeightRow]) -> dict[str, list[WeightRow]]:
    """The rows of each kind of weight, in the order of a model; then all of them under "all"."""
    kinds = in_model_order({row.kind for row in rows})
    return {kind: [row for row in rows if row.kind == kind] for kind in kinds} | {"all": list(rows)}


def render(rows: Sequence[WeightRow]) -> Group:
    """For a terminal of 80 columns: a line per kind of weight, entries pooled, ranks as the mean of its matrices'."""
    from rich.console import Group

    entries = _table("update, by entry", ["weights", "entries", "unchanged", "predicted", "<= 1e-5", "rms update"])
    spectra = _table("update, by direction", ["rank", "entropy rank", "energy-90 rank", "spectral shift", "intruders"])
    for kind, of_kind in by_kind(rows).items():
        if kind == "all":
            entries.add_section()
            spectra.add_section()
        entries.add_row(kind, *_entry_cells(of_kind))
        if found := [row.spectrum for row in of_kind if row.spectrum is not None and row.spectrum.ranks.full]:
            spectra.add_row(kind, *_spectrum_cells(found))
    return Group(*(table for table in (entries, spectra) if table.row_count))


def render_overlaps(overlaps: Mapping[str, Overlap], title: str) -> Table:
    """A line per kind of weight: what two updates share, then what chance and chance among like magnitudes would give."""
    table = _table(title, ["changed", "and", "shared", "chance", "matched", "Jaccard", "matched"])
    for kind, found in overlaps.items():
        if kind == "all":
            table.add_section()
        shares = (found.first / found.numel, found.second / found.numel) if found.numel else (0.0, 0.0)
        shares += tuple(found.of_first(count) for count in (found.both, found.uniform, found.matched))
        shares += tuple(found.jaccard(count) for count in (found.both, found.matched))
        table.add_row(kind, *(f"{100 * share:.1f} %" for share in shares))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table


def _entry_cells(rows: Sequence[WeightRow]) -> list[str]:
    total = pooled(row.sparsity for row in rows)
    shares = (total.bit_equal, total.predicted, total.within[1e-5])
    return [
        str(len(rows)),
        f"{total.numel:,}",
        *(f"{100 * total.share(count):.2f} %" for count in shares),
        f"{total.rms_update:.2e}",
    ]


def _spectrum_cells(spectra: Sequence[Spectrum]) -> list[str]:
    shifts = [s.shift for s in spectra if s.shift is not None]
    shares = (
        fmean(getattr(s.ranks, key) / s.ranks.full for s in spectra) for key in ("numerical", "entropy", "energy_90")
    )
    return [
        *(f"{100 * share:.1f} %" for share in shares),
        f"{fmean(shifts):.1e}" if shifts else "",
        str(sum(s.intruders for s in spectra)),
    ]


def figures(rows: Sequence[WeightRow]) -> dict[str, Any]:
    """Every figure as plain data: pooled by kind, and of each weight."""
    return {
        "tolerances": TOLERANCES,
        "relative": RELATIVE,
        "kinds": {kind: _plain(pooled(r.sparsity for r in of_kind)) for kind, of_kind in by_kind(rows).items()},
        "weights": [asdict(row) | {"sparsity": _plain(row.sparsity)} for row in rows],
    }


def _plain(counts: Sparsity) -> dict[str, Any]:
    return asdict(counts) | {
        "within": {f"{tolerance:g}": count for tolerance, count in counts.within.items()},
        "unchanged": counts.unchanged,
        "rms_update": counts.rms_update,
    }
