"""What a stage optimizes: which rollouts need a gradient, and how objective, loss and figures fit together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlpost.core.metrics import Tally
from rlpost.core.objective import Objective, PolicyGradient, Supervised, loss_and_tally
from rlpost.types import TrainingBatch

SAMPLER = -2.0


def evaluate(
    objective: Objective, ratio: float, advantage: float, reference: float | None = None
) -> tuple[float, float, Tally]:
    """(loss, d loss / d log-prob, tally) of one token with pi/b = ratio."""
    batch = TrainingBatch(
        token_ids_BT=torch.zeros(1, 1, dtype=torch.int64),
        lengths_B=torch.ones(1, dtype=torch.int64),
        loss_mask_BT=torch.ones(1, 1, dtype=torch.bool),
        sampler_logprobs_BT=torch.full((1, 1), SAMPLER),
        advantages_B=torch.tensor([advantage]),
        weights_B=torch.ones(1),
        ages_BT=torch.zeros(1, 1, dtype=torch.int64),
    )
    logprobs: Tensor = torch.full((1, 1), SAMPLER + math.log(ratio), requires_grad=True)
    reference_BT = None if reference is None else torch.full((1, 1), reference)
    loss, tally = loss_and_tally(objective, batch, logprobs, torch.zeros(1, 1), reference_BT)
    loss.backward()
    assert logprobs.grad is not None
    return float(loss.detach()), float(logprobs.grad), tally


def test_around_the_sampler_drift_since_sampling_is_clipped() -> None:
    loss, gradient, _ = evaluate(PolicyGradient(proximal="sampler"), ratio=1.5, advantage=1.0)
    assert (loss, gradient) == pytest.approx((-1.28, 0.0))


def test_around_the_learner_drift_since_sampling_is_a_weight_that_is_truncated() -> None:
    """pi/p = 1 is never clipped; p/b = 1.5 weighs 1.5, and 3 weighs the cap of 2."""
    objective = PolicyGradient(proximal="learner")
    assert evaluate(objective, ratio=1.5, advantage=1.0)[:2] == pytest.approx((-1.5, -1.5))
    assert evaluate(objective, ratio=3.0, advantage=1.0)[:2] == pytest.approx((-2.0, -2.0))


def test_kl_is_added_with_its_coefficient_and_reported_without() -> None:
    """q - p = ln 2: k3 = 1 - ln 2, gradient -1. With coefficient 0.1 and advantage 0 nothing else is in the loss."""
    loss, gradient, tally = evaluate(PolicyGradient(kl_coef=0.1), 1.0, 0.0, reference=SAMPLER + math.log(2))
    assert (loss, gradient) == pytest.approx((0.1 * (1 - math.log(2)), -0.1))
    assert tally.sums["reference_kl"] == pytest.approx(1 - math.log(2))


def test_supervised_ignores_advantages_and_samplers() -> None:
    loss, gradient, tally = evaluate(Supervised(), ratio=math.exp(1.0), advantage=-5.0)
    assert (loss, gradient) == pytest.approx((1.0, -1.0))
    assert (tally.sums["loss"], tally.sums["tokens"]) == (1.0, 1.0)


def test_rollouts_are_skipped_exactly_when_they_cannot_move_a_weight() -> None:
    for objective in (PolicyGradient(), PolicyGradient(proximal="learner")):
        assert not objective.has_gradient(0.0) and evaluate(objective, 1.3, 0.0)[1] == 0.0
        assert objective.has_gradient(1e-9)
    assert PolicyGradient(kl_coef=0.1).has_gradient(0.0)
    assert Supervised().has_gradient(0.0)
