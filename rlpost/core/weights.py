"""Weight images: the bytes a version is made of, their checksums, and how many of them changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's values as integers of the same width, so that -0.0, NaN and infinities compare by their bytes."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def checksum(tensor: Tensor) -> str:
    """xxh3-128 of the tensor's bytes in row-major order, after dtype and shape, so that a reshape is not the same."""
    digest = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(bits(tensor.cpu()).numpy().data)
    return digest.hexdigest()


def unchanged_fraction(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Share of the entries whose bytes are the same in both images: 1.0 when nothing moved."""
    assert before.keys() == after.keys()
    unchanged = sum(int((bits(before[name]) == bits(after[name])).sum()) for name in after)
    return unchanged / sum(tensor.numel() for tensor in after.values())
