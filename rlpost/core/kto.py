"""Kahneman-Tversky optimization: learn from responses that are desirable or not, each on its own. Axes: B rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlpost.core.losses import masked_log_ratio
from rlpost.core.metrics import Tally
from rlpost.types import TrainingBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class KTO:
    """KTO with its reference point z0 held at 0. The paper estimates it from mismatched prompts and responses of a batch;
    here responses are trained before their batch is complete, and a mean over those at hand would make the gradient
    depend on how the batch was cut."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    min_desirable: float = 0.5
    """Sampled responses: least reward of a desirable one."""
    truncated: Literal["train", "mask"] = "train"
    """Sampled responses: whether one cut at the token limit is trained on."""

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def aggregation(self) -> Literal["token_mean"]:
        """Rows carry no weight: a response's length enters by its score."""
        return "token_mean"


def kto_loss(score_B: Tensor, desirable_B: Tensor, *, beta: float, weights: tuple[float, float]) -> Tensor:
    """lambda_D (1 - sigmoid(beta r)) of desirable responses, lambda_U (1 - sigmoid(-beta r)) of the others.

    KTO (https://arxiv.org/abs/2402.01306) at z0 = 0; with weights of 1, the two sides of a pair add up to APO-zero
    (https://arxiv.org/abs/2408.06266).

    Args:
        score_B: r, log(pi / ref) summed over the response.
        desirable_B: bool.
        weights: lambda_D and lambda_U.
    """
    loss_B = torch.sigmoid(beta * torch.where(desirable_B, -score_B, score_B))
    return torch.where(desirable_B, weights[0] * loss_B, weights[1] * loss_B)


def unpaired_loss(
    objective: KTO, batch: TrainingBatch, logprobs_BT: Tensor, reference_logprobs_BT: Tensor | None
) -> tuple[Tensor, Tally]:
    """Summed loss of the micro-batch's responses and their figures; advantages above 0 mark the desirable ones.

    A response with no token left on the mask (all too old) is skipped and counted.
    """
    assert reference_logprobs_BT is not None
    mask_BT, desirable_B = batch.loss_mask_BT, batch.advantages_B > 0
    score_B = masked_log_ratio(logprobs_BT, reference_logprobs_BT.detach(), mask_BT).sum(-1)
    weights = objective.desirable_weight, objective.undesirable_weight
    whole_B = mask_BT.any(-1)
    loss_B = kto_loss(score_B, desirable_B, beta=objective.beta, weights=weights)
    loss = torch.where(whole_B, loss_B, 0.0).sum()
    rewards_B = torch.where(whole_B, objective.beta * score_B.detach(), 0.0)
    tally = Tally()
    tally.add(
        loss=float(loss.detach()),
        responses=whole_B.sum(),
        responses_skipped=(~whole_B).sum(),
        responses_right=(torch.where(desirable_B, rewards_B, -rewards_B) > 0).sum(),
        desirable=(whole_B & desirable_B).sum(),
        desirable_score=rewards_B[desirable_B].sum(),
        undesirable_score=rewards_B[~desirable_B].sum(),
    )
    return loss, tally


def desirability(objective: KTO, rewards: Sequence[float], finish_reasons: Sequence[str]) -> list[float]:
    """Advantages of sampled responses: 1 for a desirable one, -1 for an undesirable one, 0 for one left out."""
    signs = [1.0 if reward >= objective.min_desirable else -1.0 for reward in rewards]
    counts = [objective.truncated == "train" or reason != "length" for reason in finish_reasons]
    return [sign if counted else 0.0 for sign, counted in zip(signs, counts, strict=True)]
