"""KTO by hand, against finite differences, and which responses it learns from."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlpost.core.kto import KTO, desirability, kto_loss
from rlpost.core.metrics import Tally, preference_metrics
from rlpost.core.objective import credit, loss_and_tally, step_denominator, trained_units
from rlpost.types import TrainingBatch
from tests.core.conftest import given_rollout, make_batch, rows_of, summary

WEIGHTED = KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def responses() -> tuple[TrainingBatch, Tensor, Tensor]:
    """Two desirable and three undesirable responses of 1 to 9 tokens, on both sides of the reference."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 1, 5, 7, 2])[:, None]
    batch = make_batch(torch.zeros(5, 9).tolist(), mask.tolist(), [1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    logprobs, reference = (-3 * torch.rand(5, 9, generator=generator, dtype=torch.float64) - 0.1 for _ in range(2))
    return batch, logprobs, reference


def evaluate(objective: KTO, batch: TrainingBatch, logprobs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tally]:
    leaf = logprobs.clone().requires_grad_()
    loss, tally = loss_and_tally(objective, batch, leaf, torch.zeros_like(leaf), reference)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, tally


def test_the_loss_by_hand() -> None:
    """r = 0 loses half of the weight on either side; r = 10 at beta 0.1 is sigmoid(1) of the way to what is wanted."""
    scores, desirable = torch.tensor([0.0, 0.0, 10.0, 10.0, -10.0]), torch.tensor([True, False, True, False, False])
    value = kto_loss(scores, desirable, beta=0.1, weights=(1.5, 0.5))
    good, bad = 1 - sigmoid(1.0), 1 - sigmoid(-1.0)
    assert value.tolist() == pytest.approx([0.75, 0.25, 1.5 * good, 0.5 * bad, 0.5 * good])


def test_the_gradient_by_hand() -> None:
    """d/dr of lambda (1 - sigmoid(beta r)) is -lambda beta s (1 - s): most at the reference, none far from it."""
    scores = torch.tensor([0.0, 10.0, 1000.0, -1000.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False, False, True])
    kto_loss(scores, desirable, beta=0.1, weights=(1.5, 0.5)).sum().backward()
    assert scores.grad is not None
    slope = sigmoid(1.0) * sigmoid(-1.0)
    assert scores.grad.tolist() == pytest.approx([-1.5 * 0.1 / 4, 0.5 * 0.1 * slope, 0.0, 0.0])


def test_the_score_is_summed_over_the_response() -> None:
    """Log-ratios 1 + 2 of a desirable response of two tokens, 1 of an undesirable one of one token."""
    batch = make_batch([[0.0, 0.0]] * 2, [[1, 1], [1, 0]], [1.0, -1.0])
    logprobs, reference = torch.tensor([[-3.0, -2.0], [-3.0, -9.0]]), torch.full((2, 2), -4.0)
    loss = evaluate(KTO(beta=0.5, undesirable_weight=2.0), batch, logprobs, reference)[0]
    assert float(loss) == pytest.approx((1 - sigmoid(1.5)) + 2.0 * (1 - sigmoid(-0.5)))


def test_gradients_pass_gradcheck_and_part_the_desirable_from_the_others() -> None:
    batch, logprobs, reference = responses()

    def loss(x: Tensor) -> Tensor:
        return loss_and_tally(WEIGHTED, batch, x, torch.zeros_like(x), reference)[0]

    assert torch.autograd.gradcheck(loss, logprobs.clone().requires_grad_())
    grad, mask = evaluate(WEIGHTED, batch, logprobs, reference)[1], batch.loss_mask_BT
    desirable_BT = (batch.advantages_B > 0)[:, None]
    assert (grad[mask & desirable_BT] < 0).all() and (grad[mask & ~desirable_BT] > 0).all()


def test_responses_add_up_however_they_are_cut() -> None:
    """No response's loss or gradient depends on the others: micro-batches of any size, in any order, make one step."""
    batch, logprobs, reference = responses()
    loss, grad, tally = evaluate(WEIGHTED, batch, logprobs, reference)
    for cuts in ([slice(3, 5), slice(0, 1), slice(1, 3)], [slice(i, i + 1) for i in (4, 2, 0, 1, 3)]):
        parts = {cut.start: evaluate(WEIGHTED, rows_of(batch, cut), logprobs[cut], reference[cut]) for cut in cuts}
        torch.testing.assert_close(sum(part[0] for part in parts.values()), loss)
        assert torch.equal(torch.cat([parts[start][1] for start in sorted(parts)]), grad)
        assert Tally.merge(part[2] for part in parts.values()).sums == pytest.approx(tally.sums)


@pytest.mark.parametrize("poison", [float("-inf"), float("nan"), 1e30])
def test_nothing_off_the_mask_reaches_loss_or_gradient(poison: float) -> None:
    batch, logprobs, reference = responses()
    expected, off = evaluate(WEIGHTED, batch, logprobs, reference), ~batch.loss_mask_BT
    ours = evaluate(WEIGHTED, batch, logprobs.masked_fill(off, poison), reference.masked_fill(off, poison))
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1]) and ours[2].sums == expected[2].sums


@pytest.mark.parametrize("row", [0, 1])
def test_a_response_with_no_token_young_enough_is_skipped_and_counted(row: int) -> None:
    batch, logprobs, reference = responses()
    mask = batch.loss_mask_BT.clone()
    mask[row] = False
    loss, grad, tally = evaluate(WEIGHTED, dataclasses.replace(batch, loss_mask_BT=mask), logprobs, reference)
    others = [i for i in range(5) if i != row]
    rest = TrainingBatch(**{name: getattr(batch, name)[others] for name in TrainingBatch.__slots__})
    expected = evaluate(WEIGHTED, rest, logprobs[others], reference[others])
    torch.testing.assert_close((loss, grad[others]), expected[:2])
    assert not grad[row].any()
    assert tally.sums == pytest.approx(expected[2].sums | {"responses_skipped": 1.0})


def test_figures_by_hand() -> None:
    """Desirable: r = 2 and -1. Undesirable: r = -3, and one that nothing is left of."""
    batch = make_batch([[0.0]] * 4, [[1], [1], [1], [0]], [1.0, 1.0, -1.0, -1.0])
    logprobs = torch.tensor([[-1.0], [-4.0], [-6.0], [-1.0]])
    metrics = preference_metrics(evaluate(KTO(beta=0.5), batch, logprobs, torch.full((4, 1), -3.0))[2])
    assert metrics == pytest.approx(
        {
            "preference/loss": (3 - sigmoid(1.0) - sigmoid(-0.5) - sigmoid(1.5)) / 3,
            "preference/accuracy": 2 / 3,
            "preference/desirable_share": 2 / 3,
            "preference/desirable_score": 0.25,
            "preference/undesirable_score": -1.5,
            "preference/responses": 3.0,
            "preference/responses_skipped": 1.0,
        }
    )


def test_a_step_without_one_side_has_no_score_of_it() -> None:
    batch = make_batch([[0.0]], [[1]], [-1.0])
    metrics = preference_metrics(evaluate(KTO(), batch, torch.zeros(1, 1), torch.zeros(1, 1))[2])
    assert "preference/desirable_score" not in metrics and metrics["preference/undesirable_score"] == 0.0


# -- which responses ---------------------------------------------------------------------------------------------------


def test_every_sampled_response_is_on_one_side_of_the_threshold() -> None:
    rewards, reasons = [1.0, 0.5, 0.49, 0.0], ["stop"] * 4
    assert desirability(KTO(), rewards, reasons) == [1.0, 1.0, -1.0, -1.0]
    assert desirability(KTO(min_desirable=0.9), rewards, reasons) == [1.0, -1.0, -1.0, -1.0]
    assert credit(KTO(), [1.0, 1.0], ["stop"] * 2) == (1.0, 1.0)  # a group of one side teaches as well


def test_truncated_responses_are_left_out_when_asked() -> None:
    rewards, reasons = [1.0, 0.0, 0.0], ["stop", "length", "stop"]
    assert desirability(KTO(), rewards, reasons) == [1.0, -1.0, -1.0]
    assert desirability(KTO(truncated="mask"), rewards, reasons) == [1.0, 0.0, -1.0]


def test_each_response_is_a_unit_and_the_mean_is_over_those_trained_on() -> None:
    advantages = [(1.0, -1.0, 0.0), (-1.0, -1.0, -1.0)]
    flat = [a for group in advantages for a in group]
    assert trained_units(KTO(), [given_rollout()] * 6, flat) == [(0,), (1,), (3,), (4,), (5,)]
    group = summary((3, "stop"), (4, "stop"), (5, "stop"))
    assert step_denominator(KTO(), [group] * 2, advantages, max_response_tokens=8) == 5.0
    assert step_denominator(KTO(), [group], [(0.0,) * 3], max_response_tokens=8) == 1.0
