"""The objectives by hand, their gradients against finite differences, and what they must not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlpost.core.losses import (
    Surrogate,
    cispo_surrogate,
    clipped_surrogate,
    denominator,
    importance_ratio,
    importance_weight,
    negative_log_likelihood,
    policy_ratio,
    rollout_weight,
    weighted_sum,
)


def one_token(
    surrogate: Callable[[Tensor, Tensor, Tensor], Surrogate], ratio: float, advantage: float
) -> tuple[float, float, tuple[bool, bool, bool]]:
    """(value, d value / d log pi, clipped at the low, high, dual end) of a token with pi / p = ratio, log p = -3."""
    logprobs = torch.tensor([[-3.0 + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    ratios = policy_ratio(logprobs, torch.full_like(logprobs, -3.0), torch.ones(1, 1, dtype=torch.bool), level="token")
    result = surrogate(ratios, logprobs, torch.tensor([[advantage]], dtype=torch.float64))
    result.values_BT.sum().backward()
    assert logprobs.grad is not None
    return float(result.values_BT.detach()), float(logprobs.grad), tuple(bool(c) for c in result[1:])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.0, 2.0, 2.0, 2.0),  # on policy: the advantage, and the plain policy gradient
        (1.1, 2.0, 2.2, 2.2),  # inside the clip: r A
        (1.5, 2.0, 2.56, 0.0),  # above it, and the advantage asks for more: 1.28 A, no gradient
        (1.5, -2.0, -3.0, -3.0),  # above it, and the advantage asks for less: r A stays
        (0.5, 2.0, 1.0, 1.0),  # below it, and the advantage asks for more: r A stays
        (0.5, -2.0, -1.6, 0.0),  # below it, and the advantage asks for less: 0.8 A, no gradient
    ],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, value: float, gradient: float) -> None:
    """min(r A, clip(r, 0.8, 1.28) A); its gradient in log pi is r A where the first term is the smaller."""
    ours = one_token(
        lambda r, _, a: clipped_surrogate(r, a, clip_low=0.2, clip_high=0.28, dual_clip=None), ratio, advantage
    )
    assert ours[:2] == pytest.approx((value, gradient))
    assert any(ours[2]) == (gradient == 0.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient", "dual"),
    [
        (2.9, -2.0, -5.8, -5.8, False),  # inside the dual clip: r A
        (5.0, -2.0, -6.0, 0.0, True),  # above it: 3 A, no gradient
        (5.0, 2.0, 2.56, 0.0, False),  # wanted tokens are none of its business
        (0.5, -2.0, -1.6, 0.0, False),
    ],
)
def test_the_dual_clip_by_hand(ratio: float, advantage: float, value: float, gradient: float, dual: bool) -> None:
    """For A < 0: max(min(r A, clip(r) A), 3 A)."""
    ours = one_token(
        lambda r, _, a: clipped_surrogate(r, a, clip_low=0.2, clip_high=0.28, dual_clip=3.0), ratio, advantage
    )
    assert (*ours[:2], ours[2][2]) == pytest.approx((value, gradient, dual))


@pytest.mark.parametrize(
    ("ratio", "weight", "clipped"),
    [(1.5, 1.5, (False,) * 3), (9.0, 5.0, (False, True, False)), (0.01, 0.01, (False,) * 3)],
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand(ratio: float, weight: float, clipped: tuple[bool, ...], advantage: float) -> None:
    """min(r, 5) A log pi, whose gradient is min(r, 5) A on either side of the clip and for either sign."""

    def surrogate(ratios: Tensor, logprobs: Tensor, advantages: Tensor) -> Surrogate:
        mask = torch.ones_like(ratios, dtype=torch.bool)
        return cispo_surrogate(ratios, logprobs, advantages, mask, clip_low=1.0, clip_high=4.0)

    ours = one_token(surrogate, ratio, advantage)
    assert ours[:2] == pytest.approx((weight * advantage * (-3.0 + math.log(ratio)), weight * advantage))
    assert ours[2] == clipped


def test_descending_the_loss_makes_good_tokens_likelier_and_bad_ones_rarer() -> None:
    for advantage in (1.0, -1.0):
        _, gradient, _ = one_token(
            lambda r, _, a: clipped_surrogate(r, a, clip_low=0.2, clip_high=0.28, dual_clip=None), 1.0, advantage
        )
        assert gradient * advantage > 0


def test_the_sequence_ratio_is_the_geometric_mean_by_hand() -> None:
    """Token ratios 2, 8 and a third off the mask: (2 x 8)^(1/2) = 4. One token alone has its own ratio."""
    ratios = torch.tensor([[2.0, 8.0, 100.0], [3.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ours = policy_ratio(ratios.log(), torch.zeros(2, 3), mask, level="sequence")
    torch.testing.assert_close(ours[mask], torch.tensor([4.0, 4.0, 3.0]))


def test_a_sequence_ratio_moves_with_its_own_token_alone() -> None:
    """So that advantages of tokens (KL in the reward) reach the tokens they are of: d r_t / d log pi_u is s for t = u."""
    logprobs, mask = torch.tensor([[2.0, 8.0, 1.0]]).log(), torch.tensor([[True, True, False]])
    jacobian = torch.func.jacrev(lambda x: policy_ratio(x, torch.zeros(1, 3), mask, level="sequence")[0])(logprobs)
    torch.testing.assert_close(jacobian[:, 0], torch.diag(torch.tensor([4.0, 4.0, 0.0])))


def test_the_sequence_weight_is_the_product_by_hand() -> None:
    """p / b of 2 and 3 on the mask, 100 off it: 6 for the response; token by token 2 and 3."""
    log_ratio, mask = torch.tensor([[2.0, 3.0, 100.0]]).log(), torch.tensor([[True, True, False]])
    for level, expected in (("token", [2.0, 3.0]), ("sequence", [6.0, 6.0])):
        ours = importance_ratio(log_ratio, torch.zeros(1, 3), mask, level=level)  # type: ignore[arg-type]
        torch.testing.assert_close(ours[mask], torch.tensor(expected))


def test_weights_outside_their_bounds_by_hand() -> None:
    ratios = torch.tensor([[0.1, 0.5, 1.0, 5.0, 5.1, float("inf")]])
    truncated = importance_weight(ratios, form="truncated", low=0.0, high=2.0)
    assert truncated.tolist() == [pytest.approx([0.1, 0.5, 1.0, 2.0, 2.0, 2.0])]
    assert importance_weight(ratios, form="masked", low=0.5, high=5.0).tolist() == [[0.0, 0.5, 1.0, 5.0, 0.0, 0.0]]


def test_the_weight_is_no_way_for_the_gradient_to_flow() -> None:
    proximal = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert not importance_ratio(proximal, torch.ones(1, 2), mask, level="sequence").requires_grad
    assert not policy_ratio(torch.zeros(1, 2), proximal, mask, level="sequence").requires_grad


# -- gradients against finite differences of the published formula ------------------------------------------------------


def random_rows(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(5, 7, generator=generator, dtype=torch.float64)
    noise = torch.randn(5, 7, generator=generator, dtype=torch.float64) / 4
    return {
        "logprobs": logprobs,
        "proximal": logprobs + noise,
        "advantages": torch.randn(5, 1, generator=generator, dtype=torch.float64).expand(5, 7),
        "mask": torch.rand(5, 7, generator=generator) < 0.7,
    }


def finite_difference(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(x)
    for index in range(x.numel()):
        offset = torch.zeros_like(x).flatten()
        offset[index] = step
        offset = offset.view_as(x)
        gradient.view(-1)[index] = (f(x + offset) - f(x - offset)) / (2 * step)
    return gradient


def test_gradients_of_the_clipped_surrogate_pass_gradcheck() -> None:
    rows = random_rows()

    def loss(logprobs: Tensor) -> Tensor:
        ratios = policy_ratio(logprobs, rows["proximal"], rows["mask"], level="token")
        values = clipped_surrogate(ratios, rows["advantages"], clip_low=0.1, clip_high=0.1, dual_clip=1.3).values_BT
        return weighted_sum(values, torch.ones(5, dtype=torch.float64), rows["mask"])

    assert torch.autograd.gradcheck(loss, rows["logprobs"].requires_grad_())


def test_sequence_ratios_have_the_gradient_of_the_published_sequence_objective() -> None:
    """GSPO: mean over rows of min(s A, clip(s) A) with s = exp(mean_t log r), written down row by row."""
    rows = random_rows()
    proximal, mask, advantages = rows["proximal"], rows["mask"], rows["advantages"]

    def published(logprobs: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(5):
            s = (logprobs - proximal)[row][mask[row]].mean().exp()
            total = total + torch.minimum(s * advantages[row, 0], s.clamp(0.95, 1.05) * advantages[row, 0])
        return total

    logprobs = rows["logprobs"].clone().requires_grad_()
    ratios = policy_ratio(logprobs, proximal, mask, level="sequence")
    values = clipped_surrogate(ratios, advantages, clip_low=0.05, clip_high=0.05, dual_clip=None).values_BT
    ours = weighted_sum(values, 1.0 / mask.sum(-1), mask)
    ours.backward()
    torch.testing.assert_close(ours.detach(), published(rows["logprobs"]))
    expected = finite_difference(published, rows["logprobs"])
    assert 0 < int((expected.abs().sum(-1) == 0).sum()) < 5  # some rows are clipped, some are not
    torch.testing.assert_close(logprobs.grad, expected, atol=1e-8, rtol=1e-6)


def test_cispo_has_the_gradient_of_log_pi_under_fixed_weights() -> None:
    rows = random_rows()
    proximal, mask, advantages = rows["proximal"], rows["mask"], rows["advantages"]
    fixed = (rows["logprobs"] - proximal).exp().clamp(max=1.1)
    logprobs = rows["logprobs"].clone().requires_grad_()
    ratios = policy_ratio(logprobs, proximal, mask, level="token")
    values = cispo_surrogate(ratios, logprobs, advantages, mask, clip_low=1.0, clip_high=0.1).values_BT
    weighted_sum(values, torch.ones(5, dtype=torch.float64), mask).backward()
    expected = finite_difference(lambda x: (fixed * advantages * x)[mask].sum(), rows["logprobs"])
    torch.testing.assert_close(logprobs.grad, expected, atol=1e-8, rtol=1e-6)


# -- supervised loss, weights, denominators ----------------------------------------------------------------------------


def test_negative_log_likelihood_by_hand() -> None:
    """Two rows of weights 1 and 1/2: -((-1 - 2) x 1 + (-4) x 1/2) = 5."""
    logprobs = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert float(negative_log_likelihood(logprobs, torch.tensor([1.0, 0.5]), mask)) == 5.0


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
