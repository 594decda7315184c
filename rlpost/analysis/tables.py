"""An analysis for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlpost.analysis.measure import Comparison, Spectrum, WeightRow, by_kind
from rlpost.core.sparsity import pooled


def render(rows: Sequence[WeightRow]) -> Group:
    """A line per kind of weight, entries pooled, ranks as the mean of its matrices'."""
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


def render_comparison(comparison: Comparison) -> Table:
    """A line per kind of weight: what two updates share, then what chance and chance among like magnitudes would give."""
    title = f"entries that {comparison.first} and {comparison.second} changed, of those of the first"
    table = _table(title, ["changed", "and", "shared", "chance", "matched", "Jaccard", "matched"])
    for kind, found in comparison.kinds.items():
        if kind == "all":
            table.add_section()
        shares = (found.first / found.numel, found.second / found.numel) if found.numel else (0.0, 0.0)
        shares += tuple(found.of_first(count) for count in (found.both, found.uniform, found.matched))
        shares += tuple(found.jaccard(count) for count in (found.both, found.matched))
        table.add_row(kind, *(f"{100 * share:.1f} %" for share in shares))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
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
