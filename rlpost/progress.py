"""A run on the terminal: plain lines, as useful in a log file. One every two seconds or so, fewer in a long run."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

MIN_INTERVAL_S, MAX_INTERVAL_S, LINES_PER_RUN = 2.0, 30.0, 50
BURST, WINDOW_S = 3, 10.0
"""Of each frequent event, so many lines are shown in so many seconds; the rest is counted."""

EVENT_LINES = {
    "run_start": ("run {run} in {run_dir}", "bold"),
    "data_left_out": ("data {data}: {kept} rows kept, left out: {reasons}", "yellow"),
    "ready": ("workers ready after {seconds:.1f} s", ""),
    "stage_start": ("stage {stage} starts at version {step}", "bold cyan"),
    "stage_moves_on": ("stage {stage} is to end at version {last}: {reason}", "bold cyan"),
    "stage_end": ("stage {stage} ends at version {step}", "bold cyan"),
    "subnetwork": ("stage {stage} trains {density:.2%} of the entries", ""),
    "prompts_retired": ("stage {stage}: {left} prompts have become easy and leave, {remain} remain", ""),
    "sampler_lost": ("{worker} was lost during {phase}: {detail}", "bold red"),
    "sampler_restarted": ("{worker} is back with version {version}", "green"),
    "update_refused": ("{worker} refused version {version}: {detail}", "bold yellow"),
    "group_failed": ("group of {prompt} failed ({failure}): {detail}", "yellow"),
    "rollouts_unjudged": ("{rollouts} rollouts of {prompt} could not be judged: {detail}", "yellow"),
    "evaluation_cut": ("evaluation of version {step} was cut off", "yellow"),
    "evaluation_skipped": ("evaluation of version {step} left out: that of version {running} goes on", "yellow"),
    "stragglers_deferred": ("step {step} goes on without its stragglers; they train later", "yellow"),
    "checkpoint": ("checkpoint of step {step} written to {path}", ""),
    "export": ("model after stage {stage} written to {path}", ""),
    "report": ("report of stage {stage} written to {path}", ""),
    "observer_failed": ("versions are not measured from here: {detail}. The run goes on", "bold yellow"),
    "wandb_started": ("wandb run {id}: {where}", ""),
    "wandb_failed": ("wandb is off from here: {detail}. The files in the run directory go on", "bold yellow"),
}
FREQUENT = ("group_failed", "rollouts_unjudged", "stragglers_deferred", "evaluation_skipped")


class Progress:
    """Decides which rows deserve a line, and prints it. When nobody can read any more it falls silent.

    Args:
        stages: name and number of steps of each stage; a stage it does not know is shown without its total.
        console: standard output by default.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, int]] = (),
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if console is None:
            from rich.console import Console

            console = Console()
        self._console, self._clock = console, clock
        self._num_steps = dict(stages)
        assert len(self._num_steps) == len(stages), f"two stages have the same name: {[name for name, _ in stages]}"
        self._started = self._last_line = clock()
        self._pending: list[Mapping[str, Any]] = []
        self._stage: str | None = None
        self._windows: dict[str, float] = {}
        self._seen: Counter[str] = Counter()

    def show(self, kind: str, row: Mapping[str, Any]) -> None:
        """Print what deserves a line; rollouts do not."""
        if kind == "step":
            self._step(row)
        elif kind == "eval":
            self._print(eval_line(row), "bold")
        elif kind == "event":
            self._event(row)

    def flush(self) -> None:
        """Print what has been held back."""
        if self._pending:
            self._print_steps()
        for name in list(self._seen):
            self._open_window(name)

    def _step(self, row: Mapping[str, Any]) -> None:
        self._pending.append(row)
        now = self._clock()
        interval = min(max((now - self._started) / LINES_PER_RUN, MIN_INTERVAL_S), MAX_INTERVAL_S)
        done, total = self._place(row)
        if row["stage"] != self._stage or done == total or now - self._last_line >= interval:
            self._print_steps()
            self._stage = row["stage"]

    def _print_steps(self) -> None:
        done, total = self._place(self._pending[-1])
        self._print(step_line(self._pending, f"{done}/{total}" if total else f"step {done}"))
        self._pending, self._last_line = [], self._clock()

    def _place(self, row: Mapping[str, Any]) -> tuple[int, int | None]:
        stage = row["stage"]
        return row["step"] - self._first_step(stage), self._num_steps.get(stage)

    def _first_step(self, stage: str) -> int:
        names = list(self._num_steps)
        return sum(self._num_steps[name] for name in names[: names.index(stage)]) if stage in names else 0

    def _event(self, row: Mapping[str, Any]) -> None:
        name = row["event"]
        if name == "stage_moves_on" and row["stage"] in self._num_steps:
            self._num_steps[row["stage"]] = row["last"] - self._first_step(row["stage"])
        if name in FREQUENT or name not in EVENT_LINES:
            if self._clock() - self._windows.get(name, -math.inf) >= WINDOW_S:
                self._open_window(name)
            self._seen[name] += 1
            if self._seen[name] > BURST:
                return
        self._print(*event_line(row))

    def _open_window(self, name: str) -> None:
        hidden = self._seen.pop(name, 0) - BURST
        self._windows[name] = self._clock()
        if hidden > 0:
            self._print(f"{hidden} more {name}: see events.jsonl", "yellow")

    def _print(self, line: str, style: str = "") -> None:
        from rich.text import Text

        if self._console.quiet:
            return
        seconds = int(self._clock() - self._started)
        stamp = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        # A prompt's name may hold characters that this terminal has no code for.
        encoding = self._console.encoding
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._console.print(Text(f"{stamp}  ").append(line, style), soft_wrap=True)
        except (OSError, SystemExit):  # the reader is gone: rich turns a broken pipe into SystemExit
            self._console.quiet = True


def step_line(rows: Sequence[Mapping[str, Any]], place: str) -> str:
    """One line for the steps since the last one: means over them, the greatest age, the latest verdict."""
    last = rows[-1]

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if key in row]
        return sum(values) / len(values) if values else None

    parts = [f"{last['stage']} {place}"]
    sampled = "reward/mean" in last
    quality = {"reward": "reward/mean", "entropy": "actor/entropy"} if sampled else {"loss": "actor/pg_loss"}
    for label, key in quality.items():
        if (value := mean(key)) is not None:
            parts.append(f"{label} {value:.3f}")
    if (length := mean("response_length/mean")) is not None:
        cut = mean("response_length/clip_ratio")
        parts.append(f"length {length:.1f}" + (f" ({cut:.0%} cut)" if cut else ""))
    if seconds := sum(row["timing_s/step"] for row in rows):
        num_rollouts = sum(row["perf/rollouts_per_s"] * row["timing_s/step"] for row in rows)
        parts.append(f"{num_rollouts / seconds:.0f} {'rollouts' if sampled else 'demonstrations'}/s")
    if ages := [row["staleness/group_max"] for row in rows if "staleness/group_max" in row]:
        parts.append(f"age <= {max(ages)}")
    if "wait/verdict" in last:
        parts.append(last["wait/verdict"])
    return " | ".join(parts)


EVALUATED = {"start": "before training", "resume": "on resuming", "step": "beside training"}
"""When, where it was not after the stage of that name."""


def eval_line(row: Mapping[str, Any]) -> str:
    """One evaluation, with its standard error and what it was measured on."""
    samples = f" x {row['num_samples']}" if row["num_samples"] > 1 else ""
    when = EVALUATED.get(row["when"], f"after stage {row['when']}")
    line = (
        f"eval {row['eval']} {100 * row['accuracy']:.1f} % +- {100 * row['accuracy_se']:.1f}"
        f" (n = {row['num_prompts']}{samples}, T = {row['temperature']:.1f}) {when}, version {row['step']}"
    )
    if gain := row.get("since_start"):
        line += f", {100 * gain['mean']:+.1f} +- {100 * gain['se']:.1f} since the start"
    return line


def event_line(row: Mapping[str, Any]) -> tuple[str, str]:
    """The text and the style of an event; one that `EVENT_LINES` does not know is shown as it is."""
    name = row["event"]
    fields = {key: value for key, value in row.items() if key not in ("event", "time")}
    if name == "run_end":
        return (f"run ended by {row['error']}", "bold red") if row["error"] else ("run ended", "bold")
    if name not in EVENT_LINES:
        return f"{name}: " + ", ".join(f"{key} = {value}" for key, value in fields.items()), ""
    text, style = EVENT_LINES[name]
    return text.format_map(fields), style
