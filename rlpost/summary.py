"""What a run came to: what was learned, where the time went, which weights moved, where everything is.

Everything is read from the run directory, so that the summary can be made again at any time.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.tracking import FILES, plain, read_rows, trained_on

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

RARE = {"rollouts_unjudged": "rollouts not judged", "samplers_lost": "samplers lost", "resumes": "resumed"}
VERDICTS = ("learner waited", "samplers waited", "all waited", "balanced")


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedWeights:
    """How much of one kind of tensor changed between two models, compared in bfloat16."""

    kind: str
    """q, k, v, o, gate, up, down, embedding, head, norm, bias, or the name of the module."""
    num_tensors: int
    num_entries: int
    num_unchanged: int

    @property
    def unchanged_fraction(self) -> float:
        return self.num_unchanged / self.num_entries


def summarize_run(run_dir: Path, moved: Mapping[str, Sequence[MovedWeights]] | None = None) -> Group:
    """Write `run_dir`/summary.json and return the same, ready to print.

    Args:
        moved: tables of `moved_weights` by what they compare. None: those between the first model and those the stages
            exported, as long as they are there, or else those of the previous summary.

    Raises:
        ValueError: when `run_dir` has no events: nothing was ever run there, or one of its files is damaged.
    """
    summary = collect(run_dir)
    path = run_dir / "summary.json"
    if moved is None:
        moved, summary["not_compared"] = moved_between(summary["models"])
    tables = {label: [asdict(row) for row in rows] for label, rows in moved.items()}
    if not tables and path.exists():
        tables = json.loads(path.read_text(encoding="utf-8"))["moved_weights"]
    summary["moved_weights"] = tables
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(json.dumps(plain(summary), indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)
    return render(summary)


# -- figures -----------------------------------------------------------------------------------------------------------


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything but the weights, as plain data."""
    events = list(read_rows(run_dir / FILES["event"]))
    if not events:
        raise ValueError(f"{run_dir} has no {FILES['event']}, or an empty one: it is not the directory of a run")
    run = _Steps(run_dir)
    evals = _learned(read_rows(run_dir / FILES["eval"]))
    named: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        named[event["event"]].append(event)
    ready_s = sum(event["seconds"] for event in named["ready"])
    wall_s = ready_s + sum(end - start for start, end in _sessions(events, run.times))
    return {
        "run_dir": str(run_dir),
        "error": events[-1]["error"]
        if events[-1]["event"] == "run_end"
        else "the run is still going on, or was killed",
        "num_steps": run.num_steps,
        "num_rollouts": run.num_rollouts,
        "evals": evals,
        "stages": {stage: _stage(stage, counts, evals) for stage, counts in run.stages.items()},
        "time": {
            "wall_s": wall_s,
            "startup_s": ready_s + sum(_startups(events)),
            "steps_s": {stage: counts["seconds"] for stage, counts in run.stages.items()},
            "workers_s": run.worker_seconds,
            "verdicts": {verdict: run.verdicts[verdict] for verdict in VERDICTS if run.verdicts[verdict]},
        },
        "failures": {
            "groups": dict(Counter(event["failure"] for event in named["group_failed"])),
            "rollouts_unjudged": sum(event["rollouts"] for event in named["rollouts_unjudged"]),
            "samplers_lost": len(named["sampler_lost"]),
            "resumes": sum(event["resumed_at"] is not None for event in named["run_start"]),
        },
        "models": {
            **({"start": named["ready"][0]["model"]} if named["ready"] and "model" in named["ready"][0] else {}),
            **{event["stage"]: event["path"] for event in named["export"]},
        },
        "checkpoint": named["checkpoint"][-1]["path"] if named["checkpoint"] else None,
        "wandb": named["wandb_started"][-1]["where"] if named["wandb_started"] else None,
    }


class _Steps:
    """Sums over metrics.jsonl, read once and row by row: it may be long."""

    def __init__(self, run_dir: Path) -> None:
        self.num_steps, self.num_rollouts = 0, 0
        self.times: list[float] = []
        self.verdicts: Counter[str] = Counter()
        self.stages: dict[str, Counter[str]] = defaultdict(Counter)
        self.worker_seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for row in read_rows(run_dir / FILES["step"]):
            self.num_steps += 1
            self.times.append(row["time"])
            num_rollouts, num_tokens = trained_on(row)
            sampled = "wait/verdict" in row
            self.stages[row["stage"]].update(
                steps=1,
                seconds=row["timing_s/step"],
                rollouts=num_rollouts if sampled else 0,
                response_tokens=num_tokens,
            )
            if sampled:
                self.num_rollouts += num_rollouts
                self.verdicts.update(verdict for verdict in VERDICTS if row["wait/verdict"].startswith(verdict))
            for key, value in row.items():
                if key.startswith("time/"):
                    _, worker, state = key.split("/")
                    self.worker_seconds[worker][state] += float(value)


def _sessions(events: Sequence[Mapping[str, Any]], step_times: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Start and end of each session, its start-up excluded; a killed one ends with the last row it wrote."""
    starts = [event["time"] for event in events if event["event"] == "run_start"]
    times = sorted([*(event["time"] for event in events), *step_times])
    for start, next_start in zip(starts, [*starts[1:], float("inf")], strict=True):
        yield start, max(t for t in times if start <= t < next_start)


def _startups(events: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Seconds from each start of a session to its first stage."""
    started: float | None = None
    for event in events:
        if event["event"] == "run_start":
            started = event["time"]
        elif event["event"] == "stage_start" and started is not None:
            yield event["time"] - started
            started = None


def _learned(rows: Iterator[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Per eval set, its evaluations before and after stages in order of version, with their gains."""
    keys = ("when", "step", "accuracy", "accuracy_se", "num_prompts", "num_samples", "temperature")
    learned: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["step"]):
        if row["when"] not in ("resume", "step"):
            gains = {key: row[key] for key in ("since_stage", "since_start") if key in row}
            learned[row["eval"]].append({key: row[key] for key in keys} | gains)
    return dict(sorted(learned.items()))


def _stage(name: str, counts: Mapping[str, float], evals: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """A stage's row: what it took, and per eval set the accuracy after it and at the evaluation before that."""
    learned = {}
    for eval_set, results in evals.items():
        for before, after in zip([None, *results], results, strict=False):
            if after["when"] == name:
                learned[eval_set] = {"accuracy": after["accuracy"], "accuracy_se": after["accuracy_se"]}
                if before is not None:
                    learned[eval_set]["accuracy_before"] = before["accuracy"]
                if "since_stage" in after:
                    learned[eval_set] |= {"gain": after["since_stage"]["mean"], "gain_se": after["since_stage"]["se"]}
    return {**counts, "evals": learned}


# -- weights -----------------------------------------------------------------------------------------------------------


def moved_weights(before_dir: Path, after_dir: Path) -> list[MovedWeights]:
    """Compares two models in bfloat16, a piece of one tensor of each in memory at a time.

    bfloat16 whatever they are stored in: it is what samplers usually serve and what the literature's update sparsity
    counts, and in float32 every trained entry moves.

    Raises:
        ValueError: as `analysis.stored.open_versions`.
    """
    import torch

    from rlpost.analysis.stored import open_versions
    from rlpost.core.weights import bits, in_model_order, weight_kind

    versions = open_versions([str(before_dir), str(after_dir)], dtype=torch.bfloat16)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name in versions.names:
        counts[weight_kind(name)].update(tensors=1, entries=versions.shape(name).numel())
        for before_N, after_N in versions.pieces(name):
            counts[weight_kind(name)]["unchanged"] += int((bits(before_N) == bits(after_N)).sum())
    return [
        MovedWeights(
            kind=kind,
            num_tensors=counts[kind]["tensors"],
            num_entries=counts[kind]["entries"],
            num_unchanged=counts[kind]["unchanged"],
        )
        for kind in in_model_order(counts)
    ]


def moved_between(models: Mapping[str, str]) -> tuple[dict[str, list[MovedWeights]], list[str]]:
    """`moved_weights` from each model to the next, as far as they still exist, and why others cannot be compared."""
    present = [(when, Path(path)) for when, path in models.items() if Path(path).is_dir()]
    moved: dict[str, list[MovedWeights]] = {}
    reasons: list[str] = []
    for (old, old_dir), (new, new_dir) in itertools.pairwise(present):
        try:
            moved[f"{old} -> {new}"] = moved_weights(old_dir, new_dir)
        except ValueError as error:
            reasons.append(str(error))
    return moved, reasons


# -- text --------------------------------------------------------------------------------------------------------------


def render(summary: Mapping[str, Any]) -> Group:
    """The summary for a terminal of 80 columns or more; only paths may be longer."""
    from rich.console import Group

    time = summary["time"]
    stages = "".join(f", {stage} {seconds:.0f} s" for stage, seconds in time["steps_s"].items())
    parts: list[Any] = [
        _heading("What was learned", "accuracy and gains in points, +- standard error"),
        _evals_table(summary["evals"]),
        _heading("Where the time went", f"{time['wall_s']:.0f} s: start-up {time['startup_s']:.0f} s{stages}"),
        _time_table(time["workers_s"]),
    ]
    if num_judged := sum(time["verdicts"].values()):
        shares = ", ".join(f"{verdict} in {count / num_judged:.0%}" for verdict, count in time["verdicts"].items())
        parts.append(f"Of {num_judged} steps on rollouts: {shares}.\n")
    for label, rows in summary["moved_weights"].items():
        parts += [_heading("Which weights moved", label), _moved_table(rows)]
    parts += [_heading("Weights not compared", reason) for reason in summary.get("not_compared", ())]
    parts += [_heading("Where everything is", summary["run_dir"]), _places(summary)]
    return Group(*parts)


def _heading(title: str, rest: str) -> Text:
    from rich.text import Text

    return Text(title, style="bold").append(f"  {rest}", style="not bold")


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
    return table


def _evals_table(evals: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    table = _table("eval set", "n", "after", "version", "accuracy", "gain", "in all")
    for name, results in evals.items():
        for number, result in enumerate(results):
            gains = [
                _points(result[key]["mean"], result[key]["se"], signed=True) if key in result else ""
                for key in ("since_stage", "since_start")
            ]
            accuracy = _points(result["accuracy"], result["accuracy_se"])
            label = ("", "") if number else (name, str(result["num_prompts"]))
            table.add_row(*label, result["when"], str(result["step"]), accuracy, *gains)
    if not evals:
        table.add_row("no evaluation was made")
    return table


def _points(value: float, error: float, *, signed: bool = False) -> str:
    return f"{100 * value:{'+' if signed else ''}.1f} +- {100 * error:.1f}"


def _time_table(workers_s: Mapping[str, Mapping[str, float]]) -> Table:
    table = _table("worker", "seconds", "share of each state")
    table.columns[2].justify, table.columns[2].no_wrap = "left", False
    for worker, states in sorted(workers_s.items()):
        total = sum(states.values())
        ordered = sorted(states.items(), key=lambda item: -item[1])
        table.add_row(worker, f"{total:.0f}", "  ".join(f"{state} {s / total:.0%}" for state, s in ordered if total))
    return table


def _moved_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("kind", "tensors", "entries", "moved", "unchanged in bfloat16")
    total = {key: sum(row[key] for row in rows) for key in ("num_tensors", "num_entries", "num_unchanged")}
    for row in [*rows, {"kind": "all", **total}]:
        unchanged = row["num_unchanged"] / row["num_entries"]
        table.add_row(
            row["kind"],
            str(row["num_tensors"]),
            f"{row['num_entries']:,}",
            f"{row['num_entries'] - row['num_unchanged']:,}",
            f"{100 * unchanged:.2f} %",
        )
    return table


def _places(summary: Mapping[str, Any]) -> Text:
    from rich.text import Text

    failures = summary["failures"]
    exports = {stage: path for stage, path in summary["models"].items() if stage != "start"}
    lines = [f"{summary['num_steps']} steps on {summary['num_rollouts']} rollouts"]
    if summary["error"]:
        lines.append(f"ended by: {summary['error']}")
    troubles = [f"groups failed ({kind}): {count}" for kind, count in failures["groups"].items()]
    troubles += [f"{what}: {failures[key]}" for key, what in RARE.items() if failures[key]]
    if troubles:
        lines.append(", ".join(troubles))
    lines.append(f"figures: {', '.join(FILES.values())}, summary.json")
    if summary["wandb"]:
        lines.append(f"wandb: {summary['wandb']}")
    if summary["checkpoint"]:
        lines.append(f"checkpoint: {summary['checkpoint']}")
    lines += [f"model after {stage}: {path}" for stage, path in exports.items()]
    if exports:
        last = list(exports.values())[-1]
        lines.append(f'try it: vllm serve {last}, or AutoModelForCausalLM.from_pretrained("{last}")')
    return Text("\n".join(f"  {line}" for line in lines))
