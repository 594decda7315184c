"""Log-probs of sampled tokens. Axes: B rows, T positions, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


class _SelectedLogprobs(torch.autograd.Function):
    """log softmax(logits / T)[token], keeping no [B, T, V] tensor for backward but the logits themselves.

    Backward recomputes the softmax chunk by chunk: d/dlogits = (onehot(token) - softmax(logits / T)) / T.
    A plain chunk loop under autograd would keep every chunk's fp32 softmax alive.
    """

    @staticmethod
    def forward(ctx, logits_NV: Tensor, token_ids_N: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        logprobs, entropies = [], []
        for logits, ids in zip(logits_NV.split(chunk), token_ids_N.split(chunk), strict=True):
            log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
            logprobs.append(log_softmax.gather(-1, ids[:, None]).squeeze(-1))
            entropies.append(-(log_softmax.exp() * log_softmax).sum(-1))
        ctx.save_for_backward(logits_NV, token_ids_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        entropies_N = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies_N)
        return torch.cat(logprobs), entropies_N

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        grad_N, _ = grad_outputs
        logits_NV, token_ids_N = ctx.saved_tensors
        grads_NV = torch.empty_like(logits_NV)
        chunks = zip(
            logits_NV.split(ctx.chunk),
            token_ids_N.split(ctx.chunk),
            grad_N.split(ctx.chunk),
            grads_NV.split(ctx.chunk),
            strict=True,
        )
        for logits, ids, grad, out in chunks:
            probs = torch.softmax(logits.float() / ctx.temperature, dim=-1)
            probs.neg_()
            probs.scatter_add_(-1, ids[:, None], torch.ones_like(probs[:, :1]))
            out.copy_(probs * (grad[:, None] / ctx.temperature))
        return grads_NV, None, None, None


def selected_logprobs(
    logits_NV: Tensor, token_ids_N: Tensor, *, temperature: float, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token under softmax(logits / temperature), and the entropy of that distribution.

    The temperature divides the logits, as the sampler does; dividing log-probs afterwards is not the same distribution.

    Args:
        logits_NV: one row per scored token, any float dtype; reduced in float32.
        token_ids_N: the token sampled from each row.
        chunk: rows processed at a time; bounds the float32 workspace to chunk x V.

    Returns:
        logprobs_N (differentiable) and entropies_N in nats (not differentiable), float32.
    """
    assert logits_NV.shape[:1] == token_ids_N.shape, (logits_NV.shape, token_ids_N.shape)
    return _SelectedLogprobs.apply(logits_NV, token_ids_N, temperature, chunk)
