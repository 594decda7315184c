"""An analysis for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlpost.analysis.measure import Comparison, MeanSpectrum, WeightRow, by_kind, by_layer, pool
from rlpost.core.sparsity import Sparsity

ENTRY_COLUMNS = ("unchanged", "predicted", "<= 1e-5", "rms update")
RANK_COLUMNS = ("rank", "entropy rank", "energy-90 rank")


def render(rows: Sequence[WeightRow]) -> Group:
    """A line per kind of weight and then per layer: entries pooled, ranks as the mean of its matrices'."""
    entries = _table("update, by entry", ["weights", "entries", *ENTRY_COLUMNS])
    spectra = _table("update, by direction", [*RANK_COLUMNS, "spectral shift", "intruders"])
    for kind, of_kind in by_kind(rows).items():
        if kind == "all":
            entries.add_section()
            spectra.add_section()
        found = pool(of_kind)
        entries.add_row(kind, str(found.num_weights), f"{found.sparsity.numel:,}", *_entry_cells(found.sparsity))
        if found.spectrum is not None:
            shift = "" if found.spectrum.shift is None else f"{found.spectrum.shift:.1e}"
            spectra.add_row(kind, *_rank_cells(found.spectrum), shift, str(found.spectrum.intruders))
    return Group(*(table for table in (entries, spectra, _layers(rows)) if table.row_count))


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


def _layers(rows: Sequence[WeightRow]) -> Table:
    layers = {layer: pool(of_layer) for layer, of_layer in by_layer(rows).items()}
    decomposed = any(found.spectrum is not None for found in layers.values())
    table = _table("update, by layer", [*ENTRY_COLUMNS, *(RANK_COLUMNS[:2] if decomposed else ())])
    for layer, found in layers.items():
        ranks = [] if found.spectrum is None else _rank_cells(found.spectrum)[:2]
        table.add_row(str(layer), *_entry_cells(found.sparsity), *ranks)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table


def _entry_cells(total: Sparsity) -> list[str]:
    shares = (total.bit_equal, total.predicted, total.within[1e-5])
    return [*(f"{100 * total.share(count):.2f} %" for count in shares), f"{total.rms_update:.2e}"]


def _rank_cells(spectrum: MeanSpectrum) -> list[str]:
    return [f"{100 * share:.1f} %" for share in (spectrum.numerical, spectrum.entropy, spectrum.energy_90)]
