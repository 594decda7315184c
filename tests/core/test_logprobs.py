"""Log-probs of sampled tokens: by hand, against the dense formula in value and gradient, and what is kept in memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlpost.core.logprobs import token_logprobs


def from_logits(logits: Tensor, ids: list[int], temperature: float) -> tuple[Tensor, Tensor]:
    """An output layer that hands the hidden state through as logits."""
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    ids_N = torch.tensor(ids, dtype=torch.int64)
    return token_logprobs(logits, identity, None, ids_N, temperatures_N=torch.full((len(ids),), temperature))


def test_temperature_divides_the_logits_and_not_the_logprobs() -> None:
    """Logits (0, ln 4) at temperature 2 are (0, ln 2): probabilities 1/3 and 2/3. At temperature 1 they are 1/5, 4/5.

    The square root of 4/5, which is what halving the log-prob gives, is not 2/3.
    """
    logprobs, entropies = from_logits(torch.tensor([[0.0, math.log(4)]] * 2), [0, 1], temperature=2.0)
    torch.testing.assert_close(logprobs.exp(), torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(entropies, torch.full((2,), math.log(3) - 2 / 3 * math.log(2)))


def test_the_gradient_by_hand() -> None:
    """d log p(1) / d logits = (onehot - softmax) / T = (-1/3, 1 - 2/3) / 2, for the logits above."""
    logits = torch.tensor([[0.0, math.log(4)]], requires_grad=True)
    from_logits(logits, [1], temperature=2.0)[0].sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1 / 6, 1 / 6]]))


def random_layer(dtype: torch.dtype, *, num_tokens: int = 8, hidden: int = 5, vocabulary: int = 11) -> list[Tensor]:
    """Hidden states, weight, bias and upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_tokens, hidden), (vocabulary, hidden), (vocabulary,), (num_tokens,))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def temperatures_of(num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Another for each token."""
    return torch.linspace(0.6, 1.4, num_tokens, dtype=dtype)


def test_gradients_pass_gradcheck() -> None:
    *layer, _ = random_layer(torch.float64)
    ids = torch.tensor([0, 10, 3, 3, 7, 1, 2, 9])
    inputs = [x.requires_grad_() for x in layer]
    temperatures = temperatures_of(8, torch.float64)

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logprobs(hidden, weight, bias, ids, temperatures_N=temperatures, chunk=3)[0]

    assert torch.autograd.gradcheck(logprobs, inputs)


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 100, None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_give_the_dense_result_in_value_and_gradient(chunk: int | None, with_bias: bool) -> None:
    """To 1e-6, of the log-probs, the entropies and every gradient, with a temperature for each token."""
    hidden, weight, bias, upstream = random_layer(torch.float32)
    ids = torch.tensor([0, 10, 3, 3, 7, 1, 2, 9])

    def leaves() -> list[Tensor]:
        return [x.clone().requires_grad_() for x in ((hidden, weight, bias) if with_bias else (hidden, weight))]

    ours, dense = leaves(), leaves()
    temperatures = temperatures_of(8)
    logprobs, entropies = token_logprobs(
        ours[0], ours[1], ours[2] if with_bias else None, ids, temperatures_N=temperatures, chunk=chunk
    )
    table = torch.distributions.Categorical(logits=torch.nn.functional.linear(*dense) / temperatures[:, None])
    (logprobs * upstream).sum().backward()
    (table.log_prob(ids) * upstream).sum().backward()

    torch.testing.assert_close(logprobs, table.log_prob(ids), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies, table.entropy(), rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    """1,000 equal logits: -ln 1000 = -6.9078. The nearest bfloat16 is -6.90625."""
    logprobs, _ = from_logits(torch.zeros(1, 1000, dtype=torch.bfloat16), [5], temperature=1.0)
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(1000)]), rtol=1e-6, atol=0)


def test_small_gradients_of_a_bfloat16_weight_are_not_lost_between_chunks() -> None:
    """One token adds 256, 64 add 1 each: of bfloat16's neighbours of 256, 2 apart, none of the 64 would move it."""
    hidden = torch.ones(65, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.tensor([512.0] + [2.0] * 64)
    ids = torch.zeros(65, dtype=torch.int64)
    logprobs, _ = token_logprobs(hidden, weight, None, ids, temperatures_N=torch.ones(65), chunk=1)
    (logprobs * upstream).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[320.0], [-320.0]]


def test_no_token_at_all_still_has_a_gradient() -> None:
    """Rows whose every token is too old are trained on nothing, and a collective waits for their backward pass."""
    logits = torch.randn(4, 5, requires_grad=True)
    from_logits(logits[:0], [], temperature=1.0)[0].sum().backward()
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_what_needs_a_gradient_gets_one(needed: tuple[bool, bool]) -> None:
    hidden, weight, _, _ = random_layer(torch.float32)
    hidden.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    token_logprobs(hidden, weight, None, torch.zeros(8, dtype=torch.int64), temperatures_N=torch.ones(8))[
        0
    ].sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == needed


@pytest.mark.parametrize("vocabulary", [100, 10_000])
def test_what_is_saved_for_backward_does_not_grow_with_the_vocabulary(vocabulary: int) -> None:
    """Beside the layer's own weight: 64 hidden states of 5 numbers, 64 tokens, temperatures and normalizers."""
    hidden, weight, bias, _ = random_layer(torch.float32, num_tokens=64, vocabulary=vocabulary)
    hidden.requires_grad_()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in (weight.data_ptr(), bias.data_ptr()):
            saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.zeros(64, dtype=torch.int64)
        token_logprobs(hidden, weight, bias, ids, temperatures_N=temperatures_of(64))[0].sum()
    assert sum(saved) == 64 * (5 * 4 + 8 + 4 + 4)
