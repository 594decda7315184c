"""The files are complete whatever wandb does; a resume cuts them; the terminal gets what a person needs."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rlpost.core.metrics import StepReport, Tally
from rlpost.pipeline.ports import Export
from rlpost.pipeline.step_metrics import Published, StepRecord, step_metrics
from rlpost.progress import EVENT_LINES, Progress, eval_line, event_line, step_line
from rlpost.tracking import FILES, RunTracker, WandbOptions, plain, read_rows, resolve_mode, run_ended
from rlpost.types import GroupSummary, Judgement, Prompt

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


class FakeRun:
    """Enforces what wandb drops silently: every axis only moves forward, and no key has two axes."""

    def __init__(self, module: FakeWandb, settings: Mapping[str, Any]) -> None:
        self.module, self.settings = module, settings
        self.id, self.url = settings["id"], "https://example.org/run"
        self.rows: list[dict[str, float]] = []
        self.starting_step = 0
        self.summary: dict[str, float] = {}
        self.axes: dict[str, str | None] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert self.axes.setdefault(name, step_metric) == step_metric
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.module.fail_at("log")
        assert threading.current_thread().name == "wandb"
        (axis,) = {self.axes[f"{key.split('/')[0]}/*"] for key in row if key not in ("train/step", "eval/step")}
        assert axis in row and axis in self.axes
        assert all(isinstance(value, int | float) for value in row.values()), row
        previous = [earlier[axis] for earlier in self.rows if axis in earlier]
        assert not previous or row[axis] >= previous[-1], "wandb would drop this row"
        self.rows.append(row)

    def finish(self) -> None:
        self.module.fail_at("finish")
        self.finished = True


class FakeWandb:
    """Stands in for the module; `broken` names the call that raises, `hang` the one that never returns."""

    def __init__(self, broken: str = "", hang: str = "") -> None:
        self.broken, self.hang = broken, hang
        self.runs: list[FakeRun] = []
        self.gate = threading.Event()

    def fail_at(self, phase: str) -> None:
        if self.hang == phase:
            self.gate.wait()
        if self.broken == phase:
            raise OSError(f"wandb broke in {phase}")

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def Image(self, path: str) -> int:
        return len(Path(path).read_bytes())

    def init(self, **settings: Any) -> FakeRun:
        self.fail_at("init")
        self.runs.append(FakeRun(self, settings))
        return self.runs[-1]

    def teardown(self) -> None:
        self.gate.set()


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def step_row(step: int, stage: str = "math", **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "stage": stage,
        "actor/pg_loss": 0.5,
        "reward/mean": 0.25,
        "response_length/mean": 8.0,
        "timing_s/step": 0.5,
        "perf/rollouts_per_s": 64.0,
        "staleness/group_max": 1,
        "wait/verdict": "learner waited 40% for rollouts: add samplers or raise max_staleness",
        **more,
    }


def eval_row(step: int) -> dict[str, Any]:
    return {
        "eval": "math",
        "when": "warmup",
        "step": step,
        "accuracy": 0.461,
        "accuracy_se": 0.016,
        "num_prompts": 512,
        "num_samples": 1,
        "temperature": 1.0,
        "outcomes": {"correct": 236, "wrong": 276},
    }


def tracker_of(run_dir: Path, mode: str = "offline", **more: Any) -> RunTracker:
    options = WandbOptions(mode=mode)  # type: ignore[arg-type]
    more.setdefault("console", Console(file=io.StringIO()))
    return RunTracker(run_dir, name="run", config={"seed": 0}, wandb=options, **more)


def steps_in(run_dir: Path, kind: str = "step") -> list[int]:
    return [row["step"] for row in read_rows(run_dir / FILES[kind])]


def events_in(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir / FILES["event"]) if row["event"] == name]


# -- the mirror --------------------------------------------------------------------------------------------------------


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeWandb) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_every_number_reaches_wandb_on_its_own_axis_and_no_text_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation of version 1 arrives after steps 1 to 3: on one shared counter wandb would drop it."""
    fake = use(monkeypatch, FakeWandb())
    with tracker_of(tmp_path) as tracker:
        for step in (1, 2, 3):
            tracker.log("step", step_row(step, **{"actor/entropy": torch.tensor(0.25), "time/sampler-0/wait": 1.0}))
        tracker.log("eval", eval_row(1))
        tracker.log("step", step_row(4))
    (run,) = fake.runs
    assert run.finished and run.settings["mode"] == "offline" and run.settings["dir"] == str(tmp_path)
    assert [row.get("train/step") for row in run.rows] == [1, 2, 3, None, 4]
    assert run.rows[0]["actor/entropy"] == 0.25
    assert run.rows[3] == {
        "eval/step": 1,
        "eval/math/accuracy": 0.461,
        "eval/math/accuracy_se": 0.016,
        "eval/math/num_prompts": 512,
        "eval/math/num_samples": 1,
        "eval/math/temperature": 1.0,
        "eval/math/outcomes/correct": 236,
        "eval/math/outcomes/wrong": 276,
    }
    assert run.axes["actor/*"] == "train/step" and run.axes["eval/*"] == "eval/step"
    assert not {"stage", "wait/verdict", "time", "step"} & {key for row in run.rows for key in row}


@pytest.mark.parametrize("phase", ["init", "log", "finish"])
def test_wandb_that_breaks_loses_no_row_and_is_reported_once(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeWandb(broken=phase))
    output = io.StringIO()
    with tracker_of(tmp_path, console=Console(file=output)) as tracker:
        for step in range(1, 101):
            tracker.log("step", step_row(step))
            if step % 10 == 0:
                tracker.log("eval", eval_row(step))
    assert steps_in(tmp_path) == list(range(1, 101))
    assert steps_in(tmp_path, "eval") == list(range(10, 101, 10))
    (failure,) = events_in(tmp_path, "wandb_failed")
    assert f"OSError: wandb broke in {phase}" in failure["detail"]
    assert output.getvalue().count("wandb is off") == 1
    assert events_in(tmp_path, "run_end")[0]["error"] is None


def test_wandb_that_is_not_installed_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with tracker_of(tmp_path) as tracker:
        tracker.log("step", step_row(1))
    assert steps_in(tmp_path) == [1]
    (failure,) = events_in(tmp_path, "wandb_failed")
    assert "ModuleNotFoundError" in failure["detail"]


@pytest.mark.parametrize("phase", ["init", "log", "finish"])
def test_wandb_that_hangs_holds_up_neither_a_step_nor_the_end(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeWandb(hang=phase))
    started = time.monotonic()
    tracker = tracker_of(tmp_path)
    for step in range(1, 51):
        tracker.log("step", step_row(step))
    tracker.close(deadline_s=0.2)
    assert time.monotonic() - started < 20.0
    assert steps_in(tmp_path) == list(range(1, 51))
    (failure,) = events_in(tmp_path, "wandb_failed")
    assert "0.2 s" in failure["detail"]


def test_more_rows_than_the_queue_holds_turn_the_mirror_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlpost.mirror.MAX_QUEUED_ROWS", 5)
    fake = use(monkeypatch, FakeWandb(hang="init"))
    tracker = tracker_of(tmp_path)
    for _ in range(20):  # of which wandb gets none
        tracker.log("eval_sample", {"eval": "math", "when": "step", "step": 1, "response": "x"})
    assert not events_in(tmp_path, "wandb_failed")
    for step in range(1, 21):
        tracker.log("step", step_row(step))
    fake.gate.set()
    tracker.close()
    assert steps_in(tmp_path) == list(range(1, 21)) and steps_in(tmp_path, "eval_sample") == [1] * 20
    assert [event["detail"] for event in events_in(tmp_path, "wandb_failed")] == ["5 rows wait for it"]


def test_disabled_never_touches_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeWandb())
    with tracker_of(tmp_path, mode="disabled") as tracker:
        tracker.log("step", step_row(1))
    assert not fake.runs and not (tmp_path / "wandb.jsonl").exists()


def test_online_without_a_login_says_how_to_log_in_and_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = use(monkeypatch, FakeWandb())
    with tracker_of(tmp_path, mode="online"):
        pass
    assert not fake.runs
    assert "wandb login" in events_in(tmp_path, "wandb_failed")[0]["detail"]


def test_auto_is_online_only_for_somebody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode("auto") == "offline"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"


def test_a_run_goes_on_in_its_wandb_run_unless_that_was_uploaded_or_the_mode_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process shows the files from the start, a picture and not-a-number included, where nothing is held of them."""
    fake = use(monkeypatch, FakeWandb())

    def go_on(mode: str = "offline", resume_at_step: int | None = 2) -> FakeRun:
        with tracker_of(tmp_path, mode=mode, resume_at_step=resume_at_step) as tracker:
            for step in range((resume_at_step or 0) + 1, 4):
                tracker.log("step", step_row(step) | {"actor/lr": math.nan})
                tracker.show("unchanged", step, b"png")
        run = fake.runs[-1]
        assert [row["train/step"] for row in run.rows if "train/step" in row] == [1, 2, 3]
        assert [row["analysis/unchanged_picture"] for row in run.rows if "analysis/step" in row] == [3, 3, 3]
        assert all(math.isnan(row["actor/lr"]) for row in run.rows if "train/step" in row)
        return run

    first = go_on(resume_at_step=None)
    written = tmp_path / "wandb" / f"offline-run-20260101_000000-{first.id}"
    written.mkdir(parents=True)
    assert go_on().id == first.id and not written.exists()
    written.mkdir()
    (written / f"run-{first.id}.wandb.synced").touch()
    uploaded = go_on()
    assert uploaded.id != first.id and written.exists()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert go_on("online").id not in (first.id, uploaded.id)


# -- the files ---------------------------------------------------------------------------------------------------------


def test_a_row_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path, mode="disabled")
    for kind, file in FILES.items():
        tracker.log(kind, {"event": "x"} if kind == "event" else eval_row(1) if kind == "eval" else step_row(1))
        row = json.loads((tmp_path / file).read_text().splitlines()[-1])
        assert abs(row["time"] - time.time()) < 5.0


def test_rows_of_several_threads_stay_whole(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path, mode="disabled")

    def write(thread: int) -> None:
        for number in range(50):
            tracker.log("rollout", {"step": number, "response": f"{thread}" * 2000})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(read_rows(tmp_path / "rollouts.jsonl"))) == 200


def test_a_resume_cuts_every_file_back_to_its_checkpoint(tmp_path: Path) -> None:
    """Killed at step 5 of which the last checkpoint was step 3, in the middle of writing a row."""
    tracker = tracker_of(tmp_path, mode="disabled")
    for step in range(1, 6):
        tracker.log("step", step_row(step))
        tracker.log("rollout", {"step": step, "response": "x"})
    for when, step in (("warmup", 2), ("step", 3), ("warmup", 3), ("resume", 3), ("step", 4)):
        tracker.log("eval_sample", {"eval": "math", "when": when, "step": step, "response": "x"})
        tracker.log("eval", {**eval_row(step), "when": when})
    tracker.log(
        "eval_sample", {"eval": "code", "when": "step", "step": 3, "response": "of an evaluation that was cut off"}
    )
    tracker.show("unchanged", 3, b"kept")
    tracker.show("unchanged", 4, b"cut")
    tracker.log("event", {"event": "group_failed", "prompt": "p", "failure": "worker_lost", "detail": "d"})
    tracker.log("event", {"event": "checkpoint", "step": 3, "path": "a"})
    tracker.log("event", {"event": "checkpoint", "step": 5, "path": "b"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "sta')
    resumed = tracker_of(tmp_path, mode="disabled", resume_at_step=3)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert steps_in(tmp_path, "rollout") == [1, 2, 3]
    # Of the checkpoint's version, the evaluation that the resumed run will not make again.
    stay = [("math", "warmup", 2), ("math", "step", 3)]
    for kind in ("eval", "eval_sample"):
        assert [(row["eval"], row["when"], row["step"]) for row in read_rows(tmp_path / FILES[kind])] == stay
    assert [event["path"] for event in events_in(tmp_path, "checkpoint")] == ["a"]
    assert len(events_in(tmp_path, "group_failed")) == 1
    assert events_in(tmp_path, "run_start")[1]["resumed_at"] == 3
    resumed.log("step", step_row(4))
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES.values(), "pictures"])
    assert [path.read_bytes() for path in (tmp_path / "pictures").iterdir()] == [b"kept"]


def test_a_new_run_refuses_the_directory_of_another(tmp_path: Path) -> None:
    tracker_of(tmp_path, mode="disabled").log("step", step_row(1))
    with pytest.raises(ValueError, match="--resume"):
        tracker_of(tmp_path, mode="disabled")
    assert steps_in(tmp_path) == [1]


def test_a_damaged_line_is_named_and_nothing_is_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        tracker_of(tmp_path, mode="disabled", resume_at_step=1)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def test_a_run_has_ended_only_when_it_ended_well_and_last_of_all(tmp_path: Path) -> None:
    assert not run_ended(tmp_path)
    for resume_at_step, error, ended in ((None, "interrupted", False), (0, None, True)):
        tracker = tracker_of(tmp_path, mode="disabled", resume_at_step=resume_at_step)
        assert not run_ended(tmp_path)
        tracker.close(error)
        assert run_ended(tmp_path) == ended


def test_numbers_json_cannot_write_come_back_as_they_were() -> None:
    row = plain({"loss": math.nan, "ratio": -math.inf, "lr": torch.tensor(0.5), "path": Path("a"), "ids": (1, 2)})
    assert row == {"loss": "nan", "ratio": "-inf", "lr": 0.5, "path": "a", "ids": [1, 2]}
    assert math.isnan(float(row["loss"])) and float(row["ratio"]) == -math.inf


def test_the_end_names_the_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), tracker_of(tmp_path, mode="disabled"):
        raise RuntimeError("diverged")
    assert events_in(tmp_path, "run_end")[0]["error"] == "RuntimeError: diverged"


# -- the terminal ------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def screen() -> Iterator[Console]:
    yield Console(file=io.StringIO(), width=80)


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_step_line_averages_over_the_steps_it_stands_for() -> None:
    """Rewards 0.25 and 0.75; 0.5 s at 64 rollouts/s and 1.5 s at 32: 80 rollouts in 2 s."""
    rows = [
        step_row(441) | {"actor/entropy": 0.3},
        step_row(
            442, **{"reward/mean": 0.75, "timing_s/step": 1.5, "perf/rollouts_per_s": 32.0, "staleness/group_max": 0}
        ),
    ]
    assert step_line(rows, "2/160") == (
        "math 2/160 | reward 0.500 | entropy 0.300 | length 8.0 | 40 rollouts/s | age <= 1"
        " | learner waited 40% for rollouts: add samplers or raise max_staleness"
    )


def test_a_supervised_step_shows_its_loss() -> None:
    row = {key: value for key, value in step_row(1, "warmup").items() if key.startswith(("st", "act", "tim", "perf"))}
    del row["staleness/group_max"]
    assert step_line([row], "1/440") == "warmup 1/440 | loss 0.500 | 64 demonstrations/s"


def test_an_evaluation_reads_like_a_sentence() -> None:
    line = "eval math 46.1 % +- 1.6 (n = 512, T = 1.0) after stage warmup, version 440"
    assert eval_line(eval_row(440)) == line
    gained = eval_line({**eval_row(440), "since_start": {"mean": 0.031, "se": 0.012}})
    assert gained == f"{line}, +3.1 +- 1.2 since the start"
    many = eval_line({**eval_row(0), "when": "start", "num_samples": 4})
    assert many == "eval math 46.1 % +- 1.6 (n = 512 x 4, T = 1.0) before training, version 0"


def test_lines_come_every_two_seconds_and_at_both_ends_of_a_stage(clock: Clock, screen: Console) -> None:
    """Half-second steps: step 1, then one line per 2 s (5, 9), the stage's last (10), and the next stage's first."""
    progress = Progress([("warmup", 10), ("math", 20)], screen, clock)
    for step in range(1, 12):
        clock.now = step * 0.5
        progress.show("step", step_row(step, "warmup" if step <= 10 else "math"))
    places = [line.split("  ")[1].split(" |")[0] for line in lines_of(screen)]
    assert places == ["warmup 1/10", "warmup 5/10", "warmup 9/10", "warmup 10/10", "math 1/20"]
    assert lines_of(screen)[1].startswith("0:00:02  ")


def test_a_stage_that_moves_on_is_counted_to_its_new_end_and_the_next_from_there(clock: Clock, screen: Console) -> None:
    progress = Progress([("warmup", 10), ("math", 20)], screen, clock)
    progress.show("step", step_row(1, "warmup"))
    moves = {"event": "stage_moves_on", "stage": "warmup", "step": 1, "last": 2, "reason": "hours"}
    progress.show("event", moves)
    for step in (2, 3):
        progress.show("step", step_row(step, "warmup" if step <= 2 else "math"))
    shown = [line.split("  ")[1].split(" |")[0] for line in lines_of(screen)]
    assert shown == ["warmup 1/10", "stage warmup is to end at version 2: hours", "warmup 2/2", "math 1/20"]


def test_a_long_run_gets_fewer_lines(clock: Clock, screen: Console) -> None:
    """After an hour a line stands for 30 s: one-second steps 3601..3700 give three or four lines, not fifty."""
    progress = Progress([("math", 10**6)], screen, clock)
    clock.now = 3600.0
    progress.show("step", step_row(3600))
    for step in range(3601, 3701):
        clock.now = float(step)
        progress.show("step", step_row(step))
    assert 4 <= len(lines_of(screen)) <= 5


def test_a_flood_of_failures_is_thinned_and_counted(clock: Clock, screen: Console) -> None:
    progress = Progress([], screen, clock)
    for number in range(20):
        progress.show("event", {"event": "group_failed", "prompt": f"p{number}", "failure": "f", "detail": "d"})
    clock.now = 11.0
    progress.show("event", {"event": "group_failed", "prompt": "late", "failure": "f", "detail": "d"})
    lines = [line.split("  ")[1] for line in lines_of(screen)]
    assert lines == [
        "group of p0 failed (f): d",
        "group of p1 failed (f): d",
        "group of p2 failed (f): d",
        "17 more group_failed: see events.jsonl",
        "group of late failed (f): d",
    ]


def test_what_was_held_back_is_printed_at_the_end(clock: Clock, screen: Console) -> None:
    progress = Progress([("math", 100)], screen, clock)
    for step in (1, 2, 3):
        progress.show("step", step_row(step))
    progress.flush()
    assert [line.split("  ")[1].split(" |")[0] for line in lines_of(screen)] == ["math 1/100", "math 3/100"]


def test_every_event_the_pipeline_sends_has_a_line() -> None:
    """Found by reading the sources for calls of _event, _on_event and on_event with a literal name."""
    package = Path(__file__).parents[1] / "rlpost"
    pattern = re.compile(r"(?:_event\(|\"event\": )\s*\"(\w+)\"")
    sent = {name for file in package.rglob("*.py") for name in pattern.findall(file.read_text())}
    assert {"group_failed", "stage_start", "sampler_lost", "checkpoint", "ready", "run_end"} <= sent
    assert sent - set(EVENT_LINES) == {"run_end"}
    assert event_line({"event": "run_end", "error": None, "time": 0.0})[0] == "run ended"
    assert event_line({"event": "new", "a": 1, "time": 0.0})[0] == "new: a = 1"


def test_a_run_outlives_its_terminal(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with tracker_of(tmp_path, mode="disabled", console=Console(file=Gone())) as tracker:
        tracker.log("step", step_row(1))
        tracker.log("step", step_row(2))
    assert steps_in(tmp_path) == [1, 2]


def test_a_terminal_without_the_character_shows_its_code(clock: Clock) -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    Progress([], console, clock).show("event", {"event": "stage_start", "stage": "d\u00e9but", "step": 0})
    assert b"stage d\\xe9but starts" in raw.getvalue()


# -- docs/metrics.md ---------------------------------------------------------------------------------------------------


def documented(section: str) -> list[str]:
    """The first column of the table under a heading of docs/metrics.md."""
    body = DOCS.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in body.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in cell.replace("`", "").replace(" ", "").split(",")]


def matches(key: str, pattern: str) -> bool:
    """Whether `key` is one of the keys `pattern` stands for, <...> being any name."""
    regex = "[^/]+".join(re.escape(text) for text in re.split(r"<\w+>", pattern))
    return re.fullmatch(regex, key) is not None


class Group:
    """A finished group of two rollouts of a task, one right and one cut."""

    def __init__(self, task: str, oldest_version: int) -> None:
        self.prompt = Prompt(id=task, token_ids=(1,), task=task, reference={})
        self.summary = GroupSummary(
            prompt_id=task,
            num_tokens_G=(3, 5),
            num_prompt_tokens=1,
            finish_reasons_G=("stop", "length"),
            temperature=1.0,
            surprisals_G=(1.0, 3.0),
            oldest_version=oldest_version,
            newest_version=oldest_version,
        )
        right = Judgement(
            reward=1.0,
            outcome="correct",
            parts={"accuracy": 1.0, "format": 1.0},
            flags=("frames",),
            seconds=0.3,
            queued_s=0.1,
            tier="namespace",
            second_opinion=False,
        )
        self.judgements = (right, Judgement(reward=0.0, outcome="no_answer"))
        self.advantages_G = (1.0, -1.0)


def full_record() -> StepRecord:
    """A step with everything that can be measured: two tasks, two ages, a reference, pairs, a publish."""
    tally = Tally(maxima={"gap": 0.5, "ratio": 1.5, "age": 3.0})
    names = (
        "loss",
        "reference_kl",
        "entropy",
        "kl_k3",
        "gap",
        "ratio_out",
        "clipped",
        "clipped_low",
        "clipped_dual",
        "weight_truncated",
        "weight_masked",
        "pairs",
        "pairs_skipped",
        "pairs_right",
        "margin",
        "chosen_logprob",
        "rejected_logprob",
    )
    tally.add(tokens=16.0, **dict.fromkeys(names, 1.0))
    tally.add(**{f"{name}_age_{age}": 4.0 for name in ("tokens", "gap") for age in range(4)})
    tally.mismatch_histogram[10] = 16.0
    return StepRecord(
        step=8,
        stage="math",
        sampled=True,
        lr=1e-4,
        report=StepReport(grad_norm=1.0, tally=tally),
        groups=(Group("math", 7), Group("code", 5)),
        seconds=2.0,
        evaluating_s=0.0,
        waited_s=0.5,
        buffer={"in_flight": 1, "buffered": 2, "admitted": 9, "trained": 4, "filtered": 1, "failed": 1},
        published=Published(
            export=Export(
                version=7, base=6, handles=(None,), num_bytes=9, full_bytes=200, num_changed=10, num_values=100
            ),
            export_s=0.1,
            update_s=0.2,
        ),
        worker_seconds={"learner": {"wait": 1.0, "begin_stage": 1.0}, "sampler-0": {"generate": 2.0}},
    )


def critic_record() -> StepRecord:
    """The same with a critic in place of advantages from groups."""
    record = full_record()
    names = ("value", "return", "return_error", "return_error_squared", "critic_loss")
    record.report.tally.add(return_count=16.0, return_squared=32.0, **dict.fromkeys(names, 1.0))
    return dataclasses.replace(record, report=dataclasses.replace(record.report, critic_grad_norm=2.0))


def unpaired_record() -> StepRecord:
    """The same with responses that are desirable or not in place of pairs."""
    record = full_record()
    tally = record.report.tally
    tally.sums = {key: value for key, value in tally.sums.items() if "pairs" not in key}
    names = ("responses_right", "responses_skipped", "desirable", "desirable_score", "undesirable_score")
    tally.add(responses=2.0, **dict.fromkeys(names, 1.0))
    return record


def test_every_key_of_a_step_is_documented_and_nothing_else_is() -> None:
    records = full_record(), critic_record(), unpaired_record()
    produced = {"time"}.union(*(step_metrics(record) for record in records))
    patterns = documented("metrics.jsonl")
    assert not {key for key in produced if not any(matches(key, pattern) for pattern in patterns)}
    assert not {pattern for pattern in patterns if not any(matches(key, pattern) for key in produced)}


def test_every_event_is_documented_and_nothing_else_is() -> None:
    assert set(documented("events.jsonl")) == {*EVENT_LINES, "run_end"}


def test_with_a_critic_groups_of_equal_rewards_are_not_reported_as_without_signal() -> None:
    plain, critic = step_metrics(full_record()), step_metrics(critic_record())
    assert "reward/frac_zero_std" in plain and not any(key.startswith("critic/") for key in plain)
    assert "reward/frac_zero_std" not in critic and critic["critic/grad_norm"] == 2.0


def test_how_verdicts_came_about_is_reported_by_task() -> None:
    """Two rollouts of each task, the first with 0.3 s, a flag and a second path that disagrees, the other with nothing."""
    row = step_metrics(full_record())
    assert row["flag/frames"] == 0.5
    for task in ("math", "code"):
        assert (row[f"verifier/{task}/seconds_p50"], row[f"verifier/{task}/seconds_p95"]) == (0.0, 0.3)
        assert row[f"verifier/{task}/queued_s_p95"] == 0.1
        assert row[f"verifier/{task}/tier"] == "namespace"
        assert (row[f"verifier/{task}/num_regraded"], row[f"verifier/{task}/disagreement"]) == (1, 1.0)
    assert row["reward/accuracy/mean"] == 1.0, "of the one rollout that has the part"
