"""Ledger, deadlines, seeds, and the row of a step."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlpost.core.metrics import StepReport, Tally
from rlpost.pipeline.deadlines import Bell, within
from rlpost.pipeline.ledger import Ledger
from rlpost.pipeline.ports import WorkerLost
from rlpost.pipeline.seeds import derive_seed
from rlpost.pipeline.step_metrics import StepRecord, percentile, verdict


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_ledger_charges_every_second_to_one_state() -> None:
    """2 s idle, 3 s generate of which 1 s update, 4 s idle: {idle: 6, generate: 2, update: 1}, 9 s in all."""
    clock = Clock()
    ledger = Ledger("idle", clock)
    clock.now = 2
    with ledger.state("generate"):
        clock.now = 3
        with ledger.state("update"):
            clock.now = 4
        clock.now = 5
    clock.now = 9
    assert ledger.collect() == {"idle": 6, "generate": 2, "update": 1}
    clock.now = 10
    assert ledger.collect() == {"idle": 1}


def test_an_exception_leaves_its_state() -> None:
    clock = Clock()
    ledger = Ledger("idle", clock)
    with pytest.raises(ValueError), ledger.state("step"):
        clock.now = 1
        raise ValueError
    clock.now = 3
    assert ledger.collect() == {"step": 1, "idle": 2}


async def test_a_wait_past_its_limit_names_worker_and_phase() -> None:
    with pytest.raises(WorkerLost, match=r"sampler-3 was lost during update to version 7: no answer within 0\.01 s"):
        await within(0.01, asyncio.sleep(5), worker="sampler-3", phase="update to version 7")


async def test_a_time_out_inside_the_call_is_not_mistaken_for_the_deadline() -> None:
    async def fails() -> None:
        raise TimeoutError("the callee's own")

    with pytest.raises(TimeoutError, match="callee"):
        await within(5, fails(), worker="w", phase="p")


async def test_the_bell_wakes_everyone_who_waited_before_it_rang_and_nobody_after() -> None:
    bell = Bell()
    waiters = [asyncio.create_task(bell.wait(1)) for _ in range(3)]
    await asyncio.sleep(0)
    bell.ring()
    assert await asyncio.gather(*waiters) == [True, True, True]
    assert await bell.wait(0.01) is False


def test_seeds_differ_by_every_name_and_fit_an_int64() -> None:
    seeds = {derive_seed(run, stage, o, i) for run in (0, 1) for stage in "ab" for o in range(100) for i in range(25)}
    assert len(seeds) == 2 * 2 * 100 * 25
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


@pytest.mark.parametrize(("percent", "value"), [(50, 10.0), (95, 19.0), (100, 20.0), (1, 1.0)])
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(percent: int, value: float) -> None:
    """Of 1 to 20: ten values are at most 10, nineteen (95 %) at most 19."""
    assert percentile([float(n) for n in range(20, 0, -1)], percent) == value
    assert percentile([3.0], percent) == 3.0


def record(waited_s: float, sampler: dict[str, float], evaluating_s: float = 0.0) -> StepRecord:
    return StepRecord(
        step=1,
        stage="s",
        sampled=True,
        lr=0.1,
        report=StepReport(grad_norm=1.0, tally=Tally()),
        groups=(),
        seconds=10.0,
        waited_s=waited_s,
        evaluating_s=evaluating_s,
        buffer={},
        published=None,
        worker_seconds={"sampler-0": sampler, "learner": {"wait": waited_s}},
    )


@pytest.mark.parametrize(
    ("waited_s", "sampler", "line"),
    [
        (6.1, {"generate": 10}, "learner waited 61% for rollouts"),
        (0.0, {"generate": 3, "wait": 7}, "samplers waited 70% for the learner"),
        (0.5, {"generate": 9.5, "wait": 0.5}, "balanced: learner waited 5%, samplers 5%"),
        (3.0, {"generate": 8, "wait": 2}, "learner waited 30% for rollouts"),
    ],
)
def test_the_verdict_names_who_waited_longer(waited_s: float, sampler: dict[str, float], line: str) -> None:
    assert verdict(record(waited_s, sampler)).startswith(line)


def test_the_verdict_names_the_verifier_when_everyone_waits_for_it() -> None:
    slow = record(7.2, {"generate": 3, "wait": 7})
    code: Any = (SimpleNamespace(prompt=SimpleNamespace(task="code")),)
    slow = replace(slow, groups=code, worker_seconds={**slow.worker_seconds, "verifier": {"judge": 9, "wait": 1}})
    assert verdict(slow) == "all waited for the verifier, learner 72% and samplers 70%: raise verifier.code.workers"
    quick = replace(slow, worker_seconds={**slow.worker_seconds, "verifier": {"judge": 1, "wait": 9}})
    assert verdict(quick).startswith("learner waited 72% for rollouts")


def test_the_verdict_does_not_blame_samplers_that_served_an_evaluation() -> None:
    line = verdict(record(6.1, {"generate": 10}, evaluating_s=5.0))
    assert line.startswith("learner waited 61% while an evaluation had the samplers")
    assert verdict(record(6.1, {"generate": 10}, evaluating_s=1.0)).startswith("learner waited 61% for rollouts")
