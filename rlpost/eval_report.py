"""What the samples of `rlpost eval` come to: figures of each model, each model against the first, and a table of them.

P problems.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from rlpost.core.pass_at_k import budgets, clustered_mean, estimate, pass_at_k, sign_flip_p_value, voted_at_k

DIFFICULTIES = (
    ("none right", 0.0),
    ("at most 1/4", 0.25),
    ("at most 3/4", 0.75),
    ("not all", 1 - 1e-9),
    ("all right", 1.0),
)
"""Kinds of problems, by the largest share of the first model's samples that is right."""
NUM_LENGTHS = 4
COLUMNS = 4
"""Models beside each other in 80 characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSample:
    """One sample and its verdict, without its text."""

    outcome: str
    answer: str | None
    """As it votes; None where a response states none, and for code, whose programs have no majority."""
    num_tokens: int
    finish_reason: str

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """All samples of one eval set."""

    name: str
    num_samples: int
    temperature: float
    samples: Mapping[str, Mapping[str, Sequence[EvalSample]]]
    """Of each model, the first one first: of each problem, as many as `num_samples`."""


def figures(result: SetResult) -> dict[str, Any]:
    """Everything, as plain data; docs/evaluation.md says what each key is."""
    labels = list(result.samples)
    first = result.samples[labels[0]]
    edges = _length_edges(
        [s.num_tokens for model in result.samples.values() for group in model.values() for s in group]
    )
    groups = {kind: {p for p, group in first.items() if _difficulty(group) == kind} for kind, _ in DIFFICULTIES}
    return {
        "num_samples": result.num_samples,
        "temperature": result.temperature,
        "models": {label: _of_model(result.samples[label], result.num_samples, edges, groups) for label in labels},
        "differences": {label: _difference(first, result.samples[label], result.num_samples) for label in labels[1:]},
    }


def _of_model(
    problems: Mapping[str, Sequence[EvalSample]],
    num: int,
    edges: Sequence[int],
    kinds: Mapping[str, set[str]],
) -> dict[str, Any]:
    samples = [sample for group in problems.values() for sample in group]
    right_P = [sum(s.correct for s in group) for group in problems.values()]
    votes_P = [[(s.correct, s.answer) for s in group] for group in problems.values()]
    return {
        "num_problems": len(problems),
        "pass_at": {k: estimate([pass_at_k(num, right, k) for right in right_P]) for k in budgets(num)},
        "majority_at": {k: estimate([voted_at_k(votes, k) for votes in votes_P]) for k in budgets(num)}
        if any(sample.answer is not None for sample in samples)
        else {},
        "outcomes": dict(Counter(sample.outcome for sample in samples)),
        "truncated_share": sum(s.finish_reason == "length" for s in samples) / len(samples),
        "response_length_mean": statistics.fmean(s.num_tokens for s in samples),
        "by_length": [
            {"tokens_from": low, "tokens_to": high, **_share(problems, low, high)}
            for low, high in zip(edges, [edge - 1 for edge in edges[1:]], strict=False)
        ],
        "by_difficulty": [
            {"first_model": kind, "num_problems": len(shared), **estimate([_rate(problems[p]) for p in sorted(shared)])}
            for kind, ids in kinds.items()
            if (shared := ids & problems.keys())
        ],
    }


def _difference(
    before: Mapping[str, Sequence[EvalSample]], after: Mapping[str, Sequence[EvalSample]], num: int
) -> dict[str, Any]:
    """Of the accuracy on the problems that both have, problem by problem."""
    shared = [problem for problem in before if problem in after]
    differences = [sum(s.correct for s in after[p]) - sum(s.correct for s in before[p]) for p in shared]
    if not shared:
        return {"num_problems": 0}
    return {
        "num_problems": len(shared),
        **estimate([difference / num for difference in differences]),
        "num_better": sum(difference > 0 for difference in differences),
        "num_worse": sum(difference < 0 for difference in differences),
        "p_value": sign_flip_p_value(differences),
    }


def _rate(group: Sequence[EvalSample]) -> float:
    return sum(sample.correct for sample in group) / len(group)


def _difficulty(group: Sequence[EvalSample]) -> str:
    return next(kind for kind, most in DIFFICULTIES if _rate(group) <= most)


def _length_edges(lengths: Sequence[int]) -> list[int]:
    """Where the buckets begin, about equally many samples of all models in each; the last is one past the longest."""
    ordered = sorted(lengths)
    inner = {ordered[len(ordered) * part // NUM_LENGTHS] for part in range(1, NUM_LENGTHS)}
    return sorted({ordered[0], *inner, ordered[-1] + 1})


def _share(problems: Mapping[str, Sequence[EvalSample]], low: int, high: int) -> dict[str, Any]:
    """Accuracy of the responses of so many tokens."""
    inside = [[s for s in group if low <= s.num_tokens <= high] for group in problems.values()]
    inside = [group for group in inside if group]
    if not inside:
        return {"num_samples": 0}
    mean, error = clustered_mean([sum(s.correct for s in group) for group in inside], [len(group) for group in inside])
    return {"num_samples": sum(map(len, inside)), "mean": mean, "se": error}


# -- on the terminal ---------------------------------------------------------------------------------------------------


def render(result: SetResult) -> RenderableType:
    """A table per `COLUMNS` models, and a line per comparison."""
    found = figures(result)
    labels = list(found["models"])
    tables = [_table(result, found, labels[start : start + COLUMNS]) for start in range(0, len(labels), COLUMNS)]
    lines = [_line(labels[0], label, found["differences"][label]) for label in labels[1:]]
    return Group(*tables, *lines)


def _table(result: SetResult, found: Mapping[str, Any], labels: Sequence[str]) -> Table:
    models = [found["models"][label] for label in labels]
    sizes = sorted({model["num_problems"] for model in models})
    title = f"{result.name}: {' or '.join(map(str, sizes))} problems x {result.num_samples} samples, T = {result.temperature:g}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("%")
    for label in labels:
        table.add_column(label, justify="right")
    for k in models[0]["pass_at"]:
        best = f" (best of {k})" if k == result.num_samples > 1 else ""
        table.add_row(f"pass@{k}{best}", *(_percent(model["pass_at"][k]) for model in models))
    for k in [k for k in models[0]["pass_at"] if k > 2]:
        if any(model["majority_at"] for model in models):
            table.add_row(f"maj@{k}", *(_percent(model["majority_at"].get(k)) for model in models))
    table.add_row("truncated", *(f"{model['truncated_share']:.1%}".removesuffix("%") for model in models))
    table.add_row("mean tokens", *(f"{model['response_length_mean']:,.1f}" for model in models))
    for index, bucket in enumerate(models[0]["by_length"]):
        row = f"{bucket['tokens_from']} to {bucket['tokens_to']} tokens"
        table.add_row(row, *(_percent(model["by_length"][index]) for model in models))
    for bucket in models[0]["by_difficulty"]:
        kind = bucket["first_model"]
        same = [next((b for b in m["by_difficulty"] if b["first_model"] == kind), None) for m in models]
        table.add_row(f"A: {kind} ({bucket['num_problems']})", *map(_percent, same))
    return table


def _percent(figure: Mapping[str, float] | None) -> str:
    if figure is None or "mean" not in figure:
        return "-"
    return f"{100 * figure['mean']:.1f} +- {100 * figure['se']:.1f}"


def _line(first: str, label: str, difference: Mapping[str, Any]) -> str:
    if not difference["num_problems"]:
        return f"{label} - {first}: they share no problem"
    return (
        f"{label} - {first}: {100 * difference['mean']:+.1f} +- {100 * difference['se']:.1f} points on"
        f" {difference['num_problems']} problems, {difference['num_better']} better,"
        f" {difference['num_worse']} worse, p = {difference['p_value']:.2g}"
    )
