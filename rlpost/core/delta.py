"""What changed between two tensors, bit for bit, in the fewest bytes; and how to change a tensor in place.

Bits are compared as integers, so -0.0 and NaN payloads are values like others, and differences of bits are exact modulo 2^w. A
piece covers at most `CHUNK` entries: memory is bounded, indices stay far below 2^31, and a learner rank encodes its own flat
shard. N flat entries, K changed ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rlpost.core.payloads import Buffer, PlaneWriter, unpack, unpack_at, unzigzag, zigzag
from rlpost.core.weights import bits, checksum

CHUNK = 1 << 22
"""Entries per piece; benchmarks/delta_codec.py compares sizes."""
DENSE_FROM = 0.5
"""Share of changed entries from which indices cost more than the zeros between them, measured on bf16 weights."""

Encoding = Literal["raw", "index", "diff", "index_diff"]
"""New values or differences of bits (new minus held), of every entry or at the changed indices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The changes among entries [start, stop) of a flattened tensor.

    Example:
        Piece(start=0, stop=4194304, encoding="index_diff", num_changed=41953, payload=b"...")
    """

    start: int
    stop: int
    encoding: Encoding
    num_changed: int
    payload: Buffer
    """As `core.payloads` packs them, without indices where the encoding has none. A raw payload as long as the range's own bytes
    is those bytes, little-endian."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPatch:
    """All that changed in one tensor. Ranges without a change have no piece.

    Example:
        TensorPatch(shape=(2, 3), dtype=torch.bfloat16, pieces=(), before="9f2c...", after="9f2c...")
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    before: str | None
    """`core.weights.checksum` of the tensor it applies to; None when it needs none: its pieces are raw and cover it all."""
    after: str
    """`core.weights.checksum` of the result."""

    @property
    def num_bytes(self) -> int:
        return sum(len(piece.payload) for piece in self.pieces)

    @property
    def full_bytes(self) -> int:
        """Of the tensor itself."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def num_changed(self) -> int:
        return sum(piece.num_changed for piece in self.pieces)


def encode(before: Tensor | None, after: Tensor) -> TensorPatch:
    """From `before` to `after`; whole without a `before` of its shape and dtype. Payloads never exceed the bytes of `after`."""
    if before is not None and (before.shape, before.dtype) != (after.shape, after.dtype):
        before = None
    pieces = encode_flat(None if before is None else before.flatten(), after.flatten())
    return TensorPatch(
        shape=tuple(after.shape),
        dtype=after.dtype,
        pieces=pieces,
        before=None if before is None or _is_complete(pieces, after.numel()) else checksum(before),
        after=checksum(after),
    )


def encode_flat(before_N: Tensor | None, after_N: Tensor, start: int = 0) -> tuple[Piece, ...]:
    """Pieces of one flat range whose first entry is entry `start` of its tensor: a whole one, or a rank's shard of it.

    Chunks go to the CPU one at a time, wherever the tensors are.
    """
    assert after_N.ndim == 1
    assert before_N is None or (before_N.shape == after_N.shape and before_N.dtype == after_N.dtype)
    writer, pieces = PlaneWriter(), []
    for low in range(0, len(after_N), CHUNK):
        after = _unsigned(after_N[low : low + CHUNK].cpu())
        before = None if before_N is None else _unsigned(before_N[low : low + CHUNK].cpu())
        piece = _encode_chunk(before, after, start + low, writer)
        if piece is not None:
            pieces.append(piece)
    return tuple(pieces)


def _encode_chunk(before: np.ndarray | None, after: np.ndarray, start: int, writer: PlaneWriter) -> Piece | None:
    """None when nothing changed. The smaller of new values and differences, or the bare bytes where neither is smaller."""
    encoding: Encoding = "raw"
    if before is None:
        num_changed, payload = after.size, writer.pack(after)
    else:
        changed = before != after
        num_changed = int(np.count_nonzero(changed))
        if num_changed == 0:
            return None
        if num_changed >= DENSE_FROM * after.size:
            values = writer.smaller(after, zigzag(after - before))
            encoding = "raw" if values is after else "diff"
            payload = writer.pack(values)
        else:
            positions_K = _positions(changed, num_changed)
            new_K = after[positions_K]
            values_K = writer.smaller(new_K, zigzag(new_K - before[positions_K]))
            encoding = "index" if values_K is new_K else "index_diff"
            payload = writer.pack_at(positions_K, values_K)
    if len(payload) >= after.nbytes:
        encoding, payload = "raw", after.tobytes()
    return Piece(start=start, stop=start + after.size, encoding=encoding, num_changed=num_changed, payload=payload)


def _positions(changed: np.ndarray, num_changed: int) -> np.ndarray:
    """[K] where `changed` is True. numpy asks every entry; where few changed, asking eight at a time first is faster."""
    if changed.size % 8 or num_changed > changed.size // 50:
        return np.flatnonzero(changed)
    words = changed.view(np.uint64)
    found = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[found].view(np.bool_))
    return found[inside >> 3] * 8 + (inside & 7)


def apply(patch: TensorPatch, held: Tensor | None) -> Tensor:
    """The patched tensor, on the CPU: `held` itself when nothing changed, which it otherwise leaves as it is.

    Raises:
        ValueError: when `held` is not what the patch applies to, a piece is broken, or the result is not what was encoded.
    """
    if patch.before is None:
        if not _is_complete(patch.pieces, math.prod(patch.shape)):
            raise ValueError(f"the patch states no base, and its pieces do not cover a tensor of shape {patch.shape}")
        result = torch.empty(patch.shape, dtype=patch.dtype)
    else:
        base = fitting(patch, held).detach().cpu()
        if (found := checksum(base)) != patch.before:
            raise ValueError(
                f"the patch applies to a tensor with checksum {patch.before}, and one with {found} is held"
            )
        if not patch.pieces and patch.before == patch.after:
            return base
        result = base.clone(memory_format=torch.contiguous_format)
    apply_pieces(patch.pieces, result.view(-1))
    if (found := checksum(result)) != patch.after:
        raise ValueError(f"the patched tensor's checksum is {found}, and {patch.after} was published")
    return result


def fitting(patch: TensorPatch, held: Tensor | None) -> Tensor:
    """`held`; raises ValueError when there is none, or one of another shape or dtype."""
    if held is None or (tuple(held.shape), held.dtype) != (patch.shape, patch.dtype):
        holding = "none" if held is None else f"{held.dtype} of {tuple(held.shape)}"
        raise ValueError(f"the patch applies to {patch.dtype} of shape {patch.shape}, and {holding} is held")
    return held


def apply_pieces(pieces: Sequence[Piece], held_N: Tensor) -> None:
    """Change `held_N` in place: flat and contiguous, on the CPU; a view into a served parameter, for one.

    All pieces are decoded and checked before the first entry is written; until then their values are held beside the tensor.
    Differences are added to what is there, so the caller sees to it that this is the base, once: not a tied tensor a
    second time, and not again after a crash half-way. Only the checksum of the result proves it.

    Raises:
        ValueError: naming the piece and what is wrong with it; nothing is written then.
    """
    assert held_N.ndim == 1 and held_N.is_contiguous() and held_N.device.type == "cpu"
    held = _unsigned(held_N)
    writes, end = [], 0
    for piece in pieces:
        try:
            if not end <= piece.start < piece.stop <= len(held):
                raise ValueError(f"it must lie between entry {end} and {len(held)}")
            writes.append(_decoded(piece, held[piece.start : piece.stop]))
        except ValueError as error:
            raise ValueError(
                f"the {piece.encoding} piece of entries {piece.start} to {piece.stop} is broken: {error}"
            ) from error
        end = piece.stop
    for write in writes:
        write()


def _decoded(piece: Piece, held: np.ndarray) -> Callable[[], None]:
    """What remains to be done to `held`, the piece's range, once everything else is known to be right."""
    index: slice | np.ndarray = slice(None)
    match piece.encoding:
        case "index" | "index_diff":
            index, values = unpack_at(piece.payload, len(held), held.dtype)
        case "raw" if len(piece.payload) == held.nbytes:
            values = np.frombuffer(piece.payload, held.dtype)
        case "raw" | "diff":
            values = unpack(piece.payload, len(held), held.dtype)
        case unknown:
            raise ValueError(f"encodings are {', '.join(get_args(Encoding))}, not {unknown!r}")

    def write() -> None:
        held[index] = values if piece.encoding in ("raw", "index") else held[index] + unzigzag(values)

    return write


def _is_complete(pieces: Sequence[Piece], numel: int) -> bool:
    """Whether they say all that is to know of a tensor."""
    return all(piece.encoding == "raw" for piece in pieces) and sum(p.stop - p.start for p in pieces) == numel


def _unsigned(flat: Tensor) -> np.ndarray:
    """Its bits, without a copy where it is contiguous."""
    array = bits(flat).numpy()
    return array.view(f"u{array.itemsize}")
