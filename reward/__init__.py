"""Verifiable rewards: what a response is worth, judged where the response cannot reach.

    score("math", "... \\\\boxed{85}", {"answer": "85"}).reward == 1.0

Programs run in jailed child processes (`reward.sandbox`); the verdict is computed from the values they returned and
expected values they never saw. `RewardPool` is the same for many responses at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from reward.pool import RewardPool, TaskLimits, check_reference, gold_response
from reward.verdict import Outcome, Verdict

__all__ = ["Outcome", "RewardPool", "TaskLimits", "Verdict", "check_reference", "gold_response", "score"]


@functools.cache
def _default_pool() -> RewardPool:
    return RewardPool()


def score(task: str, response: str, reference: Mapping[str, Any]) -> Verdict:
    """The verdict on one response, by a pool of one worker a task that lives as long as this process."""
    return _default_pool().score(task, response, reference)
