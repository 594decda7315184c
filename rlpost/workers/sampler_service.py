"""Drives a sampler engine: groups in, groups out, weight updates between two decode steps."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from rlpost.core.patch import UpdateRefused, WeightPatch
from rlpost.engines.base import RolloutRequest, SamplerEngine
from rlpost.pipeline.ledger import Ledger
from rlpost.pipeline.ports import GroupRequest, Seconds
from rlpost.pipeline.step_metrics import WAIT
from rlpost.types import Rollout, RolloutGroup

T = TypeVar("T")


class RunInEngineThread(Protocol):
    """Runs a function in the one thread that owns the engine."""

    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]: ...


class SamplerService:
    """One engine behind two calls, `sample` and `update`; whatever arrives is served at the next decode step."""

    def __init__(self, engine: SamplerEngine, run: RunInEngineThread) -> None:
        self._engine, self._run = engine, run
        self._ledger = Ledger(WAIT)
        self._incoming: deque[RolloutRequest] = deque()
        self._updates: deque[tuple[WeightPatch, asyncio.Future[int]]] = deque()
        self._waiting: dict[str, asyncio.Future[Rollout]] = {}
        self._finished: list[tuple[str, Rollout]] = []
        self._arrived = asyncio.Event()
        self._num_groups = 0
        self._refused = False
        self._driver: asyncio.Task[None] | None = None

    async def sample(self, request: GroupRequest) -> RolloutGroup:
        """One engine request per rollout: none waits for the slowest of its group to leave the batch."""
        self._num_groups += 1
        futures = []
        for index, seed in enumerate(request.seeds_G):
            request_id = f"{self._num_groups}-{index}"
            future: asyncio.Future[Rollout] = asyncio.get_running_loop().create_future()
            self._waiting[request_id] = future
            futures.append(future)
            self._incoming.append(
                RolloutRequest(
                    id=request_id,
                    prompt_ids=request.prompt.token_ids,
                    seed=seed,
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                )
            )
        self._wake()
        return RolloutGroup(prompt=request.prompt, rollouts=tuple(await asyncio.gather(*futures)))

    @property
    def held(self) -> int | None:
        """See `SamplerEngine.held`; None while an update is under way."""
        return self._engine.held

    async def update(self, patch: WeightPatch) -> int:
        """Change the weights before the next decode step; returns the version the engine proved to hold.

        Raises:
            UpdateRefused: as `SamplerEngine.update`.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._updates.append((patch, done))
        self._wake()
        return await done

    def seconds(self) -> Seconds:
        return self._ledger.collect()

    def _wake(self) -> None:
        if self._driver is None:
            self._driver = asyncio.get_running_loop().create_task(self._drive())
        if self._driver.done():
            self._fail_all(self._driver.exception() or RuntimeError("this sampler was closed"))
        self._arrived.set()

    async def _drive(self) -> None:
        """Runs until the engine fails; that error then goes to everyone who waits, or ever asks again."""
        try:
            while True:
                if self._updates:
                    await self._apply(*self._updates.popleft())
                elif (self._incoming or self._engine.has_work()) and not self._refused:
                    await self._turn()
                else:
                    self._deliver()
                    self._arrived.clear()
                    await self._arrived.wait()
        except Exception as error:
            self._deliver()
            self._fail_all(error)
            raise

    def _fail_all(self, error: BaseException) -> None:
        updates = [done for _, done in self._updates]
        for future in (*self._waiting.values(), *updates):
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()
        self._updates.clear()
        self._incoming.clear()

    async def _apply(self, patch: WeightPatch, done: asyncio.Future[int]) -> None:
        """Update the engine; while it holds no proved version nothing is decoded, and running requests wait."""
        with self._ledger.state("update"):
            try:
                await self._run(lambda: self._engine.update(patch))
            except UpdateRefused as error:
                self._refused = self._engine.held is None
                done.set_exception(error)
            except Exception as error:
                done.set_exception(error)
                raise
            else:
                self._refused = False
                done.set_result(self._engine.version)

    async def _turn(self) -> None:
        """One decode step; meanwhile this thread passes on what the step before it finished."""
        with self._ledger.state("generate"):
            step = self._run(self._add_and_step)
            self._deliver()
            self._finished = await step

    def _deliver(self) -> None:
        for request_id, rollout in self._finished:
            future = self._waiting.pop(request_id)
            if not future.done():  # its group's caller may have given up
                future.set_result(rollout)
        self._finished = []

    def _add_and_step(self) -> list[tuple[str, Rollout]]:
        while self._incoming:
            self._engine.add(self._incoming.popleft())
        return self._engine.step()
