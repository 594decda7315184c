"""An engine in a process of its own, driven over a pipe: vLLM changes the process it lives in, so tests keep it out."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from rlpost.core.patch import WeightPatch
from rlpost.engines.base import RolloutRequest
from rlpost.types import Rollout


class SamplerInChild:
    """The `SamplerEngine` that `build(*args)` makes in the child; its exceptions are raised here.

    `build` and whatever is given to `call` must be module-level functions.
    """

    def __init__(self, build: Callable[..., Any], *args: Any, env: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(env), build, args), daemon=True)
        before = dict(os.environ)
        os.environ.update(env)  # some variables are read while the child's interpreter starts
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self._answer()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(engine, *args), in the child."""
        self._pipe.send((function, args))
        return self._answer()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=20)
        self._process.kill()

    @property
    def version(self) -> int:
        return self.call(getattr, "version")

    @property
    def held(self) -> int | None:
        return self.call(getattr, "held")

    def add(self, request: RolloutRequest) -> None:
        self.call(_method, "add", request)

    def has_work(self) -> bool:
        return self.call(_method, "has_work")

    def stats(self) -> dict[str, int]:
        return self.call(_method, "stats")

    def step(self) -> list[tuple[str, Rollout]]:
        return self.call(_method, "step")

    def update(self, patch: WeightPatch) -> None:
        self.call(_method, "update", patch)

    def _answer(self) -> Any:
        if not self._pipe.poll(120):
            raise TimeoutError("no answer from the engine's process in 120 s")
        failed, value = self._pipe.recv()
        if failed:
            raise value
        return value


def _method(engine: Any, name: str, *args: Any) -> Any:
    return getattr(engine, name)(*args)


def _serve(pipe: Connection, env: dict[str, str], build: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(env)
    engine: Any = None

    def make(_: Any, *args: Any) -> None:
        nonlocal engine
        engine = build(*args)

    function = make
    while True:
        try:
            answer = (False, function(engine, *args))
        except Exception as error:  # noqa: BLE001 - raised again in the parent
            answer = (True, error)
        pipe.send(answer)
        try:
            function, args = pipe.recv()
        except EOFError:
            return
