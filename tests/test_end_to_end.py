"""The command a user types, on real vLLM, DeepSpeed and Ray: it finishes, survives, stops clearly and resumes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch

from rlpost import cli
from rlpost.analysis.measure import analyze
from rlpost.core.sparsity import pooled

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.build.hidden_size=64",
    "model.build.num_heads=2",
    "model.build.num_layers=2",
    "stage.warmup.steps=6",
    "stage.warmup.prompts_per_step=16",
    "stage.math.steps=6",
    "stage.code.steps=4",
    "defaults.prompts_per_step=4",
    "defaults.algo.group_size=4",
    "eval.math.num_prompts=8",
    "eval.code.num_prompts=8",
    "tracking.wandb=disabled",
]
LONG = [*SMALL, "stage.math.steps=2000", "checkpoint_every=5"]

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]


class Command:
    """One `rlpost train` as a child process, its whole tree known."""

    def __init__(self, run_dir: Path, *arguments: str) -> None:
        self.run_dir = run_dir
        self.output = run_dir.with_suffix(".log").open("ab+")
        command = [
            sys.executable,
            "-m",
            "rlpost.cli",
            "train",
            "recipes/quickstart.toml",
            f"run_dir={run_dir}",
            *arguments,
        ]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.output, stderr=subprocess.STDOUT)
        self.tree: dict[int, psutil.Process] = {}

    def text(self) -> str:
        return self.run_dir.with_suffix(".log").read_text(errors="replace")

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        path = self.run_dir / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def worker(self, title: str) -> psutil.Process:
        self.look()
        return next(p for p in self.tree.values() if p.is_running() and title in " ".join(_cmdline(p)))

    def look(self) -> None:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            self.tree[child.pid] = child

    def wait_for(self, condition: Callable[[], Any], limit_s: float = 150) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, self.text()[-3000:]
            assert self.process.poll() is None, self.text()[-3000:]
            time.sleep(0.2)

    def finish(self, limit_s: float = 200) -> int:
        """Exit code; no process of the run may be left then."""
        if self.process.poll() is None:
            self.look()
        code = self.process.wait(limit_s)
        deadline = time.monotonic() + 10
        while (left := [p for p in self.tree.values() if p.is_running()]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, left
        return code


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def start(*arguments: str) -> Command:
        commands.append(Command(tmp_path / "run", *arguments))
        return commands[-1]

    yield start
    for each in commands:
        if each.process.poll() is None:
            each.process.send_signal(signal.SIGINT)
            each.process.wait(60)
        each.output.close()


def test_a_recipe_runs_through_and_leaves_models_that_load(command: Callable[..., Command]) -> None:
    run = command(*SMALL, "publish.archive.anchor_every=4", "publish.observer.budget=1")
    assert run.finish() == 0, run.text()[-3000:]
    rows = run.rows()
    assert [row["stage"] for row in rows] == ["warmup"] * 6 + ["math"] * 6 + ["code"] * 4
    sampled = [row for row in rows if row["stage"] != "warmup"]
    assert all(0 <= row["staleness/token_max"] <= 2 for row in sampled if "staleness/token_max" in row)
    assert all(row["staleness/group_max"] <= 2 for row in sampled)
    # The sampler's own log-probs against the learner's, for tokens of the very weights being updated: numerics only.
    fresh = [row["mismatch/logprob_gap_mean_age_0"] for row in rows if "mismatch/logprob_gap_mean_age_0" in row]
    assert all(gap < 0.05 for gap in fresh)
    assert [(row["eval"], row["step"]) for row in run.rows("eval.jsonl")] == [
        (name, step) for step in (0, 6, 12, 16) for name in ("math", "code")
    ]
    for before, row in itertools.pairwise(rows):
        for worker in ("learner", "sampler-0", "verifier"):
            seconds = [v for k, v in row.items() if k.startswith(f"time/{worker}/")]
            if seconds and any(k.startswith(f"time/{worker}/") for k in before):
                assert sum(seconds) == pytest.approx(row["time"] - before["time"], abs=1.0)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = run.run_dir / "exports" / "code"
    model, tokenizer = cast(Any, AutoModelForCausalLM.from_pretrained(export)), AutoTokenizer.from_pretrained(export)
    ids = tokenizer("Compute 347+28.\n", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    assert "What was learned" in run.text()
    for version, stage in ((12, "math"), (16, "code")):
        out = run.run_dir / f"version-{version}"
        assert cli.main(["checkout", str(run.run_dir), "--version", str(version), "-o", str(out)]) == 0
        assert (out / "model.safetensors").read_bytes() == (
            run.run_dir / "exports" / stage / "model.safetensors"
        ).read_bytes()
    analyses = {row["step"]: row for row in run.rows("analysis.jsonl")}
    assert {6, 12, 16} <= analyses.keys() and {7, 12, 13, 16} <= {
        step for row in analyses.values() for step in (row["step"], *row["passed"])
    }
    last = run.run_dir / "exports" / "math"
    (update,) = analyze(str(last), [str(run.run_dir / "exports" / "code")], dtype=torch.bfloat16).updates
    assert analyses[16]["unchanged_since_start"] == pytest.approx(pooled(r.sparsity for r in update.rows).unchanged)
    for stage in ("warmup", "math", "code"):
        assert (run.run_dir / "analysis" / f"{stage}.html").read_text().startswith("<!DOCTYPE html>")
    changes = {row["publish/version"]: row for row in sampled if "publish/unchanged_fraction" in row}
    assert changes.keys() >= set(range(7, 16)) and all(
        r["publish/bytes"] < r["publish/full_bytes"] for r in changes.values()
    )


def test_an_adapter_travels_alone_and_every_version_of_it_is_a_model(command: Callable[..., Command]) -> None:
    """In float32 and at a scale of 2, so that a version checked out at the end of a stage is its export in every byte. Short
    responses are rewarded, as an untrained policy gives no right ones to learn from."""
    shaped = [f"stage.{stage}.reward.cosine_length={{}}" for stage in ("math", "code")]
    adapter = ["learner.lora={rank=4, alpha=8}", "publish.policy=adapter", "publish.archive.anchor_every=4"]
    run = command(*SMALL, *shaped, *adapter, "publish.observer.budget=1")
    assert run.finish() == 0, run.text()[-3000:]
    observed = [row for row in run.rows("analysis.jsonl") if row["step"] == 12]
    assert observed and observed[0]["kinds"]["up"]["ever_moved"] > 0 and "lora_A" not in observed[0]["kinds"]
    rows = [row for row in run.rows() if row["stage"] != "warmup"]
    fresh = [row["mismatch/logprob_gap_mean_age_0"] for row in rows if "mismatch/logprob_gap_mean_age_0" in row]
    assert fresh and all(gap < 1e-5 for gap in fresh)
    cost = {row["publish/version"]: row["publish/bytes"] / row["publish/full_bytes"] for row in rows}
    assert cost.keys() >= set(range(7, 16))
    # A stage's first version brings what the last one's adapter, merged, changed.
    assert all((cost[version] < 0.15) == (version not in (7, 13)) for version in range(7, 16))
    for version, stage in ((12, "math"), (16, "code")):
        out = run.run_dir / f"version-{version}"
        assert cli.main(["checkout", str(run.run_dir), "--version", str(version), "-o", str(out)]) == 0
        exported = run.run_dir / "exports" / stage / "model.safetensors"
        assert (out / "model.safetensors").read_bytes() == exported.read_bytes()


def test_a_killed_sampler_is_replaced_and_a_killed_learner_ends_the_run_with_its_name_and_a_way_on(
    command: Callable[..., Command],
) -> None:
    run = command(*LONG)
    run.wait_for(lambda: len(run.rows()) > 8)
    run.worker("_SamplerProcess").kill()
    run.wait_for(lambda: any(row.get("event") == "sampler_restarted" for row in run.rows("events.jsonl")))
    steps = len(run.rows())
    run.wait_for(lambda: len(run.rows()) > steps + 5)
    run.look()
    run.worker("_LearnerProcess").kill()
    killed = time.monotonic()
    assert run.finish(60) == 1
    assert time.monotonic() - killed < 30
    assert "learner-0 was lost during" in run.text() and "--resume" in run.text()
    trained = max(row["step"] for row in run.rows())

    resumed = command(*LONG, "--resume")
    resumed.wait_for(lambda: max(row["step"] for row in resumed.rows()) > trained)
    resumed.look()
    resumed.process.send_signal(signal.SIGINT)
    assert resumed.finish(90) == 130
    assert "interrupted" in resumed.text() and "is saved" in resumed.text()
    steps_seen = [row["step"] for row in resumed.rows()]
    assert steps_seen == sorted(set(steps_seen)), "a step is missing or there twice after the resume"


def test_a_driver_killed_outright_leaves_no_process(command: Callable[..., Command]) -> None:
    run = command(*LONG)
    run.wait_for(lambda: len(run.rows()) > 1)
    run.look()
    assert len(run.tree) > 8
    os.kill(run.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    run.process.wait(10)
    while (left := [p for p in run.tree.values() if p.is_running()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampler.wokers=2"], "did you mean 'workers'"),
        (["sampler.workers=999"], "this machine has"),
        (["data.math.families=['poetry']"], "choose from"),
    ],
)
def test_bad_input_ends_at_once_with_exit_code_2(
    command: Callable[..., Command], arguments: list[str], message: str
) -> None:
    run = command(*arguments)
    assert run.finish(60) == 2
    assert message in run.text()
    assert "Traceback" not in run.text()
