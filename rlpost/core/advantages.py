"""Credit: from the rewards of a group to one advantage per rollout. Axis: G rollouts of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

ZERO_VARIANCE = 1e-8
"""Reward standard deviations below this carry no signal: the group's advantages are exactly zero."""


def group_advantages(rewards_G: Tensor, *, normalize_std: bool) -> Tensor:
    """A_i = r_i - mean(r), divided by the group's standard deviation if `normalize_std`.

    GRPO, "DeepSeekMath" section 4.1.2 (https://arxiv.org/abs/2402.03300); without the division it is Dr. GRPO's
    (https://arxiv.org/abs/2503.20783). The standard deviation is the population's (dividing by G).

    A group whose rewards are all equal gets exact zeros, whatever the rounding of its mean.
    """
    assert rewards_G.ndim == 1
    rewards_G = rewards_G.double()
    centered_G = rewards_G - rewards_G.mean()
    std = rewards_G.std(correction=0)
    if std < ZERO_VARIANCE:
        return torch.zeros_like(rewards_G, dtype=torch.float32)
    return (centered_G / std if normalize_std else centered_G).float()
