"""KL estimators by hand, and where descending each one leads, summed exactly over a 3-token vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlpost.core.kl import kl_terms, kl_to_go
from rlpost.core.objective import PolicyGradient, loss_and_tally
from tests.core.conftest import make_batch

LOGITS = torch.tensor([0.9, -0.4, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
KINDS = [("k1", "reward"), ("k2", "loss"), ("k3", "loss")]


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [("k1", -math.log(2), 1.0), ("k2", math.log(2) ** 2 / 2, -math.log(2)), ("k3", 1 - math.log(2), -1.0)],
)
def test_estimators_by_hand(estimator: str, value: float, gradient: float) -> None:
    """d = log pi - log ref = -ln 2: k1 = d, gradient 1; k2 = d^2 / 2, gradient d; k3 = 2 - 1 - ln 2, gradient 1 - 2."""
    logprobs = torch.tensor([[-2.0]], requires_grad=True)
    mask = torch.tensor([[True]])
    loss = kl_terms(logprobs, torch.tensor([[-2.0 + math.log(2)]]), mask, estimator=estimator).sum()  # type: ignore[arg-type]
    loss.backward()
    assert logprobs.grad is not None
    assert (float(loss.detach()), float(logprobs.grad)) == pytest.approx((value, gradient), abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_the_kl_in_expectation(estimator: str) -> None:
    policy = LOGITS.softmax(-1)
    terms = kl_terms(policy.log()[:, None], REFERENCE[:, None], torch.ones(3, 1, dtype=torch.bool), estimator=estimator)  # type: ignore[arg-type]
    torch.testing.assert_close((policy * terms[:, 0]).sum(), (policy * (policy.log() - REFERENCE)).sum())


def expected_gradient(estimator: str, place: str) -> Tensor:
    """Gradient in the logits of the loss on tokens drawn from the policy, in expectation: one row per token of the
    vocabulary, weighted by how often the policy draws it. No reward, so KL is all there is."""
    objective = PolicyGradient(kl_coef=1.0, kl_place=place, kl_estimator=estimator)  # type: ignore[arg-type]
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)[:, None]
    batch = make_batch(logprobs.detach().tolist(), [[1]] * 3, [0.0] * 3, dtype=torch.float64)
    object.__setattr__(batch, "weights_B", logits.detach().softmax(-1))
    loss, _ = loss_and_tally(objective, batch, logprobs, torch.zeros(3, 1), REFERENCE[:, None])
    loss.backward()
    assert logits.grad is not None
    return logits.grad


def exact_gradient(divergence: Callable[[Tensor], Tensor]) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    divergence(logits.log_softmax(-1)).backward()
    assert logits.grad is not None
    return logits.grad


def test_where_each_choice_leads_on_three_tokens() -> None:
    """k1 in the reward and k2 in the loss descend KL(policy || reference), k3 in the loss KL(reference || policy)."""
    reverse = exact_gradient(lambda logp: (logp.exp() * (logp - REFERENCE)).sum())
    forward = exact_gradient(lambda logp: (REFERENCE.exp() * (REFERENCE - logp)).sum())
    assert not torch.allclose(reverse, forward, rtol=0.1)
    torch.testing.assert_close(expected_gradient("k1", "reward"), reverse)
    torch.testing.assert_close(expected_gradient("k2", "loss"), reverse)
    torch.testing.assert_close(expected_gradient("k3", "loss"), forward)


@pytest.mark.parametrize(("estimator", "place"), KINDS)
def test_descending_leads_to_the_reference(estimator: str, place: str) -> None:
    """The token the reference likes better than the policy (index 2) gains, the one it likes less (index 0) loses."""
    gradient = expected_gradient(estimator, place)
    assert gradient[2] < 0 < gradient[0]


def test_k1_in_the_loss_would_ignore_the_reference() -> None:
    """Why the recipe refuses it: sum_x pi(x) grad log pi(x) = 0, wherever the reference is."""
    torch.testing.assert_close(expected_gradient("k1", "loss"), torch.zeros(3, dtype=torch.float64))


def test_the_cost_to_go_by_hand() -> None:
    """Log-ratios 1, 10 (off the mask), -2, 4: 1 - 2 + 4 = 3, then 2, 2, 4."""
    ours = kl_to_go(
        torch.tensor([[1.0, 10.0, -2.0, 4.0]]), torch.zeros(1, 4), torch.tensor([[True, False, True, True]])
    )
    assert ours.tolist() == [[3.0, 2.0, 2.0, 4.0]]


def test_kl_in_the_reward_is_a_cost_of_the_advantage_and_reported_as_it_is() -> None:
    """Advantage 1, costs to go 3 and 2 at coefficient 0.1: 0.7 and 0.8 are what the tokens are worth."""
    objective = PolicyGradient(kl_coef=0.1, kl_place="reward", kl_estimator="k1")
    batch = make_batch([[-1.0, -1.0]], [[1, 1]], [1.0])
    logprobs = torch.full((1, 2), -1.0, requires_grad=True)
    loss, tally = loss_and_tally(objective, batch, logprobs, torch.zeros(1, 2), torch.tensor([[-2.0, -3.0]]))
    loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.7, -0.8]]))
    assert tally.sums["reference_kl"] == pytest.approx(3.0)


def test_the_cost_to_go_has_the_gradient_of_the_kl_between_whole_responses() -> None:
    """Every response of two tokens out of three, the second's distribution depending on the first. A loss on each token
    alone (k2) misses what the first token does to the KL of the second."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3,), (3, 3)))
    ref_first, ref_second = (
        torch.randn(s, generator=generator, dtype=torch.float64).log_softmax(-1) for s in ((3,), (3, 3))
    )
    i, j = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(-1)
    reference = torch.stack([ref_first[i], ref_second[i, j]], -1)

    def table(leaf: Tensor) -> Tensor:
        """[9, 2] log-probs of the nine responses."""
        return torch.stack([leaf.log_softmax(-1)[i], second.log_softmax(-1)[i, j]], -1)

    exact = first.clone().requires_grad_()
    logprobs = table(exact).sum(-1)
    (logprobs.exp() * (logprobs - reference.sum(-1))).sum().backward()
    gradients = {}
    for estimator, place in (("k1", "reward"), ("k2", "loss")):
        leaf = first.clone().requires_grad_()
        rows = table(leaf)
        batch = make_batch(rows.detach().tolist(), [[1, 1]] * 9, [0.0] * 9, dtype=torch.float64)
        object.__setattr__(batch, "weights_B", rows.detach().sum(-1).exp())
        objective = PolicyGradient(kl_coef=1.0, kl_place=place, kl_estimator=estimator)  # type: ignore[arg-type]
        loss_and_tally(objective, batch, rows, torch.zeros(9, 2), reference)[0].backward()
        gradients[estimator] = leaf.grad
    torch.testing.assert_close(gradients["k1"], exact.grad)
    assert exact.grad is not None and not torch.allclose(gradients["k2"], exact.grad, rtol=0.1)
