"""What changed between two tensors, bit for bit, in the fewest bytes; and how to change a tensor in place.

Bits are compared as integers, so -0.0 and NaN payloads are values like others, and differences of bits are exact modulo 2^w. A
piece covers at most `CHUNK` entries: memory is bounded, and indices stay far below 2^31. A rank of a sharded learner encodes
its own section of each tensor; patches of sections join into one of the tensor. N flat entries, K changed ones.
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
class Section:
    """Entries [start, stop) of a flattened tensor that one checksum vouches for: all of it, or what one rank encoded.

    Example:
        Section(start=0, stop=6, before="9f2c...", after="03ab...")
    """

    start: int
    stop: int
    before: str | None
    """`core.weights.checksum` of the entries it applies to; None when it needs none: its pieces are raw and cover it all."""
    after: str
    """That of the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPatch:
    """All that changed in one tensor, or in some sections of it. Ranges without a change have no piece.

    Example:
        TensorPatch(shape=(2, 3), dtype=torch.bfloat16, pieces=(), sections=(Section(start=0, stop=6, ...),))
    """

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    """Ascending, each inside one section."""
    sections: tuple[Section, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return sum(len(piece.payload) for piece in self.pieces)

    @property
    def num_values(self) -> int:
        """Entries of the sections themselves."""
        return sum(section.stop - section.start for section in self.sections)

    @property
    def full_bytes(self) -> int:
        """Of the sections themselves."""
        return self.num_values * self.dtype.itemsize

    @property
    def is_complete(self) -> bool:
        """Whether it needs no base."""
        return all(section.before is None for section in self.sections)

    @property
    def num_changed(self) -> int:
        return sum(piece.num_changed for piece in self.pieces)


def encode(before: Tensor | None, after: Tensor) -> TensorPatch:
    """From `before` to `after`; whole without a `before` of its shape and dtype. Payloads never exceed the bytes of `after`."""
    if before is not None and (before.shape, before.dtype) != (after.shape, after.dtype):
        before = None
    base = None if before is None else before.flatten()
    return encode_section(base, after.flatten(), shape=tuple(after.shape))


def encode_section(
    before_N: Tensor | None,
    after_N: Tensor,
    *,
    shape: tuple[int, ...],
    start: int = 0,
    before_checksum: str | None = None,
    compress: bool = True,
) -> TensorPatch:
    """From `before_N` to `after_N`, the N entries from `start` on of a flattened tensor of `shape`.

    Chunks go to the CPU one at a time, wherever the tensors are.

    Args:
        before_checksum: that of `before_N`, from whoever knows it; None: it is computed.
        compress: False leaves new values as they are, for a receiver on the same host. Such a payload is a view of
            `after_N`, good only until that changes.
    """
    assert after_N.ndim == 1
    assert before_N is None or (before_N.shape, before_N.dtype) == (after_N.shape, after_N.dtype)
    writer, pieces = PlaneWriter(), []
    for low in range(0, len(after_N), CHUNK):
        after = _unsigned(after_N[low : low + CHUNK].cpu())
        before = None if before_N is None else _unsigned(before_N[low : low + CHUNK].cpu())
        if before is None and not compress:
            piece = _bare(after, start + low)
        else:
            piece = _encode_chunk(before, after, start + low, writer)
        if piece is not None:
            pieces.append(piece)
    needs_base = before_N is not None and not _covers(pieces, start, start + len(after_N))
    section = Section(
        start=start,
        stop=start + len(after_N),
        before=(before_checksum or checksum(before_N)) if before_N is not None and needs_base else None,
        after=checksum(after_N),
    )
    return TensorPatch(shape=shape, dtype=after_N.dtype, pieces=tuple(pieces), sections=(section,))


def joined(parts: Sequence[TensorPatch]) -> TensorPatch:
    """The patch of a tensor from those of its sections, each by another rank.

    Raises:
        ValueError: when they are not of one tensor, or their sections are not all of it, once.
    """
    shape, dtype = parts[0].shape, parts[0].dtype
    if any((part.shape, part.dtype) != (shape, dtype) for part in parts):
        raise ValueError(f"its sections are of tensors of {sorted({str((*p.shape, p.dtype)) for p in parts})}")
    sections = sorted((section for part in parts for section in part.sections), key=lambda s: (s.start, s.stop))
    pieces = sorted((piece for part in parts for piece in part.pieces), key=lambda p: p.start)
    patch = TensorPatch(shape=shape, dtype=dtype, pieces=tuple(pieces), sections=tuple(sections))
    check_sections(patch)
    return patch


def check_sections(patch: TensorPatch) -> None:
    """Raises ValueError unless the sections are the tensor, entry by entry, and those without a base are sent whole."""
    end = 0
    for section in patch.sections:
        if section.start != end:
            raise ValueError(f"a section starts at entry {section.start} and the one before it ends at {end}")
        end = section.stop
        if section.before is None and not _covers(patch.pieces, section.start, section.stop):
            raise ValueError(
                f"the patch states no base for entries {section.start} to {section.stop}, and its pieces do not cover them"
            )
    if end != patch.numel:
        raise ValueError(f"its sections end at entry {end} of a tensor of shape {patch.shape}")


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


def _bare(after: np.ndarray, start: int) -> Piece:
    payload = after.data.cast("B")
    return Piece(start=start, stop=start + after.size, encoding="raw", num_changed=after.size, payload=payload)


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
    check_sections(patch)
    if patch.is_complete:
        result = torch.empty(patch.shape, dtype=patch.dtype)
    else:
        base = fitting(patch, held).detach().cpu()
        base_N = base.flatten()
        for section in patch.sections:
            found = checksum(base_N[section.start : section.stop])
            if section.before not in (None, found):
                raise ValueError(
                    f"the patch applies to entries {section.start} to {section.stop} with checksum {section.before}, and"
                    f" {found} is held"
                )
        if not patch.pieces and all(section.before == section.after for section in patch.sections):
            return base
        result = base.clone(memory_format=torch.contiguous_format)
    apply_pieces(patch.pieces, result.view(-1))
    check_result(patch, result.view(-1))
    return result


def check_result(patch: TensorPatch, held_N: Tensor) -> None:
    """Raises ValueError unless every section of the flat `held_N` has the bytes that were encoded."""
    for section in patch.sections:
        if (found := checksum(held_N[section.start : section.stop])) != section.after:
            raise ValueError(
                f"entries {section.start} to {section.stop} have checksum {found}, and {section.after} was published"
            )


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


def _covers(pieces: Sequence[Piece], start: int, stop: int) -> bool:
    """Whether they say all that is to know of entries [start, stop)."""
    inside = [piece for piece in pieces if start <= piece.start < stop]
    return all(piece.encoding == "raw" for piece in inside) and sum(p.stop - p.start for p in inside) == stop - start


def _unsigned(flat: Tensor) -> np.ndarray:
    """Its bits, without a copy where it is contiguous."""
    array = bits(flat).numpy()
    return array.view(f"u{array.itemsize}")
