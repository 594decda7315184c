"""Groups and versions as flat arrays, which cross process borders by shared memory.

Ray hands numpy buffers over by shared memory; a torch tensor would be pickled. Packing changes no bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from rlpost.core.patch import WeightPatch
from rlpost.core.payloads import Buffer
from rlpost.types import Prompt, Rollout, RolloutGroup, VersionSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedGroup:
    """A `RolloutGroup` with the sequences of its rollouts laid end to end."""

    prompt: Prompt
    lengths_G: tuple[int, ...]
    token_ids: np.ndarray
    loss_mask: np.ndarray
    sampler_logprobs: np.ndarray
    temperatures_G: tuple[float, ...]
    spans_G: tuple[tuple[VersionSpan, ...], ...]
    finish_reasons_G: tuple[str, ...]
    texts_G: tuple[str, ...]

    @property
    def num_response_tokens_G(self) -> list[int]:
        ends = np.cumsum(self.lengths_G)
        return [int(self.loss_mask[end - n : end].sum()) for end, n in zip(ends, self.lengths_G, strict=True)]


def pack_group(group: RolloutGroup) -> PackedGroup:
    rollouts = group.rollouts
    return PackedGroup(
        prompt=group.prompt,
        lengths_G=tuple(len(r.token_ids) for r in rollouts),
        token_ids=torch.cat([r.token_ids for r in rollouts]).numpy(),
        loss_mask=torch.cat([r.loss_mask for r in rollouts]).numpy(),
        sampler_logprobs=torch.cat([r.sampler_logprobs for r in rollouts]).numpy(),
        temperatures_G=tuple(r.temperature for r in rollouts),
        spans_G=tuple(r.spans for r in rollouts),
        finish_reasons_G=tuple(r.finish_reason for r in rollouts),
        texts_G=tuple(r.text for r in rollouts),
    )


def unpack_group(packed: PackedGroup) -> RolloutGroup:
    lengths = list(packed.lengths_G)
    columns = zip(
        _tensor(packed.token_ids).split(lengths),
        _tensor(packed.loss_mask).split(lengths),
        _tensor(packed.sampler_logprobs).split(lengths),
        packed.temperatures_G,
        packed.spans_G,
        packed.finish_reasons_G,
        packed.texts_G,
        strict=True,
    )
    return RolloutGroup(
        prompt=packed.prompt,
        rollouts=tuple(
            Rollout(
                token_ids=ids,
                loss_mask=mask,
                sampler_logprobs=logprobs,
                temperature=temperature,
                spans=spans,
                finish_reason=reason,
                text=text,
            )
            for ids, mask, logprobs, temperature, spans, reason, text in columns
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPatch:
    """A `WeightPatch` with its payloads apart, in order."""

    patch: WeightPatch
    """Its pieces have empty payloads."""
    payloads: tuple[np.ndarray, ...]


def pack_patch(patch: WeightPatch) -> PackedPatch:
    payloads = [np.frombuffer(p.payload, np.uint8) for tensor in patch.tensors.values() for p in tensor.pieces]
    return PackedPatch(patch=_with_payloads(patch, repeat(b"")), payloads=tuple(payloads))


def unpack_patch(packed: PackedPatch) -> WeightPatch:
    return _with_payloads(packed.patch, (array.data for array in packed.payloads))


def _with_payloads(patch: WeightPatch, payloads: Iterator[Buffer]) -> WeightPatch:
    tensors = {
        name: replace(tensor, pieces=tuple(replace(piece, payload=next(payloads)) for piece in tensor.pieces))
        for name, tensor in patch.tensors.items()
    }
    return replace(patch, tensors=tensors)


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # Arrays in Ray's object store are shared and read-only, which torch cannot express. Nobody here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
