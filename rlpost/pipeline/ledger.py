"""Where the time goes: a worker is in exactly one named state at any moment, and its seconds sum to wall time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Ledger:
    """Charges every moment since construction to the state the worker was in.

    Example:
        ledger = Ledger("idle"); with ledger.state("generate"): ...; ledger.collect() == {"idle": 0.1, "generate": 2.3}
    """

    def __init__(self, state: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._state = state
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def enter(self, state: str) -> str:
        """Switch to `state`; returns the one left."""
        now = self._clock()
        self._seconds[self._state] = self._seconds.get(self._state, 0.0) + now - self._since
        left, self._state, self._since = self._state, state, now
        return left

    @contextmanager
    def state(self, name: str) -> Iterator[None]:
        """Be in `name` for the duration, then back in the state before."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def collect(self) -> dict[str, float]:
        """Seconds per state since the last call."""
        self.enter(self._state)
        seconds, self._seconds = self._seconds, {}
        return seconds
