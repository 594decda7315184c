"""What the arms of a study learned: a table on the terminal, and one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Group

from rlpost.analysis.report import template
from rlpost.analysis.style import MUTED, UPDATES, Axes, Figure, grid, legend, new_figure, style, svg, trim
from rlpost.analysis.tables import new_table
from rlpost.study.learning import STEP_CURVES, Learned, Point
from rlpost.study.page import before_and_after, over_text
from rlpost.study.plan import GoalConfig

PANELS: Mapping[str, tuple[str, float]] = dict(
    zip(
        STEP_CURVES,
        (
            ("right rollouts (%)", 100),
            ("groups without signal (%)", 100),
            ("entropy (nats per token)", 1),
            ("response length (tokens)", 1),
        ),
        strict=True,
    )
)
"""Key to its label and the factor it is shown with."""


def render(results: Sequence[Learned], goal: GoalConfig | None) -> Group:
    """For a terminal of 80 columns, a line per arm: means over seeds and, where there are several, standard deviations."""
    sets = list(results[0].accuracy)
    to_goal = [] if goal is None else ["to the goal"]
    accuracy = new_table("accuracy after, %", sets)
    cost = new_table(None, ["k tokens", *to_goal, "no signal, %", "entropy"])
    for result in results:
        accuracy.add_row(result.name, *(over_text(after) for _, after in result.accuracy.values()))
        reached = [] if goal is None else [reached_text(result)]
        cost.add_row(
            result.name, thousands(result.tokens.mean), *reached, over_text(result.without_signal), nats(result)
        )
    told = (
        [] if goal is None else [f"the goal: {goal.eval} {100 * goal.accuracy:g} %; thousands of response tokens to it"]
    )
    return Group(accuracy, "", cost, *told)


def goal_text(goal: GoalConfig) -> str:
    return f"k tokens to {goal.eval} {100 * goal.accuracy:g} %"


def thousands(count: float, *, digits: int = 0) -> str:
    """A dash for nothing, which is what given responses come to."""
    return f"{count / 1000:,.{digits}f}" if count else "-"


def nats(result: Learned) -> str:
    return over_text(result.entropy, factor=1, digits=3)


def reached_text(result: Learned) -> str:
    """The mean over seeds that reached the goal, and how many did if not all."""
    reached = [tokens for tokens in result.goal_tokens if tokens is not None]
    if not reached:
        return "not reached"
    some = "" if len(reached) == len(result.goal_tokens) else f" ({len(reached)} of {len(result.goal_tokens)} seeds)"
    return thousands(sum(reached) / len(reached)) + some


def write_page(path: Path, name: str, results: Sequence[Learned], *, goal: GoalConfig | None) -> None:
    page = template(Path(__file__).with_name("learning.html")).render(
        name=name,
        results=results,
        figures={figure: Markup(svg(chart)) for figure, chart in figures(results, goal).items()},
        goal=goal and goal_text(goal),
        over=over_text,
        thousands=thousands,
        nats=nats,
        reached=reached_text,
        num_seeds=len(results[0].tokens.seeds),
    )
    path.write_text(page, encoding="utf-8")


def figures(results: Sequence[Learned], goal: GoalConfig | None) -> dict[str, Figure]:
    """In the order of the page; without the curves where no arm sampled anything that they could go along."""
    with style():
        sampled = any(result.rollouts.mean for result in results)
        curves = {"accuracy": _accuracy(results, goal), "steps": _steps(results)} if sampled else {}
        return curves | before_and_after({result.name: result.accuracy for result in results})


def _accuracy(results: Sequence[Learned], goal: GoalConfig | None) -> Figure:
    """Held-out accuracy over response tokens, a panel per eval set; of an arm without them, the height it ended at."""

    def draw(ax: Axes, name: str) -> None:
        for result, color in _colored(results):
            if result.tokens.mean:
                _curve(ax, result.eval_curves[name], color, marker="o")
            else:
                _, after = result.accuracy[name]
                ax.axhline(100 * after.mean, color=color, ls="--")
        ax.set_title(name)
        ax.set_ylabel("accuracy (%)")
        if goal is not None and goal.eval == name:
            ax.axhline(100 * goal.accuracy, color=MUTED, lw=1, ls=":")

    return _panels(results, list(results[0].accuracy), draw, "response tokens trained on (thousands)")


def _steps(results: Sequence[Learned]) -> Figure:
    def draw(ax: Axes, key: str) -> None:
        label, factor = PANELS[key]
        for result, color in _colored(results):
            _curve(ax, result.step_curves[key], color, factor=factor)
        ax.set_ylabel(label)

    shown = [key for key in PANELS if any(result.step_curves[key] for result in results)]
    return _panels(results, shown, draw, "rollouts trained on (thousands)")


def _panels(results: Sequence[Learned], names: Sequence[str], draw: Callable[[Axes, str], None], label: str) -> Figure:
    down, across = grid(len(names))
    figure = new_figure(0.5 + 2.5 * down)
    axes = figure.subplots(down, across, squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        draw(ax, name)
        ax.grid()
    trim(axes, len(names), label)
    first = axes.flat[0]
    legend(figure, [first.plot([], [], color=color, label=result.name)[0] for result, color in _colored(results)])
    return figure


def _curve(ax: Axes, points: Sequence[Point], color: str, *, factor: float = 100, marker: str = "") -> None:
    """The mean over seeds in a band from the lowest to the highest."""
    at = [point.at / 1000 for point in points]
    ax.plot(at, [factor * point.value.mean for point in points], color=color, marker=marker, ms=4)
    low, high = ([factor * end(point.value.seeds) for point in points] for end in (min, max))
    ax.fill_between(at, low, high, color=color, alpha=0.15, lw=0)


def _colored(results: Sequence[Learned]) -> Iterator[tuple[Learned, str]]:
    for index, result in enumerate(results):
        yield result, UPDATES[index % len(UPDATES)]
