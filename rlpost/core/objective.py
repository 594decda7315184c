"""What a stage optimizes and how: the objective with its settings, the optimizer, and the loss of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlpost.core.losses import decoupled_surrogate, kl_k3, negative_log_likelihood
from rlpost.core.metrics import Tally, tally_policy
from rlpost.types import TrainingBatch

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """Group-relative policy gradient (GRPO); see `core.losses.decoupled_surrogate` for the equation."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    proximal: Literal["sampler", "learner"] = "sampler"
    """Centre of the trust region. sampler: the policy that drew each token, so clipping bounds all drift since then.
    learner: the policy at the start of the step; drift before it is corrected by the truncated weight instead."""
    tis_cap: float = 2.0
    """Cap of the truncated importance weight; with proximal = "sampler" the weight is 1."""
    kl_coef: float = 0.0
    """Weight of KL(policy || policy at the start of the stage) in the loss."""
    normalize_std: bool = True
    aggregation: Aggregation = "token_mean"

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def has_gradient(self, advantage: float) -> bool:
        """Whether a rollout with this advantage can move a weight; others need no forward pass."""
        return advantage != 0.0 or self.needs_reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """Negative log-likelihood of demonstrations."""

    aggregation: Aggregation = "token_mean"
    needs_reference: bool = False

    def has_gradient(self, advantage: float) -> bool:
        return True


Objective = PolicyGradient | Supervised


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """AdamW with float32 master weights."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """What the learner needs to know of a stage."""

    objective: Objective
    optimizer: OptimizerSpec
    temperature: float
    """The one the rollouts were sampled at; 1 for demonstrations."""
    num_threads: int
    """CPU threads of this stage: supervised stages may take the cores that samplers leave idle."""


def loss_and_tally(
    objective: Objective,
    batch: TrainingBatch,
    logprobs_BT: Tensor,
    entropies_BT: Tensor,
    reference_logprobs_BT: Tensor | None,
) -> tuple[Tensor, Tally]:
    """Summed loss of one micro-batch (not yet divided by the step's denominator) and its figures."""
    if isinstance(objective, Supervised):
        loss = negative_log_likelihood(logprobs_BT, batch.weights_B, batch.loss_mask_BT)
        tally = Tally()
        tally.add(loss=float(loss.detach()), tokens=float(batch.loss_mask_BT.sum()))
        return loss, tally
    proximal_BT = batch.sampler_logprobs_BT if objective.proximal == "sampler" else logprobs_BT.detach()
    loss = decoupled_surrogate(
        logprobs_BT,
        proximal_BT,
        batch.sampler_logprobs_BT,
        batch.advantages_B,
        batch.weights_B,
        batch.loss_mask_BT,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        tis_cap=objective.tis_cap,
    )
    tally = tally_policy(
        batch,
        logprobs_BT,
        proximal_BT,
        entropies_BT,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        tis_cap=objective.tis_cap,
    )
    tally.add(loss=float(loss.detach()))
    if objective.needs_reference:
        assert reference_logprobs_BT is not None
        kl = kl_k3(logprobs_BT, reference_logprobs_BT, batch.weights_B, batch.loss_mask_BT)
        with torch.no_grad():
            tally.add(reference_kl=float(kl))
        loss = loss + objective.kl_coef * kl
    return loss, tally
