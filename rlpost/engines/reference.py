"""The reference of a stage: what the policy at its start thinks of a response. Axes: B rows, T positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import xxhash
from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""As `forward.Scorer`: log-probs first."""


class Reference:
    """Scores responses without a gradient. It never changes, so what it said of a response holds for the whole stage.

    Where the responses are data, and come again every epoch, it remembers: four bytes per token scored. Where a policy
    samples them none comes twice.
    """

    def __init__(self, score: Score, *, remember: bool, collective: bool = False) -> None:
        """
        Args:
            collective: `score` must be called as often on every rank: it is then called even if all is known.
        """
        self.score = score
        self._collective = collective
        self._known: dict[bytes, Tensor] | None = {} if remember else None

    @torch.no_grad()
    def __call__(self, token_ids_BT: Tensor, lengths_B: Tensor, mask_BT: Tensor, temperatures_B: Tensor) -> Tensor:
        """float32 log-probs [B, T] on the host, 0 off the mask; arguments as `forward.Scorer`'s."""
        if self._known is None:
            return self.score(token_ids_BT, lengths_B, mask_BT, temperatures_B)[0].cpu()
        keys = list(map(_key, token_ids_BT.cpu(), mask_BT.cpu(), temperatures_B.cpu()))
        rows = [row for row, key in enumerate(keys) if key not in self._known]
        if rows or self._collective:
            rows = rows or [0]
            scored = self.score(token_ids_BT[rows], lengths_B[rows], mask_BT[rows], temperatures_B[rows])[0]
            self._known |= {keys[row]: s[mask_BT[row]].cpu() for row, s in zip(rows, scored, strict=True)}
        logprobs_BT = torch.zeros(token_ids_BT.shape)
        for row, key in enumerate(keys):
            logprobs_BT[row, mask_BT[row].cpu()] = self._known[key]
        return logprobs_BT


def _key(token_ids: Tensor, mask: Tensor, temperature: Tensor) -> bytes:
    """Of a response after its prompt, at its temperature. What follows the last masked position decides nothing, and is
    padding besides."""
    stop = int(mask.nonzero()[-1]) + 1 if mask.any() else 0
    digest = xxhash.xxh3_128(token_ids[:stop].numpy().tobytes())
    digest.update(mask[:stop].numpy().tobytes())
    digest.update(temperature.numpy().tobytes())
    return digest.digest()
