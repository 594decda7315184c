"""What a critic is for: from its values of states to an advantage per token, and to its own loss.

Axes: B rows, T positions. A token is an action; its state is the prompt and the response before it. The tokens of a row
on the mask are one stretch: what is older than the staleness bound is the beginning of a response, and neither the
advantage nor the return of a token looks back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlpost.core.losses import weighted_sum
from rlpost.core.metrics import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """Advantages by generalized advantage estimation; see `gae` and `returns`."""

    lr: float
    """Of the critic, constant over the stage."""
    gae_gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 1.0
    """Of the policy's advantages. The critic's target is the return itself (lambda 1), whatever this is: the decoupled
    GAE of VC-PPO (https://arxiv.org/abs/2503.01491)."""


class Values(NamedTuple):
    """What the critic expects in a micro-batch. Both carry its gradient, which only its own loss uses."""

    tokens_BT: Tensor
    """float32: V of the state in which each token on the mask was drawn, 0 off the mask."""
    end_B: Tensor
    """float32: V of the state after the row's last token."""


def token_rewards(rewards_B: Tensor, costs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The rollout's reward at its last token, less what each token costs; 0 off the mask."""
    return torch.where(mask_BT, torch.where(_is_last(mask_BT), rewards_B[:, None], 0.0) - costs_BT, 0.0)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, bootstrap_B: Tensor, mask_BT: Tensor, *, gamma: float, decay: float
) -> Tensor:
    """A_t = sum over l >= 0 of (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), with lambda = `decay`.

    Generalized advantage estimation, eq. 16 of https://arxiv.org/abs/1506.02438.

    Args:
        rewards_BT: of each token, 0 off the mask.
        values_BT: V of the state in which each token was drawn.
        bootstrap_B: V after the last token: 0 where the response has ended there.

    Returns:
        advantages_BT without gradient, 0 off the mask.
    """
    assert rewards_BT.shape == values_BT.shape == mask_BT.shape and bootstrap_B.shape == mask_BT.shape[:1]
    values_BT, bootstrap_B = values_BT.detach(), bootstrap_B.detach()
    next_BT = torch.where(_is_last(mask_BT), bootstrap_B[:, None], _shifted(values_BT))
    deltas_BT = torch.where(mask_BT, rewards_BT + gamma * next_BT - values_BT, 0.0)
    return torch.where(mask_BT, _discounted_to_go(deltas_BT, gamma * decay), 0.0)


def returns(rewards_BT: Tensor, bootstrap_B: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """R_t = sum over l >= 0 of gamma^l r_{t+l}, the last reward followed by gamma x bootstrap: `gae` with lambda 1, plus
    V_t. What the critic should have expected; 0 off the mask, without gradient."""
    final_BT = torch.where(_is_last(mask_BT), gamma * bootstrap_B.detach()[:, None], 0.0)
    return torch.where(mask_BT, _discounted_to_go(rewards_BT + final_BT, gamma), 0.0)


def value_loss(values_BT: Tensor, returns_BT: Tensor, weights_B: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tally]:
    """sum w_i (V_t - R_t)^2 / 2 over the mask, and its figures.

    Without the clip around the old value that PPO's implementations have (https://arxiv.org/abs/2005.12729): a batch gets
    one step, so the old value is the present one.
    """
    errors_BT = torch.where(mask_BT, values_BT - returns_BT, 0.0)
    loss = weighted_sum(errors_BT.square() / 2, weights_B, mask_BT)
    targets, errors = returns_BT[mask_BT].double(), errors_BT.detach()[mask_BT].double()
    tally = Tally()
    tally.add(
        critic_loss=float(loss.detach()),
        value=values_BT.detach()[mask_BT].double().sum(),
        return_count=len(targets),
        **{"return": targets.sum(), "return_squared": targets.square().sum()},
        return_error=errors.sum(),
        return_error_squared=errors.square().sum(),
    )
    return loss, tally


def _is_last(mask_BT: Tensor) -> Tensor:
    """bool: the row's last token on the mask."""
    last_BT = mask_BT & ~_shifted(mask_BT)
    assert (last_BT.sum(-1) <= 1).all(), "the mask of a row has a gap"
    return last_BT


def _shifted(x_BT: Tensor) -> Tensor:
    """Of each position what stands at the next; 0 at the end of the row."""
    return torch.cat([x_BT[:, 1:], torch.zeros_like(x_BT[:, :1])], dim=-1)


def _discounted_to_go(x_BT: Tensor, decay: float) -> Tensor:
    """sum over l >= 0 of decay^l x_{t+l}. Each pass doubles how far a position has looked: log2(T) of them, not T."""
    reach, factor = 1, decay
    while reach < x_BT.shape[1]:
        x_BT = torch.cat([x_BT[:, :-reach] + factor * x_BT[:, reach:], x_BT[:, -reach:]], dim=-1)
        reach, factor = 2 * reach, factor * factor
    return x_BT
