"""Learning rates by hand: peak 1, warm-up 2, 10 steps."""

from __future__ import annotations

from typing import Any

import pytest

from rlpost.core.schedule import learning_rate


def rates(schedule: str) -> list[float]:
    return [learning_rate(s, peak=1.0, warmup_steps=2, num_steps=10, schedule=schedule) for s in range(10)]  # type: ignore[arg-type]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert rates("constant") == [0.5, 1.0, *[1.0] * 8]


def test_a_frozen_beginning_has_rate_zero_and_only_then_the_schedule_begins() -> None:
    """Steps 0 to 2 frozen; then 7 steps: 2 of warm-up and 5 of decay."""
    settings: dict[str, Any] = {"peak": 1.0, "warmup_steps": 2, "schedule": "linear"}
    ours = [learning_rate(step, num_steps=10, frozen_steps=3, **settings) for step in range(10)]
    assert ours == [0.0, 0.0, 0.0, *(learning_rate(step, num_steps=7, **settings) for step in range(7))]


def test_linear_decay_takes_an_eighth_a_step() -> None:
    """8 steps after the warm-up: 1, 7/8, ..., 1/8."""
    assert rates("linear") == pytest.approx([0.5, 1.0, *[1 - k / 8 for k in range(8)]])


def test_cosine_decay_is_half_way_in_the_middle() -> None:
    assert rates("cosine")[2] == 1.0 and rates("cosine")[6] == pytest.approx(0.5) and rates("cosine")[9] < 0.05
