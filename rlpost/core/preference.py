"""Preference objectives: make the chosen response of a pair likelier than the rejected one. Axes: K pairs, B = 2 K rows.

Row 2k is a pair's chosen response, row 2k + 1 its rejected one; a pair is never cut. The loss is a sum over pairs, and
the step's denominator is how many pairs it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlpost.core.losses import masked_log_ratio
from rlpost.core.metrics import Tally
from rlpost.types import TrainingBatch

PairLoss = Literal["dpo", "ipo", "simpo", "orpo"]

LARGEST_MEAN_LOGPROB = -1e-6
"""A response of probability 1 has infinite odds; a mean log-prob counts as at most this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A pair's loss, of its two scores: of log pi - log ref summed over the response (dpo) or averaged (ipo), or, without
    a reference, of log pi averaged (simpo, orpo)."""

    loss: PairLoss = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    """dpo, simpo: share of the pairs believed to be the wrong way round."""
    gamma: float = 0.0
    """simpo: margin of beta x score that the chosen response should have."""
    nll_coef: float = 0.0
    """Weight of -log pi, averaged over the chosen response."""
    min_gap: float = 0.0
    """Pairs from sampled groups: least difference of their rewards; a pair of equal rewards is none in any case."""
    min_chosen: float | None = None
    """Pairs from sampled groups: least reward of the chosen response."""
    truncated: Literal["train", "mask"] = "train"
    """Pairs from sampled groups: whether a response cut at the token limit may be part of one."""

    @property
    def needs_reference(self) -> bool:
        return self.loss in ("dpo", "ipo")

    @property
    def aggregation(self) -> Literal["token_mean"]:
        """Rows carry no weight: a response's length enters by its score."""
        return "token_mean"


def dpo_loss(margin_K: Tensor, *, beta: float, label_smoothing: float = 0.0, gamma: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta m - gamma) - e log sigmoid(-(beta m - gamma)), m the chosen score less the rejected.

    DPO, eq. 7 of https://arxiv.org/abs/2305.18290, with label smoothing e (https://ericmitchell.ai/cdpo.pdf); SimPO, with
    its own scores and gamma (https://arxiv.org/abs/2405.14734).
    """
    logits_K = beta * margin_K - gamma
    return -(1 - label_smoothing) * logsigmoid(logits_K) - label_smoothing * logsigmoid(-logits_K)


def ipo_loss(margin_K: Tensor, *, beta: float) -> Tensor:
    """(m - 1 / (2 beta))^2, eq. 17 of https://arxiv.org/abs/2310.12036."""
    return (margin_K - 1 / (2 * beta)).square()


def orpo_loss(chosen_K: Tensor, rejected_K: Tensor, *, beta: float) -> Tensor:
    """-beta log sigmoid(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p) of the geometric mean probability.

    The odds ratio term of ORPO (https://arxiv.org/abs/2403.07691); its other term is `nll_coef` = 1.
    """
    return -beta * logsigmoid(_log_odds(chosen_K) - _log_odds(rejected_K))


def _log_odds(mean_logprob_K: Tensor) -> Tensor:
    mean_logprob_K = mean_logprob_K.clamp(max=LARGEST_MEAN_LOGPROB)
    return mean_logprob_K - torch.log(-torch.expm1(mean_logprob_K))


def preference_loss(
    objective: Preference, batch: TrainingBatch, logprobs_BT: Tensor, reference_logprobs_BT: Tensor | None
) -> tuple[Tensor, Tally]:
    """Summed loss of the micro-batch's pairs and their figures.

    A pair of which one side has no token left on the mask (all too old) is skipped and counted.
    """
    mask_BT = batch.loss_mask_BT
    zeros_BT = torch.zeros_like(logprobs_BT)
    assert (reference_logprobs_BT is not None) == objective.needs_reference
    against_BT = zeros_BT if reference_logprobs_BT is None else reference_logprobs_BT.detach()
    num_tokens_B = mask_BT.sum(-1)
    scores_B = masked_log_ratio(logprobs_BT, against_BT, mask_BT).sum(-1)
    logprobs_B = masked_log_ratio(logprobs_BT, zeros_BT, mask_BT).sum(-1)
    if objective.loss != "dpo":
        scores_B = scores_B / num_tokens_B.clamp(min=1)
    chosen_K, rejected_K = scores_B[0::2], scores_B[1::2]
    whole_K = (num_tokens_B.view(-1, 2) > 0).all(-1)
    losses_K = _pair_losses(objective, chosen_K, rejected_K)
    if objective.nll_coef:
        losses_K = losses_K - objective.nll_coef * (logprobs_B / num_tokens_B.clamp(min=1))[0::2]
    loss = torch.where(whole_K, losses_K, 0.0).sum()
    margin_K, logprobs_K2 = (chosen_K - rejected_K).detach(), logprobs_B.detach().view(-1, 2)
    tally = Tally()
    tally.add(
        loss=float(loss.detach()),
        pairs=whole_K.sum(),
        pairs_skipped=(~whole_K).sum(),
        pairs_right=(whole_K & (margin_K > 0)).sum(),
        margin=torch.where(whole_K, objective.beta * margin_K, 0.0).sum(),
        chosen_logprob=torch.where(whole_K, logprobs_K2[:, 0], 0.0).sum(),
        rejected_logprob=torch.where(whole_K, logprobs_K2[:, 1], 0.0).sum(),
    )
    return loss, tally


def _pair_losses(objective: Preference, chosen_K: Tensor, rejected_K: Tensor) -> Tensor:
    if objective.loss == "orpo":
        return orpo_loss(chosen_K, rejected_K, beta=objective.beta)
    if objective.loss == "ipo":
        return ipo_loss(chosen_K - rejected_K, beta=objective.beta)
    gamma = objective.gamma if objective.loss == "simpo" else 0.0
    return dpo_loss(chosen_K - rejected_K, beta=objective.beta, label_smoothing=objective.label_smoothing, gamma=gamma)


def best_against_worst(objective: Preference, rewards: Sequence[float], finish_reasons: Sequence[str]) -> list[float]:
    """The pair of a sampled group as advantages: 1 for the chosen response, -1 for the rejected, 0 for the rest.

    The first of the best against the first of the worst. All zeros, so that the group counts as one without signal, when
    their rewards differ by nothing or less than `min_gap`, or the best reward is below `min_chosen`.
    """
    eligible = [i for i, reason in enumerate(finish_reasons) if objective.truncated == "train" or reason != "length"]
    advantages = [0.0] * len(rewards)
    if not eligible:
        return advantages
    best, worst = max(eligible, key=lambda i: rewards[i]), min(eligible, key=lambda i: rewards[i])
    gap = rewards[best] - rewards[worst]
    good = objective.min_chosen is None or rewards[best] >= objective.min_chosen
    if good and gap > 0 and gap >= objective.min_gap:
        advantages[best], advantages[worst] = 1.0, -1.0
    return advantages


def pairs_of(advantages: Sequence[float]) -> list[tuple[int, int]]:
    """Indices (chosen, rejected) of each pair among rollouts whose others have advantage 0: pairs stand one after another,
    either side first."""
    marked = [index for index, advantage in enumerate(advantages) if advantage]
    assert len(marked) % 2 == 0, "a pair was cut"
    pairs = []
    for first, second in zip(marked[0::2], marked[1::2], strict=True):
        assert advantages[first] == -advantages[second], "a pair was cut"
        pairs.append((first, second) if advantages[first] > 0 else (second, first))
    return pairs
