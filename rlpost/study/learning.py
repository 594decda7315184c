"""What an arm of a study learned and what it cost: figures over seeds and curves, from the runs' own rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.study.plan import GoalConfig, Study
from rlpost.study.results import Over, accuracies
from rlpost.tracking import FILES, read_rows, trained_on

Row = Mapping[str, Any]

POINTS = 30
"""Of a curve over steps, at most: each is the mean of the steps since the one before."""
LAST_SHARE = 0.1
"""Of the steps, over which a figure at the end is averaged."""
STEP_CURVES = ("reward/accuracy/mean", "reward/frac_zero_std", "actor/entropy", "response_length/mean")
"""Keys of metrics.jsonl (docs/metrics.md)."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a curve.

    Example:
        Point(1600.0, Over((0.61, 0.64, 0.60)))
    """

    at: float
    """Mean over seeds of the rollouts, or of the response tokens, trained on by then."""
    value: Over
    """Of the seeds that have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """An arm; whatever is counted is of the rollouts its steps were trained on, and given responses count nowhere: an arm that
    learns from nothing else has none."""

    name: str
    accuracy: Mapping[str, tuple[float, Over]]
    """By eval set: before, and after."""
    rollouts: Over
    tokens: Over
    """Of their responses."""
    goal_tokens: tuple[float | None, ...]
    """Of each seed: `tokens` when an evaluation first met the study's goal; None: none did. Empty without a goal."""
    without_signal: Over | None
    """Mean over steps of the share of groups without signal; None where the algorithm knows no such groups."""
    entropy: Over | None
    """Mean over the last tenth of the steps."""
    eval_curves: Mapping[str, tuple[Point, ...]]
    """By eval set, over tokens."""
    step_curves: Mapping[str, tuple[Point, ...]]
    """By key, over rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The rows of a run's sampled steps, what had been trained on before the first and by each, and its evaluations."""

    steps: Sequence[Row]
    rollouts: Sequence[int]
    tokens: Sequence[int]
    evals: Sequence[Row]

    def tokens_at(self, step: int) -> int:
        """Trained on by the version of this step."""
        return self.tokens[sum(row["step"] <= step for row in self.steps)]


def learned(study: Study, arm: str) -> Learned:
    planned = study.of_arm(arm)
    runs = [
        _read(list(read_rows(run.directory / FILES["step"])), list(read_rows(run.directory / FILES["eval"])))
        for run in planned
    ]
    sets = dict.fromkeys(row["eval"] for row in runs[0].evals)
    goal = study.config.goal
    return Learned(
        name=arm,
        accuracy=accuracies(planned),
        rollouts=Over(tuple(float(run.rollouts[-1]) for run in runs)),
        tokens=Over(tuple(float(run.tokens[-1]) for run in runs)),
        goal_tokens=() if goal is None else tuple(_reached(run, goal) for run in runs),
        without_signal=_over([_mean(run.steps, "reward/frac_zero_std") for run in runs]),
        entropy=_over([_mean(run.steps[-math.ceil(LAST_SHARE * len(run.steps)) :], "actor/entropy") for run in runs]),
        eval_curves={name: tuple(_eval_curve(runs, name)) for name in sets},
        step_curves={key: tuple(_step_curve(runs, key)) for key in STEP_CURVES},
    )


def _read(metrics: Sequence[Row], evals: Sequence[Row]) -> _Run:
    steps = [row for row in metrics if "reward/mean" in row]
    rollouts, tokens = zip((0, 0), *map(trained_on, steps), strict=True)
    return _Run(
        steps=steps,
        rollouts=list(itertools.accumulate(rollouts)),
        tokens=list(itertools.accumulate(tokens)),
        evals=evals,
    )


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return statistics.fmean(values) if values else None


def _over(seeds: Sequence[float | None]) -> Over | None:
    """None where no seed has a value; one that lacks it is left out."""
    known = tuple(value for value in seeds if value is not None)
    return Over(known) if known else None


def _reached(run: _Run, goal: GoalConfig) -> float | None:
    steps = [row["step"] for row in run.evals if row["eval"] == goal.eval and row["accuracy"] >= goal.accuracy]
    return float(run.tokens_at(min(steps))) if steps else None


def _eval_curve(runs: Sequence[_Run], name: str) -> Iterator[Point]:
    """At the steps that were evaluated with every seed, which have trained on different numbers of tokens by then."""
    accuracy = [{row["step"]: row["accuracy"] for row in run.evals if row["eval"] == name} for run in runs]
    for step in sorted(set.intersection(*map(set, accuracy))):
        at = statistics.fmean(run.tokens_at(step) for run in runs)
        yield Point(at, Over(tuple(of_seed[step] for of_seed in accuracy)))


def _step_curve(runs: Sequence[_Run], key: str) -> Iterator[Point]:
    num_steps = min(len(run.steps) for run in runs)
    width = max(1, math.ceil(num_steps / POINTS))
    for start in range(0, num_steps, width):
        end = min(start + width, num_steps)
        value = _over([_mean(run.steps[start:end], key) for run in runs])
        if value is not None:
            yield Point(statistics.fmean(run.rollouts[end] for run in runs), value)
