"""Learning rates over a stage."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, num_steps: int, schedule: Schedule, frozen_steps: int = 0
) -> float:
    """The rate of optimizer step `step` (from 0) of a stage of `num_steps`.

    Zero over `frozen_steps`. Then linear warm-up over `warmup_steps`, then constant, or falling to zero (reached one step
    after the last) along a line or half a cosine wave.
    """
    assert 0 <= step < num_steps
    if step < frozen_steps:
        return 0.0
    step, num_steps = step - frozen_steps, num_steps - frozen_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak
