"""What a verifier says about one response."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Outcome(enum.StrEnum):
    """Why a verdict is what it is; counted separately by the caller.

    Only CORRECT, WRONG, NO_ANSWER and TIMEOUT speak about the response. VERIFIER_ERROR speaks about us: the caller
    drops the sample and counts it, and never trains on its reward.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMEOUT = "timeout"
    VERIFIER_ERROR = "verifier_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verdict on one response.

    Attributes:
        reward: 1.0 when correct, else 0.0.
        outcome: see Outcome.
        parts: the reward's ingredients by name, each a float. math: format, accuracy. code: format, accuracy,
            tests_passed, tests_total.
        detail: one line for a person; may quote the response, never the expected value.

    Example:
        Verdict(reward=1.0, outcome=Outcome.CORRECT, parts={"format": 1.0, "accuracy": 1.0})
    """

    reward: float
    outcome: Outcome
    parts: Mapping[str, float]
    detail: str = ""
