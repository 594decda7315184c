"""Every wait has a name and a limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

from rlpost.pipeline.ports import WorkerLost

T = TypeVar("T")


async def within(limit_s: float, awaitable: Awaitable[T], *, worker: str, phase: str) -> T:
    """Await, but no longer than `limit_s`.

    Raises:
        WorkerLost: naming the worker and the phase, when the limit passes.
    """
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            return await awaitable
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise WorkerLost(worker, phase, f"no answer within {limit_s:g} s") from error


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """asyncio's, but the first error that ends it is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except* Exception as errors:  # noqa: BLE001 - unwrapped and raised again
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


class Bell:
    """Wakes everyone who waits for the state of the pipeline to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, limit_s: float | None = None) -> bool:
        """True when the bell rang, False when the limit passed first. Take the bell before you look at the state."""
        try:
            async with asyncio.timeout(limit_s):
                await self._event.wait()
        except TimeoutError:
            return False
        return True
