"""What a stage optimizes and how: the objective with its settings, the optimizer, and the loss of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlpost.core.advantages import Advantage, batch_scale, group_advantages
from rlpost.core.critic import Critic, Values, gae, returns, token_rewards, value_loss
from rlpost.core.kl import kl_terms, kl_to_go
from rlpost.core.kto import KTO, desirability, unpaired_loss
from rlpost.core.losses import (
    Level,
    Surrogate,
    cispo_surrogate,
    clipped_surrogate,
    denominator,
    importance_ratio,
    importance_weight,
    negative_log_likelihood,
    outside,
    policy_ratio,
    weighted_sum,
)
from rlpost.core.metrics import Tally, tally_policy
from rlpost.core.optimizers import OptimizerSpec
from rlpost.core.preference import Preference, best_against_worst, pairs_of, preference_loss
from rlpost.core.subnetwork import Subnetwork
from rlpost.types import GroupSummary, Rollout, TrainingBatch

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """Policy gradient: w x surrogate(r, A), summed. docs/algorithms.md names the usual combinations."""

    advantage: Advantage | Critic = "group_std"
    """Of a rollout, from its group (`core.advantages.group_advantages`), or of each token, from a critic (PPO)."""
    ratio_level: Level = "token"
    """r = pi / p of each token, or the geometric mean over its response."""
    clip: Literal["ppo", "cispo"] = "ppo"
    """ppo: a clipped token loses its gradient. cispo: the clipped ratio is a weight, and none does."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    """Bound, above 1, of the ratio of tokens with a negative advantage."""
    aggregation: Aggregation = "token_mean"
    truncated: Literal["train", "mask", "bootstrap"] = "train"
    """Rollouts cut at the token limit. mask: they count in their group's baseline, and in nothing else. bootstrap: the
    critic's value of their last state takes the place of their reward."""
    proximal: Literal["sampler", "learner"] = "sampler"
    """p, centre of the trust region. sampler: p = b, the policy that drew each token, so clipping bounds all drift since
    then and w is 1. learner: the policy at the start of the step, and w = p / b corrects the drift before it. A batch
    gets one optimizer step, so the policy at the start of the step is the present one: r is 1, and nothing is clipped."""
    weight_level: Level = "token"
    """w from p / b of each token, or of its whole response (the product)."""
    weight_form: Literal["truncated", "masked"] = "truncated"
    """What becomes of p / b outside [weight_low, weight_high]: cut to it, or 0."""
    weight_low: float = 0.0
    weight_high: float = 2.0
    kl_coef: float = 0.0
    """Weight of the KL between the policy and the policy at the start of the stage."""
    kl_place: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """k1 in the reward, k2 or k3 in the loss; `core.kl` has the gradients."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def critic(self) -> Critic | None:
        return self.advantage if isinstance(self.advantage, Critic) else None

    def counts(self, finish_reason: str) -> bool:
        """Whether a rollout that ended so is part of the step's mean."""
        return self.truncated != "mask" or finish_reason != "length"

    def has_gradient(self, advantage: float) -> bool:
        """Whether a rollout with this advantage can move a weight; others need no forward pass."""
        return advantage != 0.0 or self.needs_reference or self.critic is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """Negative log-likelihood of demonstrations."""

    aggregation: Aggregation = "token_mean"
    needs_reference: bool = False


Objective = PolicyGradient | Supervised | Preference | KTO


def critic_of(objective: Objective) -> Critic | None:
    """The critic a learner must train beside the policy, if any."""
    return objective.critic if isinstance(objective, PolicyGradient) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """What the learner needs to know of a stage."""

    objective: Objective
    optimizer: OptimizerSpec
    num_threads: int
    """CPU threads of this stage: supervised stages may take the cores that samplers leave idle."""
    adapter_seed: int = 0
    """Of the stage's fresh LoRA adapter, where there is one."""
    subnetwork: Subnetwork | None = None
    """The entries it may change; None: all."""
    responses_recur: bool = False
    """They are data, the same in every epoch, and not sampled: what the reference says of one can be remembered."""


def credit(objective: Objective, rewards: Sequence[float], finish_reasons: Sequence[str]) -> tuple[float, ...]:
    """One advantage per rollout of a sampled group, all zero when the group holds nothing to learn; with a critic, which
    turns them into advantages later, the rewards."""
    assert not isinstance(objective, Supervised), "demonstrations are not judged"
    if isinstance(objective, Preference):
        return tuple(best_against_worst(objective, rewards, finish_reasons))
    if isinstance(objective, KTO):
        return tuple(desirability(objective, rewards, finish_reasons))
    if isinstance(objective.advantage, Critic):
        return tuple(rewards)
    rewards_G = torch.tensor(rewards, dtype=torch.float64)
    return tuple(group_advantages(rewards_G, advantage=objective.advantage).tolist())


def trained_units(
    objective: Objective, rollouts: Sequence[Rollout], advantages: Sequence[float]
) -> list[tuple[int, ...]]:
    """Indices of the rollouts that can move a weight; the others need no forward pass. Those of one unit, one rollout or
    the pair (chosen, rejected), must be in one micro-batch."""
    if isinstance(objective, Preference):
        return list(pairs_of(advantages))
    if isinstance(objective, KTO):
        return [(index,) for index, advantage in enumerate(advantages) if advantage]
    if isinstance(objective, Supervised):
        return [(index,) for index in range(len(rollouts))]
    return [
        (index,)
        for index, (rollout, advantage) in enumerate(zip(rollouts, advantages, strict=True))
        if objective.counts(rollout.finish_reason) and objective.has_gradient(advantage)
    ]


def step_denominator(
    objective: Objective,
    groups: Sequence[GroupSummary],
    advantages: Sequence[Sequence[float]],
    *,
    max_response_tokens: int,
) -> float:
    """What divides the summed gradient of a step, from all its groups: known when the last has arrived.

    Of a preference objective the number of pairs: groups without one (ties) are not in the mean. Of KTO the number of
    responses that are trained on.
    """
    if isinstance(objective, Preference):
        return float(max(sum(any(advantages_G) for advantages_G in advantages), 1))
    if isinstance(objective, KTO):
        return float(max(sum(a != 0 for advantages_G in advantages for a in advantages_G), 1))
    policy = objective if isinstance(objective, PolicyGradient) else None
    lengths = [
        length
        for group in groups
        for length, reason in zip(group.num_tokens_G, group.finish_reasons_G, strict=True)
        if policy is None or policy.counts(reason)
    ]
    mean = denominator(
        sum(lengths), len(lengths), aggregation=objective.aggregation, max_response_tokens=max_response_tokens
    )
    if policy is None or isinstance(policy.advantage, Critic):
        return mean
    return mean * batch_scale([a for advantages_G in advantages for a in advantages_G], advantage=policy.advantage)


def loss_and_tally(
    objective: Objective,
    batch: TrainingBatch,
    logprobs_BT: Tensor,
    entropies_BT: Tensor,
    reference_logprobs_BT: Tensor | None,
    values: Values | None = None,
) -> tuple[Tensor, Tally]:
    """Summed loss of one micro-batch (not yet divided by the step's denominator) and its figures.

    Args:
        values: the critic's, where the objective has one.
    """
    if isinstance(objective, Supervised):
        loss = negative_log_likelihood(logprobs_BT, batch.weights_B, batch.loss_mask_BT)
        tally = Tally()
        tally.add(loss=float(loss.detach()), tokens=float(batch.loss_mask_BT.sum()))
        return loss, tally
    if isinstance(objective, Preference):
        loss, tally = preference_loss(objective, batch, logprobs_BT, reference_logprobs_BT)
        return loss, Tally.merge([tally, tally_policy(batch, logprobs_BT, entropies_BT)])
    if isinstance(objective, KTO):
        loss, tally = unpaired_loss(objective, batch, logprobs_BT, reference_logprobs_BT)
        return loss, Tally.merge([tally, tally_policy(batch, logprobs_BT, entropies_BT)])
    return _policy_gradient(objective, batch, logprobs_BT, entropies_BT, reference_logprobs_BT, values)


def critic_loss_and_tally(
    objective: Objective,
    batch: TrainingBatch,
    values: Values,
    logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor | None,
) -> tuple[Tensor, Tally]:
    """The critic's summed loss of the same micro-batch, for the same denominator, and its figures."""
    assert isinstance(objective, PolicyGradient) and objective.critic is not None
    rewards_BT, bootstrap_B = _token_rewards(objective, batch, values, logprobs_BT, reference_logprobs_BT)
    returns_BT = returns(rewards_BT, bootstrap_B, batch.loss_mask_BT, gamma=objective.critic.gae_gamma)
    return value_loss(values.tokens_BT, returns_BT, batch.weights_B, batch.loss_mask_BT)


def _policy_gradient(
    objective: PolicyGradient,
    batch: TrainingBatch,
    logprobs_BT: Tensor,
    entropies_BT: Tensor,
    reference_logprobs_BT: Tensor | None,
    values: Values | None,
) -> tuple[Tensor, Tally]:
    """-sum w x surrogate(pi / p, A): the decoupled objective of AReaL (https://arxiv.org/abs/2505.24298), which is PPO's
    when p is the sampler."""
    mask_BT, sampler_BT = batch.loss_mask_BT, batch.sampler_logprobs_BT
    proximal_BT = sampler_BT if objective.proximal == "sampler" else logprobs_BT.detach()
    drift_BT = importance_ratio(proximal_BT, sampler_BT, mask_BT, level=objective.weight_level)
    low, high = objective.weight_low, objective.weight_high
    weight_BT = importance_weight(drift_BT, form=objective.weight_form, low=low, high=high)
    advantages_BT = _advantages(objective, batch, logprobs_BT, reference_logprobs_BT, values)
    surrogate = _surrogate(objective, logprobs_BT, proximal_BT, advantages_BT, mask_BT)
    loss = -weighted_sum(weight_BT * surrogate.values_BT, batch.weights_B, mask_BT)
    tally = tally_policy(batch, logprobs_BT, entropies_BT)
    tally.add(
        loss=float(loss.detach()),
        clipped=((surrogate.clipped_low_BT | surrogate.clipped_high_BT) & mask_BT).sum(),
        clipped_low=(surrogate.clipped_low_BT & mask_BT).sum(),
    )
    if objective.dual_clip is not None:
        tally.add(clipped_dual=(surrogate.clipped_dual_BT & mask_BT).sum())
    if objective.proximal == "learner":
        cut = (outside(drift_BT, low=low, high=high) & mask_BT).sum()
        tally.add(**{f"weight_{objective.weight_form}": cut})
    if reference_logprobs_BT is not None:
        kl_BT = kl_terms(logprobs_BT, reference_logprobs_BT, mask_BT, estimator=objective.kl_estimator)
        tally.add(reference_kl=kl_BT.detach().sum())
        if objective.kl_place == "loss":
            loss = loss + objective.kl_coef * weighted_sum(kl_BT, batch.weights_B, mask_BT)
    return loss, tally


def _advantages(
    objective: PolicyGradient,
    batch: TrainingBatch,
    logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor | None,
    values: Values | None,
) -> Tensor:
    """Each token's: by a critic, or the rollout's, less what the token and those after it cost in KL."""
    critic = objective.critic
    assert (critic is None) == (values is None)
    if critic is not None and values is not None:
        rewards_BT, bootstrap_B = _token_rewards(objective, batch, values, logprobs_BT, reference_logprobs_BT)
        return gae(
            rewards_BT,
            values.tokens_BT,
            bootstrap_B,
            batch.loss_mask_BT,
            gamma=critic.gae_gamma,
            decay=critic.gae_lambda,
        )
    advantages_BT = batch.advantages_B[:, None].expand_as(logprobs_BT)
    if objective.kl_place == "loss" or reference_logprobs_BT is None:
        return advantages_BT
    return advantages_BT - objective.kl_coef * kl_to_go(logprobs_BT, reference_logprobs_BT, batch.loss_mask_BT)


def _token_rewards(
    objective: PolicyGradient,
    batch: TrainingBatch,
    values: Values,
    logprobs_BT: Tensor,
    reference_logprobs_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(rewards_BT, bootstrap_B): what a critic must foresee. KL in the reward is each token's own cost."""
    goes_on_B = batch.truncated_B & (objective.truncated == "bootstrap")
    costs_BT = torch.zeros_like(values.tokens_BT)
    if objective.kl_place == "reward" and reference_logprobs_BT is not None:
        kl_BT = kl_terms(logprobs_BT.detach(), reference_logprobs_BT, batch.loss_mask_BT, estimator="k1")
        costs_BT = objective.kl_coef * kl_BT
    rewards_BT = token_rewards(torch.where(goes_on_B, 0.0, batch.advantages_B), costs_BT, batch.loss_mask_BT)
    return rewards_BT, torch.where(goes_on_B, values.end_B.detach(), 0.0)


def _surrogate(
    objective: PolicyGradient, logprobs_BT: Tensor, proximal_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor
) -> Surrogate:
    ratio_BT = policy_ratio(logprobs_BT, proximal_logprobs_BT, mask_BT, level=objective.ratio_level)
    bounds = {"clip_low": objective.clip_low, "clip_high": objective.clip_high}
    if objective.clip == "cispo":
        return cispo_surrogate(ratio_BT, logprobs_BT, advantages_BT, mask_BT, **bounds)
    return clipped_surrogate(ratio_BT, advantages_BT, dual_clip=objective.dual_clip, **bounds)
