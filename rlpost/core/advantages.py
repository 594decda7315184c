"""Credit: from the rewards of a group to one advantage per rollout. Axis: G rollouts of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import pstdev
from typing import Literal

import torch
from torch import Tensor

Advantage = Literal["group_std", "group_mean", "leave_one_out", "batch_std"]

ZERO_VARIANCE = 1e-8
"""Reward standard deviations below this carry no signal: the group's advantages are exactly zero."""


def group_advantages(rewards_G: Tensor, *, advantage: Advantage) -> Tensor:
    """How much better than the rest of its group each rollout did.

    group_std: (r_i - mean) / std over the group, population's; GRPO, "DeepSeekMath" section 4.1.2
    (https://arxiv.org/abs/2402.03300). group_mean: r_i - mean, Dr. GRPO (https://arxiv.org/abs/2503.20783).
    leave_one_out: r_i minus the mean of the others, that is G / (G - 1) (r_i - mean); RLOO
    (https://arxiv.org/abs/2402.14740). batch_std: as group_mean here; `batch_scale` of the whole step divides later.

    A group whose rewards are all equal gets exact zeros, whatever the rounding of its mean.
    """
    assert rewards_G.ndim == 1
    rewards_G = rewards_G.double()
    centered_G = rewards_G - rewards_G.mean()
    std = rewards_G.std(correction=0)
    if std < ZERO_VARIANCE:
        return torch.zeros_like(rewards_G, dtype=torch.float32)
    if advantage == "group_std":
        return (centered_G / std).float()
    if advantage == "leave_one_out":
        return (centered_G * len(rewards_G) / (len(rewards_G) - 1)).float()
    assert advantage in ("group_mean", "batch_std"), advantage
    return centered_G.float()


def batch_scale(advantages: Sequence[float], *, advantage: Advantage) -> float:
    """What remains to divide the step's gradient by, once all its advantages are known.

    batch_std: their standard deviation over the step, population's, as REINFORCE++ with baseline normalizes
    (https://arxiv.org/abs/2501.03262); their mean is 0 already, group by group. Surrogates are linear in the
    advantage's size, so dividing the gradient is dividing every advantage. 1 for the others, and without signal.
    """
    std = pstdev(advantages) if advantage == "batch_std" else 1.0
    return std if std >= ZERO_VARIANCE else 1.0
