"""The objectives by hand, their gradients, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlpost.core.losses import decoupled_surrogate, denominator, kl_k3, negative_log_likelihood, rollout_weight


def surrogate(
    log_ratio: float, advantage: float, *, log_weight: float = 0.0, weight: float = 1.0, tis_cap: float = 2.0
) -> tuple[float, float]:
    """(loss, d loss / d log-prob) of one token with pi/p = exp(log_ratio), p/b = exp(log_weight), clip 0.2 / 0.28."""
    sampler = torch.tensor([[-3.0]])
    proximal = (sampler + log_weight).requires_grad_()
    logprobs = (proximal.detach() + log_ratio).requires_grad_()
    loss = decoupled_surrogate(
        logprobs,
        proximal,
        sampler,
        torch.tensor([advantage]),
        torch.tensor([weight]),
        torch.tensor([[True]]),
        clip_low=0.2,
        clip_high=0.28,
        tis_cap=tis_cap,
    )
    loss.backward()
    assert logprobs.grad is not None and proximal.grad is None
    return float(loss.detach()), float(logprobs.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on policy: minus the advantage, and the plain policy gradient
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: r A
        (1.5, 2.0, -2.56, 0.0),  # above it, and the advantage asks for more: 1.28 A, no gradient
        (1.5, -2.0, 3.0, 3.0),  # above it, and the advantage asks for less: r A stays
        (0.5, 2.0, -1.0, -1.0),  # below it, and the advantage asks for more: r A stays
        (0.5, -2.0, 1.6, 0.0),  # below it, and the advantage asks for less: 0.8 A, no gradient
    ],
)
def test_the_surrogate_and_its_gradient_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    """Loss -min(r A, clip(r, 0.8, 1.28) A); its gradient in log pi is -r A where the first term is the smaller."""
    assert surrogate(math.log(ratio), advantage) == pytest.approx((loss, gradient))


def test_descending_the_surrogate_makes_good_tokens_likelier_and_bad_ones_rarer() -> None:
    assert surrogate(0.0, 1.0)[1] < 0 < surrogate(0.0, -1.0)[1]


def test_truncated_weight_scales_loss_and_gradient_up_to_its_cap() -> None:
    """p/b = 1.5 weighs 1.5; p/b = 5 weighs the cap, 2. The weight is no way for the gradient to flow."""
    assert surrogate(0.0, 1.0, log_weight=math.log(1.5)) == pytest.approx((-1.5, -1.5))
    assert surrogate(0.0, 1.0, log_weight=math.log(5.0)) == pytest.approx((-2.0, -2.0))


def test_rollout_weights_multiply_the_loss() -> None:
    assert surrogate(0.0, 1.0, weight=0.25) == pytest.approx((-0.25, -0.25))


def test_nothing_off_the_mask_reaches_loss_or_gradient() -> None:
    mask = torch.tensor([[True, False, False]])
    for poison in (float("-inf"), float("nan"), 1e30):
        logprobs = torch.tensor([[-1.0, poison, -1.0]], requires_grad=True)
        sampler = torch.tensor([[-1.0, 0.0, poison]])
        arguments = (logprobs, sampler, sampler, torch.ones(1), torch.ones(1), mask)
        loss = decoupled_surrogate(*arguments, clip_low=0.2, clip_high=0.2, tis_cap=2.0)
        loss = loss + kl_k3(logprobs, sampler, torch.ones(1), mask)
        loss = loss + negative_log_likelihood(logprobs, torch.ones(1), mask)
        loss.backward()
        assert logprobs.grad is not None
        torch.testing.assert_close(loss, torch.tensor(-1.0 + 0.0 + 1.0))
        torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0 + 0.0 - 1.0, 0.0, 0.0]]))


def test_kl_by_hand_and_towards_the_reference() -> None:
    """q - p = ln 2: 2 - ln 2 - 1 = 0.307; gradient in p: 1 - 2 = -1, so descending raises p towards q.

    q - p = -ln 2: 1/2 + ln 2 - 1 = 0.193; gradient 1 - 1/2, so descending lowers p. Equal: 0, and no gradient.
    """
    expected = {math.log(2): (1 - math.log(2), -1.0), -math.log(2): (math.log(2) - 0.5, 0.5), 0.0: (0.0, 0.0)}
    for difference, (value, gradient) in expected.items():
        logprobs = torch.tensor([[-2.0]], requires_grad=True)
        loss = kl_k3(logprobs, logprobs.detach() + difference, torch.ones(1), torch.tensor([[True]]))
        loss.backward()
        assert logprobs.grad is not None
        assert (float(loss.detach()), float(logprobs.grad)) == pytest.approx((value, gradient), abs=1e-6)


def test_kl_is_exact_in_expectation() -> None:
    """Over tokens drawn from the policy, the mean of k3 is KL(policy || reference)."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    expected = (policy * (policy / reference).log()).sum()
    # One row per token, weighted by how often the policy draws it.
    estimate = kl_k3(policy.log()[:, None], reference.log()[:, None], policy, torch.ones(3, 1, dtype=torch.bool))
    torch.testing.assert_close(estimate, expected)


def test_negative_log_likelihood_by_hand() -> None:
    """Two rows of weights 1 and 1/2: -((-1 - 2) x 1 + (-4) x 1/2) = 5."""
    logprobs = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert float(negative_log_likelihood(logprobs, torch.tensor([1.0, 0.5]), mask)) == 5.0


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_losses_of_parts_add_up_to_the_loss_of_the_whole(cut: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, proximal, sampler, reference = (-3 * torch.rand(5, 7, generator=generator) for _ in range(4))
    advantages, weights = torch.randn(5, generator=generator), torch.rand(5, generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.7

    def loss(rows: slice, leaf: Tensor) -> Tensor:
        arguments = (leaf[rows], proximal[rows], sampler[rows], advantages[rows], weights[rows], mask[rows])
        value = decoupled_surrogate(*arguments, clip_low=0.2, clip_high=0.28, tis_cap=2.0)
        value = value + kl_k3(leaf[rows], reference[rows], weights[rows], mask[rows])
        return value + negative_log_likelihood(leaf[rows], weights[rows], mask[rows])

    whole, parts = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    loss(slice(0, 5), whole).backward()
    total = torch.zeros(())
    for start in range(0, 5, cut):
        part = loss(slice(start, start + cut), parts)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss(slice(0, 5), logprobs))
    torch.testing.assert_close(parts.grad, whole.grad)


def test_weights_and_denominators_of_each_aggregation_by_hand() -> None:
    """Rollouts of 2 and 6 tokens whose every token has loss 1 and 3, responses of at most 8.

    token_mean: (2 x 1 + 6 x 3) / 8 = 2.5; sequence_mean: (1 + 3) / 2 = 2; constant: 20 / (2 x 8) = 1.25.
    """
    expected = {"token_mean": 2.5, "sequence_mean": 2.0, "constant": 1.25}
    for aggregation, value in expected.items():
        total = sum(n * loss * rollout_weight(n, aggregation=aggregation) for n, loss in ((2, 1.0), (6, 3.0)))
        assert total / denominator(8, 2, aggregation=aggregation, max_response_tokens=8) == pytest.approx(value)


def test_an_empty_step_divides_by_one() -> None:
    for aggregation in ("token_mean", "sequence_mean"):
        assert denominator(0, 0, aggregation=aggregation, max_response_tokens=8) == 1.0
    assert rollout_weight(0, aggregation="sequence_mean") == 1.0
