"""launch/slurm.sh as it is, with a Slurm of two nodes that are both this machine: a run over several Ray nodes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.test_end_to_end import ROOT, SMALL

SCRIPT = ROOT / "launch" / "slurm.sh"
SRUN = f"""#!{sys.executable}
import os, sys
command = sys.argv[sys.argv.index("ray"):]
with open(os.environ["SRUN_CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
if "--head" not in command:
    command.append("--node-ip-address=127.0.0.3")
os.execvp(command[0], command)
"""

RAY = "#!/bin/sh\nexec sleep 600\n"
RLPOST = """#!/usr/bin/env bash
echo "rlpost $(printf '<%s>' "$@")"
trap 'echo saved; exit 130' TERM
[[ ! -e $WAITS ]] || while :; do sleep 0.1; done
exit 3
"""
"""Ends with 130 when it is told to, as the command does after its checkpoint; at once with 3 unless it is to wait."""


def test_the_script_is_valid_bash() -> None:
    checked = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_shellcheck_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([linter, SCRIPT], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_a_command_without_a_run_directory_is_refused_before_anything_starts(tmp_path: Path) -> None:
    job = Job(tmp_path, "recipes/quickstart.toml", "seed=1")
    assert job.process.wait(10) == 2
    assert "usage: sbatch" in job.text() and not job.calls.exists()


def _free_job_id() -> int:
    """One whose port for Ray is free."""
    for number in range(os.getpid() % 5000, 10000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.2", 20000 + number)):
                return number
    raise AssertionError("no free port")


class Job:
    """The script as the first node's slurmd would start it."""

    def __init__(self, directory: Path, *arguments: str, stubs: Mapping[str, str] | None = None) -> None:
        bin_dir = directory / "bin"
        bin_dir.mkdir(exist_ok=True)
        self.calls, self.requeued, self.log = (directory / n for n in ("srun.calls", "requeued", "job.log"))
        tools = {
            "srun": SRUN,
            "hostname": "#!/bin/sh\necho 127.0.0.2 10.0.0.1\n",
            "scontrol": f'#!/bin/sh\necho "$@, beside $(pgrep -c -P $PPID)" >> {self.requeued}\n',
            **(stubs or {}),
        }
        for name, text in tools.items():
            (bin_dir / name).write_text(text)
            (bin_dir / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SRUN_CALLS": str(self.calls),
            "SLURM_JOB_ID": str(_free_job_id()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURMD_NODENAME": "node-a",
            "WAITS": str(directory / "waits"),
        }
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [SCRIPT, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.tree: dict[int, psutil.Process] = {}

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def look(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.tree |= {process.pid: process for process in found}
        return found

    def wait_for(self, condition: Callable[[], Any], limit_s: float = 120) -> Any:
        deadline = time.monotonic() + limit_s
        while not (answer := condition()):
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()[-3000:]
            self.look()
            time.sleep(0.2)
        return answer

    def left_after(self, limit_s: float) -> list[psutil.Process]:
        deadline = time.monotonic() + limit_s
        while (left := [p for p in self.tree.values() if p.is_running()]) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(*arguments: str, **options: Any) -> Job:
        jobs.append(Job(tmp_path, "recipes/quickstart.toml", f"run_dir={tmp_path / 'run'}", *arguments, **options))
        return jobs[-1]

    yield start
    for each in jobs:
        if each.process.poll() is None:
            each.look()
            each.process.terminate()
            each.process.wait(60)
        for process in each.left_after(20):
            process.kill()


def rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    path = run_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.engines
@pytest.mark.timeout(400)
def test_a_run_over_two_ray_nodes_ends_and_takes_down_what_the_job_started(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    run, started = tmp_path / "run", job(*SMALL)

    def raylets() -> dict[str, int]:
        """The raylet above each worker's process."""
        above = {}
        for process in started.look():
            try:
                title = " ".join(process.cmdline())
                above |= {w: process.ppid() for w in ("_LearnerProcess", "_SamplerProcess") if f"::{w}" in title}
            except psutil.Error:
                continue
        return above

    started.wait_for(lambda: rows(run, "metrics.jsonl"))
    above = raylets()
    assert len(above) == 2 and len(set(above.values())) == 2, f"learner and sampler share a node: {above}"
    learner = next(p for p in started.tree.values() if p.is_running() and "_LearnerProcess" in " ".join(p.cmdline()))
    assert learner.nice() == 10, "Ray's own niceness beside ours"
    assert started.process.wait(200) == 0, started.text()[-3000:]
    (ready,) = (row for row in rows(run, "events.jsonl") if row["event"] == "ready")
    assert {name.split("(")[1] for name in ready["nodes"].values()} == {"127.0.0.2)", "127.0.0.3)"}
    assert [row["stage"] for row in rows(run, "metrics.jsonl")] == ["warmup"] * 6 + ["math"] * 6 + ["code"] * 4
    assert "What was learned" in started.text()
    assert not started.requeued.exists()
    # The two steps start side by side: either may be the first to write down its call.
    head, worker = sorted(started.calls.read_text().splitlines(), key=lambda call: "--head" not in call)
    assert "--nodelist=node-a" in head and "--exclude=node-a" in worker
    left = started.left_after(20)
    assert not left, left


# -- the job, with programs in place of Ray's and ours that do as little as they can ---------------------------------------


def stubs(missing: str = "") -> dict[str, str]:
    return {"ray": RAY, "rlpost": RLPOST, "python": f"#!/bin/sh\necho '{missing}'\ntest -z '{missing}'\n"}


def test_a_job_out_of_time_tells_the_command_and_is_queued_again_once_nothing_of_it_runs(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "waits").touch()
    started = job(stubs=stubs())
    started.wait_for(lambda: "rlpost <train>" in started.text(), 20)
    started.look()
    started.process.terminate()
    assert started.process.wait(20) == 130
    assert "saved" in started.text()
    # Beside the script's one other child, which is what wrote this.
    assert re.fullmatch(r"requeue \d+, beside 1\n", started.requeued.read_text())
    assert not started.left_after(5)


def test_a_command_that_fails_ends_the_job_with_its_code_and_is_not_queued_again(job: Callable[..., Job]) -> None:
    started = job("name=a b", stubs=stubs())
    assert started.process.wait(20) == 3
    assert re.search(
        r"rlpost <train><recipes/\S+><run_dir=\S+><name=a b><ray_address=127.0.0.2:2\d{4}>\n", started.text()
    )
    assert not started.requeued.exists()


def test_a_run_directory_that_holds_a_run_is_continued(job: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    started = job(stubs=stubs())
    assert started.process.wait(20) == 3
    assert re.search(r"<ray_address=[^<>]+><--resume>\n", started.text())


def test_a_cluster_that_does_not_get_complete_is_given_up_with_what_was_there(job: Callable[..., Job]) -> None:
    started = job(stubs=stubs("1 of 2 nodes have joined: node-a"))
    started.wait_for(started.calls.exists, 20)
    started.look()
    started.process.terminate()
    assert started.process.wait(20) == 1
    assert "Last seen: 1 of 2 nodes have joined: node-a" in started.text() and "rlpost <train>" not in started.text()
    assert not started.requeued.exists() and not started.left_after(5)
