"""A study's figures over seeds: a table on the terminal, JSON, and one self-contained page that links the report of each arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Group

from rlpost.analysis.report import template
from rlpost.analysis.style import BLUE, EXPECTED, INK, MUTED, OBSERVED, Figure, new_figure, style, svg
from rlpost.analysis.tables import new_table
from rlpost.study.results import ArmResult, Over

Series = Mapping[str, Sequence[Over | None]]
"""What a figure shows beside each other: a label to one value per arm, observed first, then what is expected."""


def render(results: Sequence[ArmResult]) -> Group:
    """For a terminal of 80 columns, a line per arm: means over seeds and, where there are several, standard deviations."""
    sets = list(results[0].accuracy)
    learned, shape = (
        new_table(None, [*sets, "unchanged", "null"]),
        new_table(None, ["rank", "entropy rank", "shared", "chance"]),
    )
    for result in results:
        after = [over for _, over in result.accuracy.values()]
        learned.add_row(result.name, *map(over_text, (*after, result.unchanged, result.predicted)))
        figures = (result.rank, result.entropy_rank, result.shared, result.shared_by_chance)
        shape.add_row(result.name, *map(over_text, figures))
    return Group(learned, "", shape)


def over_text(over: Over | None, *, factor: float = 100, digits: int = 1) -> str:
    """Example: over_text(Over((0.5, 0.6))) == "55.0 ± 7.1"."""
    if over is None:
        return "-"
    spread = "" if math.isnan(over.spread) else f" ± {factor * over.spread:.{digits}f}"
    return f"{factor * over.mean:.{digits}f}{spread}"


def write_page(path: Path, name: str, results: Sequence[ArmResult], *, reports: Mapping[str, str], dtype: str) -> None:
    """
    Args:
        reports: of each arm, where its own report lies, relative to the page.
    """
    drawn = {figure: Markup(svg(chart)) for figure, chart in figures(results).items()}
    page = template(Path(__file__).with_name("page.html")).render(
        name=name,
        over=over_text,
        results=results,
        figures=drawn,
        reports=reports,
        dtype=dtype,
        num_seeds=len(results[0].unchanged.seeds),
    )
    path.write_text(page, encoding="utf-8")


def figures(results: Sequence[ArmResult]) -> dict[str, Figure]:
    """In the order of the page; one whose values no arm has is left out."""
    arms = [result.name for result in results]
    drawn: dict[str, tuple[str, Series]] = {
        "unchanged": (
            "entries with the same bits (%)",
            {
                "observed": [result.unchanged for result in results],
                "absorption null": [result.predicted for result in results],
            },
        ),
        "entropy_rank": (
            "entropy rank of the update (% of full)",
            {"mean of its matrices": [r.entropy_rank for r in results]},
        ),
        "shared": (
            "of what one seed changed, what another changed too (%)",
            {
                "observed": [result.shared for result in results],
                "chance among like magnitudes": [result.shared_by_chance for result in results],
            },
        ),
    }
    with style():
        return before_and_after({result.name: result.accuracy for result in results}) | {
            key: _chart(arms, series, label)
            for key, (label, series) in drawn.items()
            if any(over is not None for values in series.values() for over in values)
        }


def before_and_after(accuracy: Mapping[str, Mapping[str, tuple[float, Over]]]) -> dict[str, Figure]:
    """A chart per eval set, from each arm's accuracies."""
    sets = next(iter(accuracy.values()))
    return {
        f"accuracy_{name}": _chart(
            list(accuracy),
            {
                "after": [of_arm[name][1] for of_arm in accuracy.values()],
                "before": [Over((of_arm[name][0],)) for of_arm in accuracy.values()],
            },
            f"accuracy on {name} (%)",
        )
        for name in sets
    }


def _chart(arms: Sequence[str], series: Series, label: str) -> Figure:
    """A row per arm: the mean as a marker, every seed as a stroke."""
    figure = new_figure(0.9 + 0.3 * len(arms))
    ax = figure.subplots()
    for (name, values), marker, color in zip(series.items(), (OBSERVED, EXPECTED), (BLUE, MUTED), strict=False):
        for y, over in enumerate(values):
            if over is not None:
                ax.plot([100 * value for value in over.seeds], [y] * len(over.seeds), "|", color=color, ms=9, alpha=0.6)
                ax.plot(100 * over.mean, y, label=name if y == 0 else None, **marker)
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.4, -0.6)
    ax.set_xlabel(label, color=INK)
    ax.grid(axis="x")
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=2)
    return figure
