"""An analysis as matplotlib figures, by the names that their files have; `style.py` has what is common to all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from rlpost.analysis.measure import Analysis, Pooled, Update, WeightRow, by_kind, pool
from rlpost.analysis.names import short_names
from rlpost.analysis.style import (
    BLUE,
    EXPECTED,
    GREEN,
    INK,
    KINDS,
    MARKERS,
    MASK,
    MUTED,
    OBSERVED,
    OBSERVED_TOO,
    RULE,
    SEQUENTIAL,
    UPDATES,
    VERMILION,
    WIDTH,
    clip,
    color_bar,
    grid,
    legend,
    new_figure,
    png,
    power,
    style,
    trim,
)
from rlpost.core.sparsity import RELATIVE, TOLERANCES
from rlpost.core.weights import in_model_order

History = Sequence[Mapping[str, Any]]
"""Rows of a run's analysis.jsonl: step, stage, and shares unchanged, unchanged_since_start, ever_moved, returned."""


def figures(analysis: Analysis, history: History = ()) -> dict[str, Figure]:
    """Those that the analysis has data for, in the order of a report."""
    with style():
        drawn = {
            "unchanged": _unchanged(analysis),
            "predicted": _predicted(analysis),
            "tolerances": _tolerances(analysis),
            "untouched": _untouched(analysis),
            "masks": _masks(analysis),
            "ranks": _ranks(analysis),
            "null_ranks": _null_ranks(analysis),
            "spectra": _spectra(analysis),
            "principal": _principal(analysis),
            "overlaps": _overlaps(analysis),
            "history": _history(history) if history else None,
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def heat_map(analysis: Analysis) -> bytes:
    """PNG of the unchanged entries by layer and kind."""
    with style():
        figure = _unchanged(analysis)
    assert figure is not None
    return png(figure)


def _unchanged(analysis: Analysis) -> Figure | None:
    return _by_layer_and_kind(analysis, {"unchanged entries": lambda found: found.sparsity.unchanged})


def _ranks(analysis: Analysis) -> Figure | None:
    return _by_layer_and_kind(
        analysis,
        {
            "numerical rank": lambda found: found.rank,
            "entropy rank": lambda found: None if found.spectrum is None else found.spectrum.entropy,
        },
        of=" of full",
    )


def _by_layer_and_kind(
    analysis: Analysis, measures: Mapping[str, Callable[[Pooled], float | None]], *, of: str = ""
) -> Figure | None:
    """A heat map for each update, beside each other while their layers can be told apart; for each measure a colour bar."""
    rows = analysis.updates[0].rows
    layers = sorted({row.layer for row in rows if row.layer is not None})
    if not layers:
        return None
    columns: list[int | None] = [*layers, *([None] if any(row.layer is None for row in rows) else [])]
    names = short_names([update.after for update in analysis.updates])
    found = {
        measure: [_kind_by_column(update, columns, value) for update in analysis.updates]
        for measure, value in measures.items()
    }
    found = {measure: maps for measure, maps in found.items() if any(maps)}
    if not found:
        return None
    several = len(names) > 1
    down, beside = grid(len(names), widest=max(1, 90 // len(columns)))
    kinds = len(next(iter(found.values()))[0])
    figure = new_figure(len(found) * (down * (0.62 + 0.235 * kinds) + 0.25 * several) + 0.15)
    for part, (measure, maps) in zip(figure.subfigures(len(found), 1, squeeze=False).flat, found.items(), strict=True):
        if several and of:
            part.suptitle(measure, x=0.01, ha="left", size=9.5, weight="bold")
        axes = part.subplots(down, beside, squeeze=False, sharex=True, sharey=True)
        values = np.concatenate([list(kind_rows.values()) for kind_rows in maps], axis=None)
        scale = _scale(values[np.isfinite(values)])
        for ax, kind_rows, name in zip(axes.flat, maps, names, strict=False):
            _heat_map(ax, kind_rows, columns, scale, cell_inches=7.2 / beside / len(columns))
            ax.set_title(clip(name, 80 // beside) if several else measure)
        trim(axes, len(maps), "layer")
        color_bar(
            part, axes.flat[: len(maps)], ScalarMappable(scale, SEQUENTIAL), f"{measure}{of} (%)", aspect=14 * down
        )
    return figure


def _kind_by_column(
    update: Update, columns: Sequence[int | None], value: Callable[[Pooled], float | None]
) -> dict[str, list[float]]:
    """Percent of each kind in each layer, NaN where there is none; kinds without any are left out."""
    cells: dict[tuple[str, int | None], list[WeightRow]] = {}
    for row in update.rows:
        cells.setdefault((row.kind, row.layer), []).append(row)
    shares = {cell: value(pool(of_cell)) for cell, of_cell in cells.items()}
    table = {
        kind: [math.nan if (share := shares.get((kind, column))) is None else 100 * share for column in columns]
        for kind in in_model_order({kind for kind, _ in shares})
    }
    return {kind: row for kind, row in table.items() if not all(map(math.isnan, row))}


def _heat_map(
    ax: Axes,
    kinds: Mapping[str, Sequence[float]],
    columns: Sequence[int | None],
    scale: Normalize,
    *,
    cell_inches: float,
) -> None:
    """What belongs to no layer stands apart, right of a gap."""
    values = np.array(list(kinds.values()))
    edges = [float(index) for index in range(len(columns) + 1)]
    if columns[-1] is None:
        edges = [*edges[:-1], edges[-2] + 0.4, edges[-1] + 0.4]
        values = np.insert(values, len(columns) - 1, math.nan, axis=1)
    ax.pcolormesh(edges, range(len(kinds) + 1), values, cmap=SEQUENTIAL, norm=scale, edgecolor="white", linewidth=0.6)
    centers = [index + (0.9 if column is None else 0.5) for index, column in enumerate(columns)]
    if cell_inches >= 0.5:
        for row, shares in enumerate(kinds.values()):
            for center, share in zip(centers, shares, strict=True):
                if not math.isnan(share):
                    ink = INK if sum(SEQUENTIAL(scale(share))[:3]) > 1.75 else "white"
                    ax.text(center, row + 0.5, f"{share:.1f}", color=ink, size=8, ha="center", va="center")
    ax.set(xlim=(0, centers[-1] + 0.5), ylim=(len(kinds), 0))
    ax.set_yticks([row + 0.5 for row in range(len(kinds))], list(kinds))
    every = math.ceil(0.24 / cell_inches)
    room = centers[-1] - 0.3 / cell_inches if columns[-1] is None else centers[-1]
    shown = [i for i, column in enumerate(columns) if column is None or (i % every == 0 and centers[i] <= room)]
    ax.set_xticks([centers[i] for i in shown], ["none" if columns[i] is None else str(columns[i]) for i in shown])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _predicted(analysis: Analysis) -> Figure:
    """Observed and predicted share of unchanged entries, by kind; every weight as a faint point."""

    def draw(ax: Axes, update: Update) -> list[Any]:
        groups = _kinds(update)
        for y, (rows, found) in enumerate(groups.values()):
            observed, predicted = (
                100 * found.sparsity.share(n) for n in (found.sparsity.bit_equal, found.sparsity.predicted)
            )
            ax.plot([100 * row.sparsity.unchanged for row in rows], [y] * len(rows), "|", color=BLUE, alpha=0.3, ms=7)
            ax.plot([observed, predicted], [y, y], color=MUTED, lw=1, zorder=1)
            ax.plot(predicted, y, **EXPECTED)
            ax.plot(observed, y, **OBSERVED)
        _kind_axis(ax, list(groups))
        return [
            ax.plot([], [], label="observed", **OBSERVED)[0],
            ax.plot([], [], "|", color=BLUE, alpha=0.5, ms=7, label="observed, one weight")[0],
            ax.plot([], [], label="absorption null", **EXPECTED)[0],
        ]

    return _panels(analysis, draw, "unchanged entries (%)")


def _untouched(analysis: Analysis) -> Figure | None:
    """Rows and columns without a changed entry, by kind, beside what evenly spread changes would leave."""
    if not any(row.untouched_rows is not None for row in analysis.updates[0].rows):
        return None

    def draw(ax: Axes, update: Update) -> list[Any]:
        groups = {k: found.untouched for k, (_, found) in _kinds(update).items() if found.untouched is not None}
        for y, found in enumerate(groups.values()):
            _two_bars(ax, y, (found.rows, found.chance_rows), (found.columns, found.chance_columns))
        _kind_axis(ax, list(groups))
        ax.update_datalim([(0, 0), (1, 0)])  # a percent at least, that nothing looks like much
        return [
            ax.plot([], [], "s", color=BLUE, ms=7, label="rows")[0],
            ax.plot([], [], "s", color=GREEN, ms=7, label="columns")[0],
            ax.plot([], [], "|", color=VERMILION, mew=2.2, ms=9, label="evenly spread changes")[0],
        ]

    return _panels(analysis, draw, "without a changed entry (%)")


def _tolerances(analysis: Analysis) -> Figure:
    """Share of entries that count as unchanged as the rule becomes more lenient."""
    figure = new_figure(3.1)
    ax = figure.subplots()
    rungs = ["bits", *map(power, TOLERANCES)]
    names = short_names([update.after for update in analysis.updates])
    for index, (update, name) in enumerate(zip(analysis.updates, names, strict=True)):
        total = pool(update.rows).sparsity
        shares = [100 * total.share(count) for count in (total.bit_equal, *(total.within[t] for t in TOLERANCES))]
        relative, predicted = 100 * total.share(total.within_relative), 100 * total.share(total.predicted)
        color, marker = UPDATES[index % len(UPDATES)], MARKERS[index % len(MARKERS)]
        ax.plot(range(len(rungs)), shares, f"-{marker}", color=color, ms=5.5, label=clip(name, 60))
        ax.plot(len(rungs) + 0.4, relative, marker, color=color, ms=5.5)
        ax.plot(0, predicted, "D", mfc="white", mec=color, mew=1.4, ms=6)
        if len(names) == 1:
            for x, share in zip([*range(len(rungs)), len(rungs) + 0.4], [*shares, relative], strict=True):
                ax.annotate(f"{share:.1f}", (x, share), (0, 7), textcoords="offset points", ha="center", size=8)
    ax.plot([], [], "D", mfc="white", mec=MUTED, mew=1.4, ms=6, label="absorption null, of bits")
    ax.axvline(len(rungs) - 0.3, color=RULE, lw=0.8)
    ax.set_xlim(-0.4, len(rungs) + 0.9)
    ax.set_xticks([*range(len(rungs)), len(rungs) + 0.4], [*rungs, f"relative {power(RELATIVE)}"])
    ax.set_xlabel("an entry is unchanged within")
    ax.set_ylabel("unchanged entries (%)")
    low, high = ax.dataLim.intervaly
    room = max(0.12 * (high - low), 0.5)
    ax.set_ylim(max(0.0, low - room), high + room)
    ax.set_yticks([tick for tick in MaxNLocator(6).tick_values(low, high) if max(0.0, low - room) <= tick <= 100])
    ax.grid(axis="y")
    legend(figure, ax.get_legend_handles_labels()[0])
    return figure


def _masks(analysis: Analysis) -> Figure | None:
    """Share of changed entries in each cell of a grid over a matrix, darkest where most changed."""
    names = short_names([update.after for update in analysis.updates])
    if not analysis.updates[0].pictures:
        return None
    shapes = {row.name: row.shape for row in analysis.updates[0].rows}
    kinds = {row.name: row.kind for row in analysis.updates[0].rows}
    order = in_model_order({kinds[name] for name in analysis.updates[0].pictures})
    weights = sorted(analysis.updates[0].pictures, key=lambda name: (order.index(kinds[name]), name))
    across = min(len(weights), 4 if len(names) == 1 else 7)
    down = math.ceil(len(weights) / across)
    figure = new_figure(down * len(names) * (WIDTH - 1) / across * 1.16 + 0.3 * len(names))
    top = max(float(picture.max()) for update in analysis.updates for picture in update.pictures.values())
    scale = Normalize(0, 100 * top or 100)
    parts = figure.subfigures(len(names), 1, squeeze=False).flat
    for part, update, name in zip(parts, analysis.updates, names, strict=True):
        if len(names) > 1:
            part.suptitle(clip(name), x=0.01, ha="left", size=9.5, weight="bold")
        axes = part.subplots(down, across, squeeze=False)
        for ax in axes.flat[len(weights) :]:
            ax.remove()
        for ax, weight in zip(axes.flat, weights, strict=False):
            ax.imshow(100 * update.pictures[weight].numpy(), cmap=MASK, norm=scale, interpolation="none", aspect="auto")
            ax.set_box_aspect(1)
            rows, columns = shapes[weight]
            ax.set_title(kinds[weight], loc="left")
            ax.set_xlabel(f"{columns:,} columns", size=8)
            ax.set_ylabel(f"{rows:,} rows", size=8)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
        color_bar(part, axes.flat[: len(weights)], ScalarMappable(scale, MASK), "changed (%)", aspect=14 * down)
    return figure


def _null_ranks(analysis: Analysis) -> Figure | None:
    """Two ranks of the update, by kind, each beside that of the rounding null."""
    if not _decomposed(analysis):
        return None

    def draw(ax: Axes, update: Update) -> list[Any]:
        groups = {kind: found for kind, (_, found) in _kinds(update).items() if found.spectrum is not None}
        for y, found in enumerate(groups.values()):
            assert found.spectrum is not None and found.rank is not None
            spectrum = found.spectrum
            _two_bars(ax, y, (found.rank, spectrum.null_numerical), (spectrum.entropy, spectrum.null_entropy))
        _kind_axis(ax, list(groups))
        return [
            ax.plot([], [], "s", color=BLUE, ms=7, label="numerical rank")[0],
            ax.plot([], [], "s", color=GREEN, ms=7, label="entropy rank")[0],
            ax.plot([], [], "|", color=VERMILION, mew=2.2, ms=9, label="rounding null")[0],
        ]

    return _panels(analysis, draw, "rank of the update (% of full)")


def _principal(analysis: Analysis) -> Figure | None:
    """Of the changed entries, the share that is principal and the share that is smallest, by kind, between levels of chance."""
    if not _decomposed(analysis):
        return None

    def draw(ax: Axes, update: Update) -> list[Any]:
        groups = {kind: found.spectrum for kind, (_, found) in _kinds(update).items() if found.spectrum is not None}
        for y, found in enumerate(groups.values()):
            if not found.principal.first:
                continue
            uniform = 100 * found.principal.of_first(found.principal.uniform)
            ax.plot([uniform] * 2, [y - 0.35, y + 0.35], color=MUTED, lw=2)
            for offset, look, shared in (
                (-0.15, OBSERVED, found.principal),
                (0.15, OBSERVED_TOO, found.low_magnitude),
            ):
                both, matched = (100 * shared.of_first(count) for count in (shared.both, shared.matched))
                ax.plot([both, matched], [y + offset] * 2, color=RULE, lw=1.2, zorder=1)
                ax.plot(matched, y + offset, **EXPECTED)
                ax.plot(both, y + offset, **look)
        _kind_axis(ax, list(groups))
        return [
            ax.plot([], [], label="principal before", **OBSERVED)[0],
            ax.plot([], [], label="smallest before", **OBSERVED_TOO)[0],
            ax.plot([], [], label="chance, magnitude-matched", **EXPECTED)[0],
            ax.plot([], [], "|", color=MUTED, ms=10, mew=2, label="chance, uniform")[0],
        ]

    return _panels(analysis, draw, "of the changed entries (%)")


def _spectra(analysis: Analysis) -> Figure | None:
    """Singular values of the updates of each kind, as shares of the largest: the median of its matrices."""
    if not _decomposed(analysis):
        return None
    place_N = np.linspace(0, 1, 201)

    def draw(ax: Axes, update: Update) -> list[Any]:
        handles = []
        for kind, (rows, _) in _kinds(update).items():
            curves = [curve_N for row in rows if (curve_N := _normalised(row, place_N)) is not None]
            if kind != "all" and curves:
                color, dash = KINDS.get(kind, (VERMILION, "-."))
                curve_N = np.maximum(np.median(curves, axis=0), 1e-12)
                handles += ax.plot(100 * place_N, curve_N, dash, color=color, label=kind)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xlim(0, 100)
        ax.grid(axis="y")
        return handles

    figure = _panels(analysis, draw, "singular value (% of full rank)", height=3.0)
    figure.supylabel("of the largest", size=9)
    first = figure.axes[0]  # whose scale the others share
    first.set_ylim(max(first.get_ylim()[0], 1e-5), 1.3)
    return figure


def _normalised(row: WeightRow, place_N: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """None of a matrix that was not decomposed or did not change."""
    sigma_R = np.array(row.spectrum.singular_values if row.spectrum else ())
    if not sigma_R.size or not sigma_R[0]:
        return None
    return np.interp(place_N, np.linspace(0, 1, len(sigma_R)), sigma_R / sigma_R[0])


def _overlaps(analysis: Analysis) -> Figure | None:
    """Of what one update changed, the share that the other changed too, between the two levels of chance."""
    if not analysis.comparisons:
        return None
    pairs = itertools.combinations(short_names([update.after for update in analysis.updates]), 2)
    down, across = grid(len(analysis.comparisons))
    figure = new_figure(0.5 + down * (0.85 + 0.24 * len(analysis.comparisons[0].overlaps)))
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for ax, comparison, (first, second) in zip(axes.flat, analysis.comparisons, pairs, strict=False):
        for y, found in enumerate(comparison.overlaps.values()):
            if not found.first:
                continue
            both, uniform, matched = (
                100 * found.of_first(count) for count in (found.both, found.uniform, found.matched)
            )
            ax.plot([min(both, uniform, matched), max(both, uniform, matched)], [y, y], color=RULE, lw=1.2, zorder=1)
            ax.plot(uniform, y, "|", color=MUTED, ms=10, mew=2)
            ax.plot(matched, y, **EXPECTED)
            ax.plot(both, y, **OBSERVED)
        _kind_axis(ax, list(comparison.overlaps))
        fits = len(first) + len(second) + 5 <= 84 // across
        ax.set_title(
            " and ".join((first, second)) if fits else " and\n".join(clip(n, 78 // across) for n in (first, second))
        )
    trim(axes, len(analysis.comparisons), "shared, of what the first changed (%)")
    ax = axes.flat[0]
    legend(
        figure,
        [
            ax.plot([], [], label="observed", **OBSERVED)[0],
            ax.plot([], [], label="chance, magnitude-matched", **EXPECTED)[0],
            ax.plot([], [], "|", color=MUTED, ms=10, mew=2, label="chance, uniform")[0],
        ],
    )
    return figure


def _history(history: History) -> Figure:
    figure = new_figure(3.0)
    axes = figure.subplots(1, 2)
    panels = (
        ("unchanged entries", {"unchanged": "since the version before", "unchanged_since_start": "since the start"}),
        ("moved entries", {"ever_moved": "ever moved, of all", "returned": "back at their start, of those ever moved"}),
    )
    for ax, (title, keys) in zip(axes, panels, strict=True):
        for (key, label), color, marker in zip(keys.items(), UPDATES, MARKERS, strict=False):
            rows = [row for row in history if row.get(key) is not None]
            steps, shares = [row["step"] for row in rows], [100 * row[key] for row in rows]
            ax.plot(steps, shares, f"-{marker}", color=color, ms=4, markevery=max(1, len(rows) // 12), label=label)
        top = {"transform": ax.get_xaxis_transform(), "va": "top", "size": 8, "color": MUTED}
        for before, row in itertools.pairwise(history):
            if row.get("stage") != before.get("stage"):
                ax.axvline(row["step"], color=MUTED, lw=0.8, ls=":")
                ax.text(row["step"], 1, f" {row['stage']}", **top)
        ax.set_title(f"{title} (%)")
        ax.set_xlabel("step")
        ax.grid(axis="y")
        ax.legend()
    return figure


def _panels(
    analysis: Analysis, draw: Callable[[Axes, Update], Sequence[Any]], label: str, *, height: float | None = None
) -> Figure:
    """One panel for each update under one legend of the handles that `draw` returns."""
    names = short_names([update.after for update in analysis.updates])
    down, across = grid(len(names))
    each = height or 0.85 + 0.24 * len(by_kind(analysis.updates[0].rows))
    figure = new_figure(0.35 + down * each)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for ax, update, name in zip(axes.flat, analysis.updates, names, strict=False):
        handles |= {handle.get_label(): handle for handle in draw(ax, update)}
        if len(names) > 1:
            ax.set_title(clip(name, 100 // across))
    trim(axes, len(names), label)
    legend(figure, list(handles.values()))
    return figure


def _decomposed(analysis: Analysis) -> bool:
    return any(row.spectrum is not None for row in analysis.updates[0].rows)


def _kinds(update: Update) -> dict[str, tuple[Sequence[WeightRow], Pooled]]:
    return {kind: (rows, pool(rows)) for kind, rows in by_kind(update.rows).items()}


def _two_bars(ax: Axes, y: float, blue: tuple[float, float], green: tuple[float, float]) -> None:
    """Each a share, and the level that a stroke marks."""
    for offset, color, (share, level) in ((-0.17, BLUE, blue), (0.17, GREEN, green)):
        ax.barh(y + offset, 100 * share, height=0.3, color=color)
        ax.plot([100 * level] * 2, [y + offset - 0.16, y + offset + 0.16], color=VERMILION, lw=2.2)


def _kind_axis(ax: Axes, kinds: Sequence[str]) -> None:
    """Kinds from the top, "all" under a rule."""
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_ylim(len(kinds) - 0.5, -0.5)
    if kinds[-1] == "all":
        ax.axhline(len(kinds) - 1.5, color=RULE, lw=0.8)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")


def _scale(values: NDArray[np.float64]) -> Normalize:
    """From the smallest value to the largest, each rounded outwards to whole tens of percent."""
    low, high = math.floor(float(values.min()) / 10) * 10, math.ceil(float(values.max()) / 10) * 10
    return Normalize(low, high if high > low else low + 10)
