"""Log-probs of sampled tokens, from hidden states. Axes: N scored tokens, H hidden, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

WORKSPACE_ELEMENTS = 2**26
"""Logits held at a time, about: 256 MiB in float32, and up to three times that while they are worked on."""


class _TokenLogprobs(torch.autograd.Function):
    """log softmax((h W^T + bias) / T)[token], T of each token. Nothing of size V is kept: backward computes the logits again.

    Of each chunk of tokens the logits are computed, reduced and forgotten. Saved for backward are the inputs and the
    normalizer Z of each token; with it d/dlogits = (onehot(token) - exp(logits / T - log Z)) / T needs no reduction.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        ids_N: Tensor,
        temperatures_N: Tensor,
        scales: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, normalizers = [], [], []
        columns = (column.split(chunk) for column in (hidden_NH, ids_N, temperatures_N))
        for hidden, ids, temperatures in zip(*columns, strict=True):
            scaled = _scaled_logits(hidden, weight_VH, bias_V, temperatures if scales else None)
            log_softmax = torch.log_softmax(scaled, dim=-1)
            picked, logprob = (x.gather(-1, ids[:, None])[:, 0] for x in (scaled, log_softmax))
            logprobs.append(logprob)
            normalizers.append(picked - logprob)
            entropies.append(-torch.exp(log_softmax, out=scaled).mul_(log_softmax).sum(-1))
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, ids_N, temperatures_N, torch.cat(normalizers))
        ctx.scales, ctx.chunk = scales, chunk
        entropies_N = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies_N)
        return torch.cat(logprobs), entropies_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, ids_N, temperatures_N, log_normalizer_N = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_hidden_NH = torch.empty_like(hidden_NH) if of_hidden else None
        # Chunks add up in at least float32, whatever dtype they are computed in.
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if of_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if of_bias else None
        for start in range(0, len(ids_N), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            hidden, ids, temperatures = hidden_NH[rows], ids_N[rows], temperatures_N[rows]
            scale = (grad_outputs[0][rows] / temperatures)[:, None]
            scaled = _scaled_logits(hidden, weight_VH, bias_V, temperatures if ctx.scales else None)
            scaled -= log_normalizer_N[rows, None]
            grad_logits = scaled.exp_().mul_(-scale).scatter_add_(-1, ids[:, None], scale)
            if grad_bias_V is not None:
                grad_bias_V += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden_NH is not None:
                torch.mm(grad_logits, weight_VH, out=grad_hidden_NH[rows])
            if grad_weight_VH is not None:
                if wide == hidden.dtype:
                    grad_weight_VH.addmm_(grad_logits.t(), hidden)
                else:
                    grad_weight_VH += grad_logits.t() @ hidden
        return (
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if bias_V is None or grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
            None,
            None,
        )


def _scaled_logits(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, temperatures_N: Tensor | None
) -> Tensor:
    """Logits / T in at least float32, in memory of their own: callers write to it. None: T is 1."""
    logits = linear(hidden_NH, weight_VH, bias_V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperatures_N is None else logits.div_(temperatures_N[:, None])


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    token_ids_N: Tensor,
    *,
    temperatures_N: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token under softmax(logits / its temperature), and the entropy of that distribution.

    The output layer is part of it, so that logits live for one chunk of tokens only, in forward and in backward; the
    price is computing them twice. The temperature divides the logits, as the sampler does; dividing log-probs afterwards
    is not the same distribution.

    Args:
        hidden_NH: one row per scored token, any float dtype; logits are reduced in float32.
        weight_VH, bias_V: the output layer's.
        token_ids_N: the token sampled from each row.
        temperatures_N: float, the one it was sampled at; where all are 1 nothing is divided.
        chunk: tokens at a time; default: as many as WORKSPACE_ELEMENTS logits hold.

    Returns:
        logprobs_N (differentiable) and entropies_N in nats (not differentiable), float32.
    """
    assert hidden_NH.shape == (*token_ids_N.shape, weight_VH.shape[1]), (hidden_NH.shape, weight_VH.shape)
    chunk = chunk or max(1, WORKSPACE_ELEMENTS // weight_VH.shape[0])
    scales = bool((temperatures_N != 1).any())
    return _TokenLogprobs.apply(hidden_NH, weight_VH, bias_V, token_ids_N, temperatures_N, scales, chunk)
