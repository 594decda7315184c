"""Figures of a step: by hand, and the same however the step was cut."""

from __future__ import annotations

import math

import pytest
import torch

from rlpost.core.metrics import Tally, policy_metrics
from rlpost.core.objective import PolicyGradient, loss_and_tally
from rlpost.types import TrainingBatch
from tests.core.conftest import make_batch


def tally(batch: TrainingBatch, logprobs: torch.Tensor) -> Tally:
    return loss_and_tally(PolicyGradient(), batch, logprobs, torch.full_like(logprobs, 0.5), None)[1]


def test_the_figures_of_four_tokens_by_hand() -> None:
    """Ratios 1, 3 (advantage > 0: clipped), 1/2 (advantage < 0: clipped below), 1.05; two are off the mask."""
    ratios = torch.tensor([[1.0, 3.0, 9.0], [0.5, 1.05, 1.0]])
    batch = make_batch([[-2.0] * 3] * 2, [[1, 1, 0], [1, 1, 0]], [1.0, -1.0], [[0, 1, 0], [5, 3, 0]])
    metrics = policy_metrics(tally(batch, -2.0 + ratios.log()))
    gaps = [0.0, math.log(3), math.log(2), math.log(1.05)]
    expected = {
        "actor/entropy": 0.5,
        "actor/ppo_kl": sum(r - 1 - math.log(r) for r in (1.0, 3.0, 0.5, 1.05)) / 4,
        "actor/pg_clipfrac": 2 / 4,
        "actor/pg_clipfrac_lower": 1 / 4,
        "mismatch/logprob_gap_mean": sum(gaps) / 4,
        "mismatch/logprob_gap_max": math.log(3),
        "mismatch/ratio_max": 3.0,
        "mismatch/ratio_outside_10pct": 2 / 4,
        "staleness/token_max": 5.0,
        "staleness/token_share_age_0": 1 / 4,
        "staleness/token_share_age_1": 1 / 4,
        "staleness/token_share_age_3": 2 / 4,
        "mismatch/logprob_gap_mean_age_0": 0.0,
        "mismatch/logprob_gap_mean_age_1": math.log(3),
        "mismatch/logprob_gap_mean_age_3": (math.log(2) + math.log(1.05)) / 2,
    }
    p95 = metrics.pop("mismatch/logprob_gap_p95")
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert math.log(3) <= p95 <= math.log(3) * 1.26  # the bin's upper edge; ten bins per decade


@pytest.mark.parametrize(("ratio", "advantage"), [(3.0, -1.0), (0.5, 1.0)])
def test_a_ratio_that_the_loss_does_not_clip_is_not_counted_as_clipped(ratio: float, advantage: float) -> None:
    batch = make_batch([[-2.0]], [[1]], [advantage], [[0]])
    assert policy_metrics(tally(batch, torch.tensor([[-2.0 + math.log(ratio)]])))["actor/pg_clipfrac"] == 0.0


def test_the_95th_percentile_sees_a_tail_that_the_mean_hides() -> None:
    """90 tokens agree to 1e-3 and 10 are off by 1: the mean gap is 0.1, the 95th percentile is about 1."""
    gaps = torch.tensor([[1e-3] * 90 + [1.0] * 10])
    batch = make_batch([[-2.0] * 100], [[1] * 100], [1.0], [[0] * 100])
    metrics = policy_metrics(tally(batch, -2.0 + gaps))
    assert metrics["mismatch/logprob_gap_mean"] == pytest.approx(0.1009)
    assert 1.0 <= metrics["mismatch/logprob_gap_p95"] <= 1.26


def test_tallies_of_parts_merge_to_the_tally_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = (-3 * torch.rand(6, 9, generator=generator)).tolist()
    mask = (torch.rand(6, 9, generator=generator) < 0.6).int().tolist()
    mask[2] = [0] * 9
    ages = torch.randint(0, 6, (6, 9), generator=generator).tolist()
    logprobs = -3 * torch.rand(6, 9, generator=generator)
    advantages = torch.randn(6, generator=generator).tolist()

    def part(rows: slice) -> Tally:
        return tally(make_batch(sampler[rows], mask[rows], advantages[rows], ages[rows]), logprobs[rows])

    whole = policy_metrics(part(slice(0, 6)))
    merged = policy_metrics(Tally.merge(part(slice(i, i + 1)) for i in range(6)))
    assert merged == pytest.approx(whole, rel=1e-5)


def test_a_step_without_tokens_has_no_figures() -> None:
    assert policy_metrics(Tally.merge([])) == {}
