"""An analysis for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlpost.analysis.measure import Comparison, Pooled, Update, WeightRow, by_kind, by_layer, pool
from rlpost.core.sparsity import Sparsity

ENTRY_COLUMNS = ("unchanged", "predicted", "<= 1e-5", "rms update")


def render(rows: Sequence[WeightRow]) -> Group:
    """A line per kind of weight and then per layer: entries pooled, ranks as the mean of its matrices'."""
    groups = {kind: pool(of_kind) for kind, of_kind in by_kind(rows).items()}
    entries = new_table("update, by entry", ["weights", "entries", *ENTRY_COLUMNS])
    for kind, found in groups.items():
        _add(entries, kind, str(found.num_weights), f"{found.sparsity.numel:,}", *_entry_cells(found.sparsity))
    tables = [entries, *_directions(groups), _layers(rows)]
    return Group(*(table for table in tables if table.row_count))


def render_comparison(comparison: Comparison, first: Update, second: Update) -> Group:
    """A line per kind of weight: what two updates share, then what chance and chance among like magnitudes would give; and
    how far the two models are the same, beside how far each is the one before."""
    title = f"entries that {comparison.first} and {comparison.second} changed, of those of the first"
    shared = new_table(title, ["changed", "and", "shared", "chance", "matched", "Jaccard", "matched"])
    for kind, found in comparison.overlaps.items():
        shares = (found.first / found.numel, found.second / found.numel) if found.numel else (0.0, 0.0)
        shares += tuple(found.of_first(count) for count in (found.both, found.uniform, found.matched))
        shares += tuple(found.jaccard(count) for count in (found.both, found.matched))
        _add(shared, kind, *map(_percent, shares))
    title = f"entries equal in {comparison.first} and {comparison.second}, beside those that each left as before"
    agreed = new_table(title, ["equal", "<= 1e-5", "1st left", "<= 1e-5", "2nd left", "<= 1e-5", "cosine"])
    left = [by_kind(update.rows) for update in (first, second)]
    for kind, found in comparison.agreements.items():
        pairs = [found.difference, *(pool(kinds[kind]).sparsity for kinds in left)]
        shares = [pair.share(count) for pair in pairs for count in (pair.bit_equal, pair.within[1e-5])]
        _add(agreed, kind, *map(_percent, shares), "" if found.cosine is None else f"{found.cosine:z.3f}")
    return Group(shared, agreed)


def _directions(groups: Mapping[str, Pooled]) -> list[Table]:
    """Of matrices whose rank was asked for; with spectra, beside their controls."""
    if all(found.spectrum is None for found in groups.values()):
        ranks = new_table("update, by direction", ["rank"])
        for kind, found in groups.items():
            if found.rank is not None:
                _add(ranks, kind, _percent(found.rank))
        return [ranks]
    title = "update, by direction; null: its directions with 90 % of the energy, rounded"
    ranks = new_table(title, ["rank", "null", "entropy", "null", "energy-90", "shift", "intruders"])
    title = "entries that changed, and of those the principal and the smallest before"
    masks = new_table(title, ["changed", "chance", "principal", "matched", "smallest", "matched"])
    for kind, found in groups.items():
        if (spectrum := found.spectrum) is not None and found.rank is not None:
            shares = (found.rank, spectrum.null_numerical, spectrum.entropy, spectrum.null_entropy, spectrum.energy_90)
            shift = "" if spectrum.shift is None else f"{spectrum.shift:.1e}"
            _add(ranks, kind, *map(_percent, shares), shift, str(spectrum.intruders))
            principal, smallest = spectrum.principal, spectrum.low_magnitude
            shares = (principal.first / principal.numel, principal.of_first(principal.uniform))
            shares += tuple(part.of_first(n) for part in (principal, smallest) for n in (part.both, part.matched))
            _add(masks, kind, *map(_percent, shares))
    return [ranks, masks]


def _layers(rows: Sequence[WeightRow]) -> Table:
    layers = {layer: pool(of_layer) for layer, of_layer in by_layer(rows).items()}
    columns = {
        "rank": {layer: found.rank for layer, found in layers.items()},
        "entropy rank": {layer: found.spectrum and found.spectrum.entropy for layer, found in layers.items()},
    }
    known = {name: shares for name, shares in columns.items() if any(share is not None for share in shares.values())}
    table = new_table("update, by layer", [*ENTRY_COLUMNS, *known])
    for layer, found in layers.items():
        shares = (of_layer[layer] for of_layer in known.values())
        table.add_row(
            str(layer),
            *_entry_cells(found.sparsity),
            *("" if share is None else _percent(share) for share in shares),
        )
    return table


def new_table(title: str | None, columns: Sequence[str]) -> Table:
    """The first column has the names of the rows; the others are aligned on the right."""
    table = Table(title=None if title is None else Text(title), title_justify="left", box=None, pad_edge=False)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table


def _add(table: Table, kind: str, *cells: str) -> None:
    """Under a rule, "all"."""
    if kind == "all":
        table.add_section()
    table.add_row(kind, *cells)


def _entry_cells(total: Sparsity) -> list[str]:
    shares = (total.bit_equal, total.predicted, total.within[1e-5])
    return [*(f"{100 * total.share(count):.2f} %" for count in shares), f"{total.rms_update:.2e}"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
