"""What wandb holds of a run: read from the file that an offline run leaves, and from what its service is sent.

The service is a stand-in on loopback (`wandb_service`): wandb itself is real, in processes of its own, which can be killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlpost.tracking import FILES, read_rows
from tests.wandb_service import WandbService, records

pytest.importorskip("wandb")
pytestmark = pytest.mark.timeout(180)

SESSION = """
import sys, time
from pathlib import Path
from rlpost.summary import collect
from rlpost.tracking import RunTracker, WandbOptions

run_dir, mode, attempt, resume, last, end = sys.argv[1:]
run_dir, attempt, resume, last = Path(run_dir), int(attempt), int(resume) if int(attempt) > 1 else None, int(last)
session = {"code": {"version": f"attempt {attempt}"}}
options = WandbOptions(mode=mode, table_every=2)
tracker = RunTracker(
    run_dir, name="run", config={"seed": 7}, session=session, wandb=options, resume_at_step=resume, summarize=collect
)
(run_dir / "recipe.json").write_text("{}")
tracker.log("event", {"event": "ready", "seconds": 1.0})
for step in range((resume or 0) + 1, last + 1):
    tracker.log("step", {
        "step": step, "stage": "math", "actor/pg_loss": 100.0 * attempt + step, "timing_s/step": 2.0,
        "perf/rollouts_per_s": 4.0, "perf/tokens_per_s": 16.0, "wait/verdict": "balanced: nobody waited",
    })
    tracker.log("rollout", {
        "step": step, "stage": "math", "prompt_id": f"p{step}", "prompt": "1+1=", "response": "2", "outcome": "correct",
        "reward": 1.0, "advantage": 0.5, "versions": [[step - 1, 0, 1]],
    })
    if step in (2, 4):
        tracker.log("eval", {
            "eval": "math", "when": "start" if step == 2 else "math", "step": step, "accuracy": step / 8,
            "accuracy_se": 0.0, "num_prompts": 8, "num_samples": 1, "temperature": 1.0,
            "pass_at": {"2": {"mean": 0.75, "se": 0.1}},
            **({"since_stage": {"mean": 0.25, "se": 0.125}} if step == 4 else {}),
        })
        tracker.log("eval_sample", {"eval": "math", "when": "start" if step == 2 else "math", "step": step, "number": 0})
if end == "hang":
    time.sleep(60.0)
if end == "complete":
    for stage, files in (("math", ["model.safetensors"]), ("lora", ["model.safetensors", "adapter/adapter_config.json"])):
        for file in files:
            path = run_dir / "exports" / stage / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
        tracker.log("event", {"event": "export", "stage": stage, "path": str(run_dir / "exports" / stage)})
    (run_dir / "math.html").write_text("report")
    tracker.log("event", {"event": "report", "stage": "math", "path": str(run_dir / "math.html")})
    tracker.log("event", {"event": "stage_end", "stage": "math", "step": last})
tracker.close(None if end == "complete" else end, deadline_s=60.0)
"""


class Sessions:
    """Processes that work on one run, one after another."""

    def __init__(self, run_dir: Path, mode: str, environment: Mapping[str, str]) -> None:
        self.run_dir, self.mode, self.attempt = run_dir, mode, 0
        self.environment = {**os.environ, **environment}

    def start(self, *, last: int, end: str, resume: int = 0) -> subprocess.Popen[str]:
        self.attempt += 1
        arguments = [str(self.run_dir), self.mode, str(self.attempt), str(resume), str(last), end]
        return subprocess.Popen(
            [sys.executable, "-c", SESSION, *arguments], env=self.environment, stderr=subprocess.PIPE, text=True
        )

    def go_through(self, *, last: int, end: str, resume: int = 0) -> None:
        process = self.start(last=last, end=end, resume=resume)
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        assert not [row for row in read_rows(self.run_dir / FILES["event"]) if row["event"] == "wandb_failed"]

    def kill_when(self, condition: Callable[[], bool], *, last: int, resume: int = 0) -> None:
        """Start one that does not end, and kill it outright once `condition` holds."""
        process = self.start(last=last, end="hang", resume=resume)
        deadline = time.monotonic() + 60.0
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.communicate()


@pytest.fixture
def quiet(tmp_path: Path) -> dict[str, str]:
    """Nothing of wandb outside of the test's directory, and nothing about this machine."""
    places = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "CACHE", "DATA")}
    settings = {"ERROR_REPORTING": "false", "_DISABLE_STATS": "true"}
    return {**places, **{f"WANDB_{name}": value for name, value in settings.items()}}


def figures(items: Any) -> dict[str, Any]:
    """Of a record's items, those of a mapping under key//inner."""
    return {"//".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def losses(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["train/step"], row["actor/pg_loss"]) for row in history if "train/step" in row]


def test_an_offline_run_that_was_continued_holds_each_row_once_and_can_be_uploaded(
    tmp_path: Path, quiet: dict[str, str]
) -> None:
    """Five steps, interrupted; continued from step 3 to 5. Its file has steps 1 to 3 of the first, 4 and 5 of the second."""
    run_dir = tmp_path / "run"
    sessions = Sessions(run_dir, "offline", quiet)
    sessions.go_through(last=5, end="interrupted")
    sessions.go_through(last=5, resume=3, end="complete")
    (file,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    found = list(records(file))
    history = [figures(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    assert losses(history) == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 204.0), (5, 205.0)]
    evals = [(row["eval/step"], row["eval/math/accuracy"]) for row in history if "eval/step" in row]
    assert evals == [(2, 0.25), (4, 0.5)]
    judged = [row for row in history if "eval/step" in row]
    assert [row["eval/math/pass_at/2/mean"] for row in judged] == [0.75, 0.75]
    assert [row.get("eval/math/since_stage/mean") for row in judged] == [None, 0.25]

    tables = [row for row in history if "samples/step" in row]
    assert [row["samples/step"] for row in tables] == [2, 4, 6]
    contents = [json.loads((file.parent / "files" / row["samples/rollouts//path"]).read_text()) for row in tables]
    asked = [[row[2] for row in content["data"]] for content in contents]
    assert asked == [["p1", "p2"], ["p3", "p4"], ["p5"]]
    assert contents[0]["columns"][3:6] == ["prompt", "response", "outcome"]
    assert contents[0]["data"][1][3:] == ["1+1=", "2", "correct", 1.0, 0.5, "[[1, 0, 1]]"]

    (opened,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in opened.config.update}
    assert config["seed"] == 7 and config["run"] == {"code": {"version": "attempt 2"}}
    assert [session["code"]["version"] for session in json.loads((run_dir / "run.json").read_text())] == [
        "attempt 1",
        "attempt 2",
    ]

    summary: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= figures(record.summary.update)
    stage = {key.removeprefix("stages/math/"): summary[key] for key in summary if key.startswith("stages/math/")}
    assert stage == {
        "steps": 5,
        "seconds": 10.0,
        "rollouts": 40,
        "response_tokens": 160,
        "evals/math/accuracy": 0.5,
        "evals/math/accuracy_se": 0.0,
        "evals/math/accuracy_before": 0.25,
        "evals/math/gain": 0.25,
        "evals/math/gain_se": 0.125,
    }
    assert summary["run/num_steps"] == 5 and summary["run/failures/resumes"] == 1

    artifacts = [r.artifact for r in found if r.WhichOneof("record_type") == "artifact"]
    shown = [
        (artifact.type, sorted(artifact.aliases), [(entry.path, entry.ref) for entry in artifact.manifest.contents])
        for artifact in artifacts
        if artifact.type != "run_table"
    ]
    assert shown == [
        # Once for each session; the service knows content that it has.
        ("recipe", ["latest"], [("recipe.json", ""), ("run.json", "")]),
        ("recipe", ["latest"], [("recipe.json", ""), ("run.json", "")]),
        ("model", ["latest", "math"], [("model.safetensors", f"file://{run_dir}/exports/math/model.safetensors")]),
        ("model", ["latest", "lora"], [("adapter_config.json", "")]),
        ("report", ["latest", "math"], [("math.html", "")]),
    ]

    with WandbService() as service:
        result = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", str(file.parent)],
            env={**sessions.environment, **service.environment()},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        (run,) = service.runs.values()
    assert losses(run.history) == losses(history) and run.complete
    assert run.summary["stages/math/evals/math/gain"] == 0.25
    assert b"report" in service.uploads.values()


def test_a_run_that_broke_off_twice_reaches_the_service_without_a_lost_or_doubled_step(
    tmp_path: Path, quiet: dict[str, str]
) -> None:
    """The service gets 5 of the first 7 steps. Continued from 3, the run is killed at 9, before any of that is sent.
    Continued from 8 to the end: steps 1 to 5 are the first process's, 6 to 8 come from the files, 9 and 10 are new."""
    run_dir = tmp_path / "run"
    with WandbService() as service:
        sessions = Sessions(run_dir, "online", {**quiet, **service.environment()})

        def handed_over(step: int) -> bool:
            rows = read_rows(run_dir / "wandb.jsonl")
            return any(row.get("kind") == "step" and row["step"] == step for row in rows)

        service.hears = lambda row: row.get("train/step", 0) <= 5
        sessions.go_through(last=7, end="interrupted")
        (run,) = service.runs.values()
        assert losses(run.history) == [(step, 100.0 + step) for step in range(1, 6)] and handed_over(7)
        sessions.kill_when(lambda: handed_over(9), last=9, resume=3)
        service.hears = lambda row: True
        sessions.go_through(last=10, resume=8, end="complete")
        (run,) = service.runs.values()
    held = [(step, 100.0 + step) for step in range(1, 6)] + [
        (6, 206.0),
        (7, 207.0),
        (8, 208.0),
        (9, 309.0),
        (10, 310.0),
    ]
    assert losses(run.history) == held
    assert [row["_step"] for row in run.history] == list(range(len(run.history))) and not run.overwritten
    assert [row["eval/step"] for row in run.history if "eval/step" in row] == [2, 4]
    assert [row["samples/step"] for row in run.history if "samples/step" in row] == [2, 4, 6, 8, 10]
    assert run.config["seed"]["value"] == 7
    assert run.config["run"]["value"] == {"code": {"version": "attempt 3"}}
    assert run.summary["train/step"] == 10 and run.complete
    kinds = {artifact["artifactTypeName"] for artifact in service.artifacts}
    assert kinds == {"recipe", "model", "report", "run_table"}
