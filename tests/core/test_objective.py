"""What a stage optimizes: how objective, loss and figures fit together, and what a step's mean counts."""

from __future__ import annotations

import dataclasses
import math
from statistics import pstdev

import pytest
import torch
from torch import Tensor

from rlpost.core.metrics import Tally, policy_metrics
from rlpost.core.objective import (
    Objective,
    PolicyGradient,
    Supervised,
    loss_and_tally,
    step_denominator,
    trained_units,
)
from rlpost.types import Rollout, TrainingBatch, VersionSpan
from tests.core.conftest import make_batch, rows_of, summary

SAMPLER = -2.0
VARIANTS = {
    "grpo": PolicyGradient(),
    "dual clip": PolicyGradient(dual_clip=1.5),
    "gspo": PolicyGradient(ratio_level="sequence", clip_low=0.05, clip_high=0.05, aggregation="sequence_mean"),
    "cispo": PolicyGradient(clip="cispo", clip_low=1.0, clip_high=0.2),
    "decoupled, token": PolicyGradient(proximal="learner", weight_high=1.2),
    "decoupled, sequence": PolicyGradient(proximal="learner", weight_level="sequence", aggregation="constant"),
    "icepop": PolicyGradient(proximal="learner", weight_form="masked", weight_low=0.8, weight_high=1.2),
    "k2 in the loss": PolicyGradient(kl_coef=0.5, kl_estimator="k2"),
    "k3 in the loss": PolicyGradient(kl_coef=0.5),
    "k1 in the reward": PolicyGradient(kl_coef=0.5, kl_place="reward", kl_estimator="k1"),
}


def evaluate(
    objective: Objective, ratio: float, advantage: float, reference: float | None = None
) -> tuple[float, float, Tally]:
    """(loss, d loss / d log-prob, tally) of one token with pi/b = ratio."""
    batch = make_batch([[SAMPLER]], [[1]], [advantage])
    logprobs: Tensor = torch.full((1, 1), SAMPLER + math.log(ratio), requires_grad=True)
    reference_BT = None if reference is None else torch.full((1, 1), reference)
    loss, tally = loss_and_tally(objective, batch, logprobs, torch.zeros(1, 1), reference_BT)
    loss.backward()
    assert logprobs.grad is not None
    return float(loss.detach()), float(logprobs.grad), tally


def random_batch(aggregation: str = "token_mean") -> tuple[TrainingBatch, Tensor, Tensor]:
    """Batch, log-probs and reference log-probs in float64; some rows are long, one has nothing on the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 9, generator=generator) < 0.7
    mask[2] = False
    sampler = -3 * torch.rand(6, 9, generator=generator, dtype=torch.float64)
    advantages = torch.randn(6, generator=generator).tolist()
    batch = make_batch(sampler.tolist(), mask.tolist(), advantages, aggregation=aggregation, dtype=torch.float64)
    noises = [torch.randn(6, 9, generator=generator, dtype=torch.float64) / 4 for _ in range(2)]
    return batch, batch.sampler_logprobs_BT + noises[0], batch.sampler_logprobs_BT + noises[1]


def gradient(
    objective: Objective, batch: TrainingBatch, logprobs: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor, Tally]:
    leaf = logprobs.clone().requires_grad_()
    loss, tally = loss_and_tally(objective, batch, leaf, torch.zeros_like(leaf), reference)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, tally


def test_around_the_sampler_drift_since_sampling_is_clipped() -> None:
    loss, grad, tally = evaluate(PolicyGradient(proximal="sampler"), ratio=1.5, advantage=1.0)
    assert (loss, grad) == pytest.approx((-1.28, 0.0))
    assert policy_metrics(tally)["actor/pg_clipfrac"] == 1.0


def test_around_the_learner_drift_since_sampling_is_a_weight_that_is_cut_or_masked() -> None:
    """pi/p = 1 is never clipped; p/b = 1.5 weighs 1.5, and 3 weighs the upper bound of 2, or nothing."""
    truncated, masked = (PolicyGradient(proximal="learner", weight_form=form) for form in ("truncated", "masked"))  # type: ignore[arg-type]
    for objective in (truncated, masked):
        assert evaluate(objective, ratio=1.5, advantage=1.0)[:2] == pytest.approx((-1.5, -1.5))
    assert evaluate(truncated, ratio=3.0, advantage=1.0)[:2] == pytest.approx((-2.0, -2.0))
    assert evaluate(masked, ratio=3.0, advantage=1.0)[:2] == (0.0, 0.0)


@pytest.mark.parametrize(("form", "level", "share"), [("truncated", "token", 0.5), ("masked", "sequence", 1.0)])
def test_the_share_of_tokens_whose_weight_was_cut_is_reported(form: str, level: str, share: float) -> None:
    """p/b = 1 and 3: one of two tokens is above the bound of 2, and so is their product."""
    objective = PolicyGradient(proximal="learner", weight_form=form, weight_level=level)  # type: ignore[arg-type]
    batch = make_batch([[SAMPLER, SAMPLER]], [[1, 1]], [1.0])
    logprobs = SAMPLER + torch.tensor([[0.0, math.log(3)]])
    _, tally = loss_and_tally(objective, batch, logprobs, torch.zeros(1, 2), None)
    metrics = policy_metrics(tally)
    assert metrics[f"mismatch/weight_{form}_share"] == share and metrics["actor/pg_clipfrac"] == 0.0


def test_the_share_of_tokens_under_the_dual_clip_is_reported() -> None:
    tally = evaluate(PolicyGradient(dual_clip=3.0), ratio=5.0, advantage=-1.0)[2]
    assert policy_metrics(tally)["actor/pg_clipfrac_dual"] == 1.0
    assert "actor/pg_clipfrac_dual" not in policy_metrics(evaluate(PolicyGradient(), 5.0, -1.0)[2])


def test_kl_is_added_with_its_coefficient_and_reported_without() -> None:
    """q - p = ln 2: k3 = 1 - ln 2, gradient -1. With coefficient 0.1 and advantage 0 nothing else is in the loss."""
    loss, grad, tally = evaluate(PolicyGradient(kl_coef=0.1), 1.0, 0.0, reference=SAMPLER + math.log(2))
    assert (loss, grad) == pytest.approx((0.1 * (1 - math.log(2)), -0.1))
    assert tally.sums["reference_kl"] == pytest.approx(1 - math.log(2))


def test_supervised_ignores_advantages_and_samplers() -> None:
    loss, grad, tally = evaluate(Supervised(), ratio=math.exp(1.0), advantage=-5.0)
    assert (loss, grad) == pytest.approx((1.0, -1.0))
    assert (tally.sums["loss"], tally.sums["tokens"]) == (1.0, 1.0)


# -- what no option may depend on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 4, 5])
@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_parts_in_any_order_add_up_to_the_whole(objective: PolicyGradient, cut: int) -> None:
    batch, logprobs, reference = random_batch(objective.aggregation)
    loss, grad, tally = gradient(objective, batch, logprobs, reference)
    parts = [
        gradient(objective, rows_of(batch, rows), logprobs[rows], reference[rows])
        for rows in (slice(start, start + cut) for start in range(0, 6, cut))
    ]
    torch.testing.assert_close(sum(part[0] for part in reversed(parts)), loss)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)
    merged, whole = Tally.merge(part[2] for part in reversed(parts)), tally
    assert merged.sums == pytest.approx(whole.sums)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("poison", [float("-inf"), float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("objective", [*VARIANTS.values(), Supervised()], ids=[*VARIANTS, "supervised"])
def test_nothing_off_the_mask_reaches_loss_gradient_or_figures(objective: Objective, poison: float) -> None:
    batch, logprobs, reference = random_batch(objective.aggregation)
    expected = gradient(objective, batch, logprobs, reference)
    off = ~batch.loss_mask_BT
    poisoned = dataclasses.replace(batch, sampler_logprobs_BT=batch.sampler_logprobs_BT.masked_fill(off, poison))
    ours = gradient(objective, poisoned, logprobs.masked_fill(off, poison), reference.masked_fill(off, poison))
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert ours[2].sums == expected[2].sums


@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_fresh_tokens_have_the_plain_policy_gradient(objective: PolicyGradient) -> None:
    """pi = p = b = reference: every ratio and weight is 1, and the gradient is -w A, whatever the variant."""
    batch, _, _ = random_batch(objective.aggregation)
    sampler = batch.sampler_logprobs_BT
    expected = torch.where(batch.loss_mask_BT, (-batch.advantages_B * batch.weights_B)[:, None], 0.0)
    torch.testing.assert_close(gradient(objective, batch, sampler, sampler)[1], expected)


# -- which rollouts count ----------------------------------------------------------------------------------------------


def rollout(finish_reason: str) -> Rollout:
    mask = torch.tensor([False, True])
    return Rollout(
        token_ids=torch.tensor([1, 2]),
        loss_mask=mask,
        sampler_logprobs=torch.zeros(2),
        temperature=1.0,
        spans=(VersionSpan(version=0, start=0, end=1),),
        finish_reason=finish_reason,
        text="",
    )


def test_rollouts_are_skipped_exactly_when_they_cannot_move_a_weight() -> None:
    rollouts = [rollout("stop"), rollout("length"), rollout("stop")]
    advantages = [1e-9, -1.0, 0.0]
    expected = {
        PolicyGradient(): [0, 1],
        PolicyGradient(truncated="mask"): [0],
        PolicyGradient(kl_coef=0.1): [0, 1, 2],
        PolicyGradient(kl_coef=0.1, truncated="mask"): [0, 2],
        Supervised(): [0, 1, 2],
    }
    for objective, rows in expected.items():
        assert trained_units(objective, rollouts, advantages) == [(row,) for row in rows]
    for objective in (PolicyGradient(), PolicyGradient(proximal="learner")):
        assert evaluate(objective, 1.3, 0.0)[1] == 0.0


@pytest.mark.parametrize(
    ("aggregation", "train", "mask"), [("token_mean", 14.0, 6.0), ("sequence_mean", 4.0, 3.0), ("constant", 32.0, 24.0)]
)
def test_masked_rollouts_leave_the_denominator_too(aggregation: str, train: float, mask: float) -> None:
    """Four rollouts of 1, 2, 3 and 8 tokens, the last one cut at the limit of 8."""
    groups = [summary((1, "stop"), (2, "stop")), summary((3, "stop"), (8, "length"))]
    for truncated, expected in (("train", train), ("mask", mask)):
        objective = PolicyGradient(aggregation=aggregation, truncated=truncated)  # type: ignore[arg-type]
        value = step_denominator(objective, groups, [(1.0, -1.0)] * 2, max_response_tokens=8)
        assert value == expected


def test_dividing_by_the_batch_std_at_the_end_is_normalizing_every_advantage_at_first() -> None:
    """REINFORCE++ with baseline, whose scale is known only when the step's last group has arrived."""
    advantages = [0.75, -0.25, 0.5, -0.5, -0.25, -0.25]
    batch, logprobs, reference = random_batch()
    batch = dataclasses.replace(batch, advantages_B=torch.tensor(advantages, dtype=torch.float64))
    std = pstdev(advantages)
    normalized = dataclasses.replace(batch, advantages_B=batch.advantages_B / std)
    groups = [summary((1, "stop"), (2, "stop"), (4, "stop"))] * 2
    objective = PolicyGradient(advantage="batch_std")
    late = step_denominator(objective, groups, [advantages[:3], advantages[3:]], max_response_tokens=8)
    assert late == pytest.approx(14.0 * std)
    ours = gradient(objective, batch, logprobs, reference)[1] / late
    expected = gradient(objective, normalized, logprobs, reference)[1] / 14.0
    torch.testing.assert_close(ours, expected)


def test_a_step_without_signal_is_divided_by_its_tokens_alone() -> None:
    objective = PolicyGradient(advantage="batch_std")
    assert step_denominator(objective, [summary((3, "stop"), (4, "stop"))], [(0.0, 0.0)], max_response_tokens=8) == 7.0
