"""Preference objectives by hand, against finite differences, and the pairs they are made of."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from rlpost.core.metrics import Tally, preference_metrics
from rlpost.core.objective import credit, loss_and_tally, step_denominator, trained_units
from rlpost.core.preference import Preference, best_against_worst, dpo_loss, ipo_loss, orpo_loss, pairs_of
from rlpost.types import TrainingBatch
from tests.core.conftest import given_rollout, make_batch, rows_of, summary

VARIANTS = {
    "dpo": Preference(),
    "dpo, smoothed, with nll": Preference(label_smoothing=0.1, nll_coef=0.3),
    "ipo": Preference(loss="ipo", beta=0.5),
    "simpo": Preference(loss="simpo", beta=2.0, gamma=0.5),
    "orpo": Preference(loss="orpo", nll_coef=1.0),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_by_hand() -> None:
    """No margin: ln 2. Margin 10 at beta 0.1: -log sigmoid(1). Smoothing 0.2 mixes in a fifth of the other way round."""
    value = dpo_loss(torch.tensor([0.0, 10.0]), beta=0.1)
    assert value.tolist() == pytest.approx([math.log(2), -math.log(sigmoid(1.0))])
    smoothed = dpo_loss(torch.tensor([10.0]), beta=0.1, label_smoothing=0.2)
    assert float(smoothed) == pytest.approx(-0.8 * math.log(sigmoid(1.0)) - 0.2 * math.log(sigmoid(-1.0)))


def test_ipo_simpo_and_orpo_by_hand() -> None:
    """ipo: (0.3 - 1 / (2 x 0.5))^2. simpo: beta m - gamma = 2 x 0.3 - 0.5. orpo: p = 1/2 and 1/4 have odds 1 and 1/3."""
    assert float(ipo_loss(torch.tensor(0.3), beta=0.5)) == pytest.approx(0.49)
    assert float(dpo_loss(torch.tensor(0.3), beta=2.0, gamma=0.5)) == pytest.approx(-math.log(sigmoid(0.1)))
    ours = orpo_loss(torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25)), beta=0.1)
    assert float(ours) == pytest.approx(-0.1 * math.log(sigmoid(math.log(3))))


def test_a_certain_response_has_finite_odds_and_gradient() -> None:
    chosen = torch.zeros(1, requires_grad=True)
    orpo_loss(chosen, torch.tensor([-1.0]), beta=0.1).sum().backward()
    assert chosen.grad is not None and chosen.grad.isfinite().all()


def pairs(dtype: torch.dtype = torch.float64) -> tuple[TrainingBatch, Tensor, Tensor]:
    """Three pairs of responses of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 1, 5, 7, 2, 9])
    mask = torch.arange(9) < lengths[:, None]
    batch = make_batch(torch.zeros(6, 9).tolist(), mask.tolist(), [1.0, -1.0] * 3, dtype=dtype)
    logprobs, reference = (-3 * torch.rand(6, 9, generator=generator, dtype=dtype) - 0.1 for _ in range(2))
    return batch, logprobs, reference


def evaluate(
    objective: Preference, batch: TrainingBatch, logprobs: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor, Tally]:
    leaf = logprobs.clone().requires_grad_()
    reference_BT = reference if objective.needs_reference else None
    loss, tally = loss_and_tally(objective, batch, leaf, torch.zeros_like(leaf), reference_BT)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, tally


def test_scores_are_sums_for_dpo_and_means_for_the_others() -> None:
    """Chosen: log-ratios 1 + 2 over two tokens. Rejected: 1 over one. Margin 2 summed, 0.5 averaged."""
    batch = make_batch([[0.0, 0.0], [0.0, 0.0]], [[1, 1], [1, 0]], [1.0, -1.0])
    reference = torch.full((2, 2), -4.0)
    logprobs = torch.tensor([[-3.0, -2.0], [-3.0, -4.0]])
    assert float(evaluate(Preference(), batch, logprobs, reference)[0]) == pytest.approx(-math.log(sigmoid(0.2)))
    assert float(evaluate(Preference(loss="ipo", beta=0.5), batch, logprobs, reference)[0]) == pytest.approx(0.25)
    simpo = evaluate(Preference(loss="simpo", beta=2.0), batch, logprobs, reference)[0]
    assert float(simpo) == pytest.approx(-math.log(sigmoid(2.0 * (-2.5 + 3.0))))
    with_nll = evaluate(Preference(loss="simpo", beta=2.0, nll_coef=0.3), batch, logprobs, reference)[0]
    assert float(with_nll - simpo) == pytest.approx(0.3 * 2.5)


@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_gradients_pass_gradcheck_and_raise_the_chosen_over_the_rejected(objective: Preference) -> None:
    batch, logprobs, reference = pairs()
    reference_BT = reference if objective.needs_reference else None

    def loss(x: Tensor) -> Tensor:
        return loss_and_tally(objective, batch, x, torch.zeros_like(x), reference_BT)[0]

    assert torch.autograd.gradcheck(loss, logprobs.clone().requires_grad_())
    if objective.loss != "ipo":  # which pulls a margin that is too large together again
        grad = evaluate(objective, batch, logprobs, reference)[1].sum(-1)
        assert (grad[0::2] < 0).all() and (grad[1::2] > 0).all()


@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_pairs_add_up_in_any_order(objective: Preference) -> None:
    batch, logprobs, reference = pairs()
    loss, grad, tally = evaluate(objective, batch, logprobs, reference)
    parts = [
        evaluate(objective, rows_of(batch, rows), logprobs[rows], reference[rows])
        for rows in (slice(4, 6), slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(torch.cat([parts[i][1] for i in (1, 2, 0)]), grad)
    assert Tally.merge(part[2] for part in parts).sums == pytest.approx(tally.sums)


@pytest.mark.parametrize("poison", [float("-inf"), float("nan"), 1e30])
@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_nothing_off_the_mask_reaches_loss_or_gradient(objective: Preference, poison: float) -> None:
    batch, logprobs, reference = pairs()
    expected = evaluate(objective, batch, logprobs, reference)
    off = ~batch.loss_mask_BT
    ours = evaluate(objective, batch, logprobs.masked_fill(off, poison), reference.masked_fill(off, poison))
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1]) and ours[2].sums == expected[2].sums


@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_a_pair_that_lost_one_side_is_skipped_and_counted(objective: Preference) -> None:
    """The rejected response of the second pair is too old, every token of it: the step is that of the other two."""
    batch, logprobs, reference = pairs()
    mask = batch.loss_mask_BT.clone()
    mask[3] = False
    loss, grad, tally = evaluate(objective, dataclasses.replace(batch, loss_mask_BT=mask), logprobs, reference)
    others = [0, 1, 4, 5]
    expected = evaluate(
        objective,
        TrainingBatch(**{n: getattr(batch, n)[others] for n in TrainingBatch.__slots__}),
        logprobs[others],
        reference[others],
    )
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad[others], expected[1])
    assert not grad[2:4].any()
    assert (tally.sums["pairs"], tally.sums["pairs_skipped"]) == (2.0, 1.0)


def test_figures_by_hand() -> None:
    """Margins +2 and -1 at beta 0.1; chosen log-probs -5 and -2, rejected -3 and -1."""
    rows = [[-3.0, -2.0], [-3.0, 0.0], [-1.0, -1.0], [-1.0, 0.0]]
    batch = make_batch([[0.0, 0.0]] * 4, [[1, 1], [1, 0], [1, 1], [1, 0]], [1.0, -1.0] * 2)
    reference = torch.tensor([[-4.0, -4.0], [-4.0, 0.0], [-0.5, -0.5], [-1.0, 0.0]])
    metrics = preference_metrics(evaluate(Preference(), batch, torch.tensor(rows), reference)[2])
    assert metrics == pytest.approx(
        {
            "preference/loss": -(math.log(sigmoid(0.2)) + math.log(sigmoid(-0.1))) / 2,
            "preference/accuracy": 0.5,
            "preference/margin": 0.05,
            "preference/chosen_logprob": -3.5,
            "preference/rejected_logprob": -2.0,
            "preference/pairs": 2.0,
            "preference/pairs_skipped": 0.0,
        }
    )


# -- making pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "rewards", "expected"),
    [
        (Preference(), [0.0, 1.0, 0.5, 1.0, 0.0], [-1.0, 1.0, 0.0, 0.0, 0.0]),  # the first best, the first worst
        (Preference(), [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]),  # a tie is no pair
        (Preference(min_gap=0.5), [0.6, 1.0], [0.0, 0.0]),
        (Preference(min_gap=0.5), [0.5, 1.0], [-1.0, 1.0]),
        (Preference(min_chosen=0.5), [0.4, 0.0], [0.0, 0.0]),  # the best is not good
        (Preference(min_chosen=0.5), [0.5, 0.0], [1.0, -1.0]),
    ],
)
def test_the_best_against_the_worst(objective: Preference, rewards: list[float], expected: list[float]) -> None:
    assert best_against_worst(objective, rewards, ["stop"] * len(rewards)) == expected


def test_truncated_responses_are_left_out_of_pairs_when_asked() -> None:
    rewards, reasons = [0.0, 1.0, 0.2], ["length", "stop", "stop"]
    assert best_against_worst(Preference(), rewards, reasons) == [-1.0, 1.0, 0.0]
    assert best_against_worst(Preference(truncated="mask"), rewards, reasons) == [0.0, 1.0, -1.0]
    assert best_against_worst(Preference(truncated="mask"), rewards, ["length"] * 3) == [0.0] * 3


def test_pairs_are_found_among_rollouts_that_are_in_none() -> None:
    assert pairs_of([0.0, -1.0, 0.0, 1.0, 1.0, -1.0, 0.0]) == [(3, 1), (4, 5)]
    assert pairs_of([0.0, 0.0]) == []
    with pytest.raises(AssertionError, match="cut"):
        pairs_of([1.0, 0.0])


def test_a_group_is_credited_by_its_objective() -> None:
    assert credit(Preference(), [0.0, 1.0, 0.0], ["stop"] * 3) == (-1.0, 1.0, 0.0)


def test_the_rows_of_a_pair_stay_together_and_ties_are_not_in_the_mean() -> None:
    advantages = [(0.0, -1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, -1.0)]
    flat = [a for group in advantages for a in group]
    assert trained_units(Preference(), [given_rollout()] * 9, flat) == [(2, 1), (6, 8)]
    group = summary((3, "stop"), (4, "stop"), (5, "stop"))
    assert step_denominator(Preference(), [group] * 3, advantages, max_response_tokens=8) == 2.0
    assert step_denominator(Preference(), [group], [(0.0,) * 3], max_response_tokens=8) == 1.0
