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

    Example:
        Verdict(reward=1.0, outcome=Outcome.CORRECT, parts={"format": 1.0, "accuracy": 1.0})
    """

    reward: float
    """1.0 when correct, else 0.0."""
    outcome: Outcome
    parts: Mapping[str, float]
    """Ingredients by name. math: format, accuracy. code: format, accuracy, tests_passed, tests_total."""
    detail: str = ""
    """One line for a person, printable; may quote the response, never the expected value."""
    flags: tuple[str, ...] = ()
    """Suspicious patterns in a program (`reward.suspicion`); they are for people and change no reward."""
    seconds: float = 0.0
    """Wall time of judging, without waiting for a free worker."""
    queued_s: float = 0.0
    """Wall time of waiting for a free worker."""
    tier: str | None = None
    """How strongly the run was isolated (`reward.sandbox.Tier`); None where nothing had to run."""
    second_opinion: bool | None = None
    """Whether a second, independent path agreed; None where none was asked, or it could not say."""


def printable(text: str, limit: int = 300) -> str:
    """`text` on one line, at most `limit` characters, with every character a terminal or an encoder could trip over escaped."""
    short = text[:limit]
    return short if short.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)[:limit]
