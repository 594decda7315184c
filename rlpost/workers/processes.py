"""What every Ray worker does first: its own log file, its environment, and readable errors when it dies."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from rlpost.pipeline.ports import WorkerLost

T = TypeVar("T")
LOG_TAIL_LINES = 15
NICENESS = 10


def enter_worker(log_path: Path) -> None:
    """Send everything this process prints to its own file; crashes leave all Python stacks there."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()


def yield_to_samplers() -> None:
    """Give samplers the first claim on a core that is short: they are what a step waits for.

    They cannot starve the others: the staleness bound stops a sampler that runs ahead.
    """
    os.nice(NICENESS)


def log_tail(log_path: Path, num_lines: int = LOG_TAIL_LINES) -> str:
    if not log_path.is_file():
        return "(no log)"
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-num_lines:])


async def answer(call: Awaitable[T], *, worker: str, phase: str, log_path: Path) -> T:
    """Await a Ray call; a worker's death becomes `WorkerLost` with its log's tail, its own error is raised as it was.

    Raises:
        WorkerLost: the process died while it worked.
        RuntimeError: the process could not start, which a restart would not mend.
    """
    try:
        return await call
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception):
            cause.add_note(f"in {worker} during {phase}; its log: {log_path}")
            raise cause from None
        raise
    except RayActorError as error:
        tail = log_tail(log_path)
        if isinstance(error, ActorDiedError) and error.actor_init_failed:
            raise RuntimeError(
                f"{worker} could not start ({phase}). Its log, {log_path}, ends with:\n{tail}"
            ) from error
        raise WorkerLost(worker, phase, f"the process died. Its log, {log_path}, ends with:\n{tail}") from error


async def gather_first_error(*calls: Awaitable[Any]) -> list[Any]:
    """All answers, or the first error at once: a rank whose peer died waits in a collective and never answers."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
