"""When a stage ends before its last planned step: what its rule says of what it has come to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REWARD, TOKENS, HOURS = "reward/mean", "tokens", "hours"
"""Figures of each step: response tokens of its groups, and its wall time. Those of evaluations are `eval_figure`."""


def eval_figure(name: str) -> str:
    return f"eval/{name}/accuracy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plateau:
    """A figure that has stopped rising."""

    figure: str
    mean_over: int
    """Values of the figure per mean; means do not overlap, and the first begins with the stage."""
    without_gain: int
    """Means in a row of which none is better than the best before them."""
    min_gain: float
    """By how much a mean has to be better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Until:
    """A stage ends at the first of these, and after its planned steps at the latest."""

    plateau: Plateau | None = None
    tokens: int | None = None
    hours: float | None = None


@dataclass(frozen=True, slots=True)
class History:
    """What a run has come to: by figure and version, which for the figures of a step is the one it updated."""

    figures: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: Iterable[Mapping[str, Any]], evals: Iterable[Mapping[str, Any]]) -> History:
        """That of an earlier process, from the rows it wrote."""
        history = cls()
        for row in steps:
            seconds, tokens_per_s = row["timing_s/step"], row["perf/tokens_per_s"]
            figures = {TOKENS: round(tokens_per_s * seconds), HOURS: seconds / 3600}
            if REWARD in row:
                figures[REWARD] = row[REWARD]
            history.note(row["step"] - 1, figures)
        for row in evals:
            history.note(row["step"], {eval_figure(row["eval"]): row["accuracy"]})
        return history

    def note(self, version: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, {})[version] = value

    def since(self, version: int) -> dict[str, list[float]]:
        """Values of each figure from `version` on, oldest first."""
        return {name: [of[v] for v in sorted(of) if v >= version] for name, of in self.figures.items()}


def moves_on(figures: Mapping[str, Sequence[float]], until: Until) -> str | None:
    """Why a stage with these figures ends, in words; None while it goes on."""
    tokens, hours = sum(figures.get(TOKENS, ())), sum(figures.get(HOURS, ()))
    if until.plateau is not None and has_settled(figures.get(until.plateau.figure, ()), until.plateau):
        rule = until.plateau
        means = f"means over {rule.mean_over} values" if rule.mean_over > 1 else "values"
        return f"the last {rule.without_gain} {means} of {rule.figure} brought no gain of {rule.min_gain:g}"
    if until.tokens is not None and tokens >= until.tokens:
        return f"{tokens} response tokens are trained on, of {until.tokens}"
    if until.hours is not None and hours >= until.hours:
        return f"it took {hours:.2f} hours, of {until.hours:g}"
    return None


def has_settled(values: Sequence[float], plateau: Plateau) -> bool:
    """Whether none of the last `without_gain` means is `min_gain` above the best of those before.

    Example:
        0.50, 0.61, 0.60, 0.62 with without_gain = 2 and min_gain = 0.02: neither 0.60 nor 0.62 reaches 0.63.
    """
    size = plateau.mean_over
    means = [sum(values[i : i + size]) / size for i in range(0, len(values) - size + 1, size)]
    before, last = means[: -plateau.without_gain], means[-plateau.without_gain :]
    return bool(before) and max(last) < max(before) + plateau.min_gain
