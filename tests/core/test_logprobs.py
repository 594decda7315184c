"""Log-probs of selected tokens: by hand, against the dense formula, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from rlpost.core.logprobs import selected_logprobs


def test_temperature_divides_the_logits_and_not_the_logprobs() -> None:
    """Logits (0, ln 4) at temperature 2 are (0, ln 2): probabilities 1/3 and 2/3. At temperature 1 they are 1/5, 4/5.

    The square root of 4/5, which is what halving the log-prob gives, is not 2/3.
    """
    logits = torch.tensor([[0.0, math.log(4)]] * 2)
    logprobs, entropies = selected_logprobs(logits, torch.tensor([0, 1]), temperature=2.0)
    torch.testing.assert_close(logprobs.exp(), torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(entropies, torch.full((2,), math.log(3) - 2 / 3 * math.log(2)))


def test_the_gradient_by_hand() -> None:
    """d log p(1) / d logits = (onehot - softmax) / T = (-1/3, 1 - 2/3) / 2, for the logits above."""
    logits = torch.tensor([[0.0, math.log(4)]], requires_grad=True)
    selected_logprobs(logits, torch.tensor([1]), temperature=2.0)[0].sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1 / 6, 1 / 6]]))


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 100])
def test_chunks_give_the_dense_result_in_value_and_gradient(chunk: int) -> None:
    generator = torch.Generator().manual_seed(chunk)
    logits = torch.randn(8, 11, generator=generator)
    ids = torch.randint(0, 11, (8,), generator=generator)
    upstream = torch.randn(8, generator=generator)
    ours, dense = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    logprobs, entropies = selected_logprobs(ours, ids, temperature=0.7, chunk=chunk)
    table = torch.distributions.Categorical(logits=dense / 0.7)
    (logprobs * upstream).sum().backward()
    (table.log_prob(ids) * upstream).sum().backward()

    torch.testing.assert_close(logprobs, table.log_prob(ids))
    torch.testing.assert_close(entropies, table.entropy())
    torch.testing.assert_close(ours.grad, dense.grad)


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    """1,000 equal logits: -ln 1000 = -6.9078. The nearest bfloat16 is -6.90625."""
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    logprobs, _ = selected_logprobs(logits, torch.tensor([5]), temperature=1.0)
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(1000)]), rtol=1e-6, atol=0)


def test_no_token_at_all_still_has_a_gradient() -> None:
    """Rows whose every token is too old are trained on nothing, and a collective waits for their backward pass."""
    logits = torch.randn(4, 5, requires_grad=True)
    logprobs, _ = selected_logprobs(logits[:0], torch.empty(0, dtype=torch.int64), temperature=1.0)
    logprobs.sum().backward()
    assert logits.grad is not None and not logits.grad.any()
