"""The samplers as one: who is alive, who holds which version, who takes the next group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.core.patch import UpdateRefused
from rlpost.pipeline.deadlines import Bell, within
from rlpost.pipeline.ports import Export, GroupRequest, Handle, Learner, Sampler, WorkerLost
from rlpost.types import GroupSummary

Spawn = Callable[[Coroutine[Any, Any, None]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Deadlines in seconds, one per kind of wait, and how often a lost sampler is replaced."""

    start_s: float = 600.0
    sample_s: float = 3600.0
    judge_s: float = 600.0
    update_s: float = 600.0
    learn_s: float = 3600.0
    max_restarts: int = 3


@dataclass(slots=True)
class _Member:
    sampler: Sampler
    version: int | None = None
    """The version it proved to hold; None before the first proof and while it is being replaced."""
    load: int = 0
    """Rollouts it is working on."""
    restarts: int = 0
    replacing: bool = False


class Fleet:
    """Routes groups to live samplers and keeps every one of them on the latest version it can prove."""

    def __init__(
        self,
        samplers: Sequence[Sampler],
        restart: Callable[[Sampler], Awaitable[Sampler]],
        limits: Limits,
        spawn: Spawn,
        on_event: Callable[..., None],
        *,
        learner: Learner | None = None,
    ) -> None:
        """
        Args:
            restart: starts another in place of a lost one.
            learner: who is asked for a complete version where changes are published; None: they never are.
        """
        self._restart, self._learner = restart, learner
        self._limits, self._spawn, self._on_event = limits, spawn, on_event
        self._members = [_Member(sampler) for sampler in samplers]
        self._latest: Export | None = None
        self._complete: Export | None = None
        """The latest version whole, if a sampler needed it so."""
        self._completing = asyncio.Lock()
        self._joined, self._moved_on = Bell(), Bell()

    def __len__(self) -> int:
        """Samplers, those that are being started again too."""
        return len(self._members)

    @property
    def samplers(self) -> list[Sampler]:
        """Those that hold a proved version."""
        return [m.sampler for m in self._members if m.version is not None]

    async def sample(self, request: GroupRequest) -> tuple[Handle, GroupSummary]:
        """Sample a group on the least loaded live sampler; if that one dies, on another.

        Raises:
            WorkerLost: when the group outlived more samplers than `max_restarts` allows.
        """
        lost: WorkerLost | None = None
        for _ in range(self._limits.max_restarts + 1):
            member = await self._least_loaded()
            sampler = member.sampler
            member.load += len(request.seeds_G)
            try:
                phase = f"sampling of {request.prompt.id}"
                return await within(self._limits.sample_s, sampler.sample(request), worker=sampler.name, phase=phase)
            except WorkerLost as error:
                lost = error
                self._lose(member, sampler, error)
            finally:
                member.load -= len(request.seeds_G)
        assert lost is not None
        raise lost

    async def serve(self) -> None:
        """Serve the model that samplers are started with, which is version 0: nothing is published. Returns once one is up."""
        await asyncio.gather(*(self._publish_to(m, m.sampler) for m in self._members))
        while not self.samplers:
            await self._joined.wait()

    async def publish(self, export: Export) -> None:
        """Bring every sampler to `export`; returns once all that live have proved it, and at least one does."""
        self._latest, self._complete = export, None
        self._moved_on.ring()
        await asyncio.gather(*(self._publish_to(m, m.sampler) for m in self._members if not m.replacing))
        while not self.samplers:
            await self._joined.wait()

    async def _publish_to(self, member: _Member, sampler: Sampler) -> None:
        try:
            await self._bring_up(member)
        except WorkerLost as error:
            if error.worker != sampler.name:  # the learner, which was asked for a complete version
                raise
            self._lose(member, sampler, error)

    async def _bring_up(self, member: _Member) -> None:
        """Update one sampler until it proves to hold the latest version, which may move on while it loads.

        It is asked what it holds before anything is sent. Who refuses the changes gets everything, once.

        Raises:
            RuntimeError: when it refuses a complete version.
        """
        refused = False
        if self._latest is None:
            sampler = member.sampler
            await within(self._limits.start_s, sampler.held(), worker=sampler.name, phase="start")
            member.version = 0
        while self._latest is not None and member.version != self._latest.version:
            sampler = member.sampler
            limit_s = self._limits.start_s if member.version is None else self._limits.update_s
            held = await within(limit_s, sampler.held(), worker=sampler.name, phase="held")
            export = await self._export_for(None if refused else held)
            phase = f"update to version {export.version}"
            try:
                proved = await within(limit_s, sampler.update(export), worker=sampler.name, phase=phase)
            except UpdateRefused as error:
                self._on_event("update_refused", worker=sampler.name, version=export.version, detail=str(error))
                if export.base is None:
                    raise RuntimeError(
                        f"{sampler.name} refuses the complete version {export.version}: {error}"
                    ) from error
                member.version, refused = None, True
                continue
            if proved != export.version:
                raise RuntimeError(f"{sampler.name} proved version {proved} after an update to {export.version}")
            refused = False
            if proved == self._latest.version:  # else nothing is sampled with it: it counts as published no more
                member.version = proved
        self._joined.ring()

    async def _export_for(self, held: int | None) -> Export:
        """What brings a sampler that holds version `held` to the latest one: the changes if it holds their base."""
        latest = self._latest
        assert latest is not None
        if latest.base in (None, held):
            return latest
        async with self._completing:
            if self._complete is None or self._complete.version < latest.version:
                learner = self._learner
                assert learner is not None, f"{latest.version} was published as changes"
                phase = f"complete export of version {latest.version}"
                call = learner.complete()
                self._complete = await within(self._limits.learn_s, call, worker=learner.name, phase=phase)
            export = self._complete
        while self._latest is not None and self._latest.version < export.version:
            await self._moved_on.wait()  # the learner has exported the next one already, which is yet to be published
        return export

    def _lose(self, member: _Member, sampler: Sampler, error: WorkerLost) -> None:
        if member.sampler is not sampler or member.replacing:
            return  # somebody else noticed first
        member.version, member.replacing = None, True
        self._spawn(self._replace(member, error))

    async def _replace(self, member: _Member, error: WorkerLost) -> None:
        """Start a new sampler in place of a lost one and bring it up, within the budget of restarts."""
        while member.replacing:
            self._on_event("sampler_lost", worker=error.worker, phase=error.phase, detail=error.detail)
            if member.restarts == self._limits.max_restarts:
                raise error
            member.restarts += 1
            name = member.sampler.name
            restart = self._restart(member.sampler)
            try:
                member.sampler = await within(self._limits.start_s, restart, worker=name, phase="restart")
                await self._bring_up(member)
                member.replacing = False
            except WorkerLost as again:
                if again.worker != name:
                    raise
                member.version, error = None, again
        self._on_event("sampler_restarted", worker=member.sampler.name, version=member.version)

    async def _least_loaded(self) -> _Member:
        while not (live := [m for m in self._members if m.version is not None]):
            await self._joined.wait()
        return min(live, key=lambda m: m.load)
