"""Who serves which version while samplers come and go, with samplers that do nothing but hold versions."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rlpost.pipeline.fleet import Fleet, Limits
from rlpost.pipeline.ports import Export, GroupRequest, WorkerLost
from rlpost.types import Prompt

REQUEST = GroupRequest(
    prompt=Prompt(id="p", token_ids=(1,), task="math", reference={}), seeds_G=(1,), temperature=1.0, max_tokens=1
)


def export(version: int, base: int | None) -> Export:
    return Export(version=version, base=base, handles=(), num_bytes=0, full_bytes=1, num_changed=0, num_values=1)


class Sampler:
    def __init__(self, name: str, *, update_s: float = 0.0, dies: bool = False) -> None:
        self.name, self.update_s, self.dies = name, update_s, dies
        self.version: int | None = None

    async def held(self) -> int | None:
        await asyncio.sleep(0.01)
        return self.version

    async def update(self, update: Export) -> int:
        await asyncio.sleep(self.update_s)
        assert update.base in (None, self.version)
        self.version = update.version
        return update.version

    async def sample(self, request: GroupRequest) -> Any:
        if self.dies:
            raise WorkerLost(self.name, "sampling", "killed by the test")
        await asyncio.sleep(0)
        return self.name, self.version


class Learner:
    name = "learner"

    def __init__(self) -> None:
        self.version, self.dead, self.num_complete = 0, False, 0

    async def complete(self) -> Export:
        if self.dead:
            raise WorkerLost("learner-0", "complete", "the process died")
        self.num_complete += 1
        return export(self.version, None)


class Workers:
    def __init__(self, *samplers: Sampler, replacement_s: float = 0.0) -> None:
        self.samplers, self.learner, self.num_restarts = list(samplers), Learner(), 0
        self._replacement_s = replacement_s

    async def restart(self, sampler: Sampler) -> Sampler:
        self.num_restarts += 1
        return Sampler(sampler.name, update_s=self._replacement_s)


def new_fleet(workers: Any, spawn: Any) -> Fleet:
    return Fleet(workers.samplers, workers.restart, Limits(), spawn, lambda *_, **__: None, learner=workers.learner)


async def publish(fleet: Fleet, workers: Workers, version: int) -> None:
    workers.learner.version = version
    await fleet.publish(export(version, version - 1 if version else None))


async def test_a_replacement_serves_nothing_before_it_holds_the_version_published_meanwhile() -> None:
    workers = Workers(Sampler("a", dies=True), Sampler("b"), replacement_s=0.2)
    async with asyncio.TaskGroup() as tasks:
        fleet = new_fleet(workers, tasks.create_task)
        for version in (0, 1):
            await publish(fleet, workers, version)
        assert (await fleet.sample(REQUEST))[0] == "b", "a has died, and loads version 1 from now on"
        await asyncio.sleep(0.1)
        await publish(fleet, workers, 2)
        served = set()
        while ("a", 2) not in served:
            served.add(await fleet.sample(REQUEST))
            await asyncio.sleep(0.005)
        assert served == {("b", 2), ("a", 2)}


async def test_one_complete_version_serves_all_who_need_it_and_goes_with_the_next() -> None:
    workers = Workers(*(Sampler(name) for name in "abc"))
    fleet = new_fleet(workers, asyncio.ensure_future)
    await publish(fleet, workers, 0)
    for sampler in workers.samplers:
        sampler.version = None  # what they held is damaged
    await publish(fleet, workers, 1)
    assert workers.learner.num_complete == 1 and {s.version for s in workers.samplers} == {1}
    await publish(fleet, workers, 2)
    assert workers.learner.num_complete == 1 and fleet._complete is None


async def test_a_learner_that_dies_is_not_charged_to_the_sampler_that_asked_it() -> None:
    workers = Workers(Sampler("a"))
    fleet = new_fleet(workers, asyncio.ensure_future)
    await publish(fleet, workers, 0)
    workers.samplers[0].version, workers.learner.dead = None, True
    with pytest.raises(WorkerLost, match="learner-0 was lost"):
        await publish(fleet, workers, 1)
    assert workers.num_restarts == 0
