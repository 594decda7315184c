"""A version as a patch: what changed since another version, the checksums of all of it, and its bytes on a wire or a disk.

Bytes: magic, payloads in the order of the manifest, the manifest (JSON under zstd), its length, xxh3-128 of all before. The
manifest stands last so that tensors can be written one by one; whatever reads it has checked every byte first.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import torch
import xxhash
import zstandard
from torch import Tensor

from rlpost.core.delta import (
    Piece,
    Section,
    TensorPatch,
    apply,
    apply_pieces,
    check_result,
    check_sections,
    encode,
    fitting,
    joined,
)
from rlpost.core.payloads import Buffer
from rlpost.core.weights import dtype_name
from rlpost.types import WeightImage

MAGIC = b"rlpatch1"
_MANIFEST_LENGTH = struct.Struct("<Q")
_DIGEST_BYTES = 16


class UpdateRefused(Exception):
    """A sampler could not prove that it holds what was published; names the tensor or the version, and why.

    Nothing is decoded with what it holds now. A complete update puts it right.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPatch:
    """One version of the weights, as changes of another.

    Example:
        WeightPatch(version=8, base=7, tensors={"model.norm.weight": TensorPatch(...)})
    """

    version: int
    base: int | None
    """The version it applies to; None when it is complete: an anchor."""
    tensors: Mapping[str, TensorPatch]
    """Checkpoint name to patch, of every tensor of the version, those without a change too."""

    @property
    def num_bytes(self) -> int:
        """Of its payloads."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_changed(self) -> int:
        """Entries whose bits changed; all those of a tensor without a base."""
        return sum(tensor.num_changed for tensor in self.tensors.values())

    @property
    def full_bytes(self) -> int:
        """Of the tensors themselves, or of the sections it has of them."""
        return sum(tensor.full_bytes for tensor in self.tensors.values())

    @property
    def num_values(self) -> int:
        """Entries of the tensors themselves, or of the sections it has of them."""
        return sum(tensor.num_values for tensor in self.tensors.values())


def diff(base: WeightImage | None, target: WeightImage) -> WeightPatch:
    """From `base` to `target`. Added tensors, and those of another shape or dtype, are whole; so is everything without a base.

    Raises:
        ValueError: naming the tensors that `target` lacks.
    """
    held = {} if base is None else base.tensors
    refuse_removed(held, target.tensors)
    tensors = {name: encode(held.get(name), tensor) for name, tensor in target.tensors.items()}
    return WeightPatch(version=target.version, base=None if base is None else base.version, tensors=tensors)


def patched(base: WeightImage | None, patch: WeightPatch) -> WeightImage:
    """The version that `patch` leads to. Tensors without a change are shared with `base`, which stays as it is.

    Raises:
        ValueError: when `base` is not the patch's base, in number or in any byte, or the patch is broken: ask for a complete one.
    """
    held = {}
    if patch.base is not None:
        _check_follows(patch, None if base is None else base.version)
        held = {} if base is None else base.tensors
    refuse_removed(held, patch.tensors)
    tensors = {name: patched_tensor(patch, name, held.get(name)) for name in patch.tensors}
    return WeightImage(version=patch.version, tensors=tensors)


def joined_patch(parts: Sequence[WeightPatch]) -> WeightPatch:
    """One version from what each rank of a learner encoded of it.

    Raises:
        ValueError: when they are of different versions, or a tensor is not whole.
    """
    versions = {(part.version, part.base) for part in parts}
    if len(versions) != 1:
        raise ValueError(f"the parts are of different (version, base): {sorted(versions, key=str)}")
    ((version, base),) = versions
    of_tensor: dict[str, list[TensorPatch]] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            of_tensor.setdefault(name, []).append(tensor)
    tensors = {}
    for name, patches in of_tensor.items():
        with naming(f"{name}, patched to version {version}"):
            tensors[name] = joined(patches)
    return WeightPatch(version=version, base=base, tensors=tensors)


def patched_tensor(patch: WeightPatch, name: str, held: Tensor | None) -> Tensor:
    """One tensor of `patched`; raises ValueError naming it."""
    with naming(f"{name}, patched to version {patch.version}"):
        return apply(patch.tensors[name], held)


def rebuilt(chain: Sequence[WeightPatch]) -> WeightImage:
    """The version that a chain of patches leads to: the first complete, each other one applying to the one before it.

    Raises:
        ValueError: when the chain has a gap or a piece is broken, or naming the tensor that is not as published.
    """
    check_chain(chain)
    return WeightImage(
        version=chain[-1].version, tensors={name: rebuilt_tensor(chain, name) for name in chain[-1].tensors}
    )


def check_chain(chain: Sequence[WeightPatch]) -> None:
    """Raises ValueError when it has a gap, or loses a tensor."""
    for before, patch in itertools.pairwise([None, *chain]):
        assert patch is not None
        _check_follows(patch, None if before is None else before.version)
        refuse_removed({} if before is None else before.tensors, patch.tensors)


def rebuilt_tensor(chain: Sequence[WeightPatch], name: str) -> Tensor:
    """One tensor of `rebuilt`, changed in place; its checksum is compared once, at the end. Raises ValueError naming it."""
    tensor: Tensor | None = None
    for patch in chain:
        if name in patch.tensors:
            with naming(f"{name}, patched to version {patch.version}"):
                tensor = _advanced(patch.tensors[name], tensor)
    assert tensor is not None, f"no patch of the chain has {name}"
    with naming(f"{name}, patched to version {chain[-1].version}"):
        check_result(chain[-1].tensors[name], tensor.view(-1))
    return tensor


def refuse_removed(before: Iterable[str], after: Iterable[str]) -> None:
    """A model does not lose tensors: raises ValueError naming those of `before` that are not in `after`."""
    if removed := sorted(set(before) - set(after)):
        raise ValueError(f"{', '.join(removed)} would be gone: a patch changes and adds tensors, and removes none")


class PatchWriter:
    """Writes a patch to a stream, holding one tensor's payloads at a time.

    Example:
        writer = PatchWriter(stream, version=8, base=7)
        writer.add("model.norm.weight", encode(before, after))
        writer.finish()
    """

    def __init__(self, stream: BinaryIO, *, version: int, base: int | None) -> None:
        self._stream, self._digest = stream, xxhash.xxh3_128()
        self._manifest: dict[str, Any] = {"version": version, "base": base, "tensors": {}}
        self._write(MAGIC)

    def add(self, name: str, tensor: TensorPatch) -> None:
        for piece in tensor.pieces:
            self._write(piece.payload)
        self._manifest["tensors"][name] = {
            "shape": tensor.shape,
            "dtype": dtype_name(tensor.dtype),
            "sections": [[s.start, s.stop, s.before, s.after] for s in tensor.sections],
            "pieces": [[p.start, p.stop, p.encoding, p.num_changed, len(p.payload)] for p in tensor.pieces],
        }

    def finish(self) -> None:
        manifest = zstandard.compress(json.dumps(self._manifest, separators=(",", ":")).encode())
        self._write(manifest)
        self._write(_MANIFEST_LENGTH.pack(len(manifest)))
        self._stream.write(self._digest.digest())

    def _write(self, data: Buffer) -> None:
        self._digest.update(data)
        self._stream.write(data)


def write_patch(patch: WeightPatch, stream: BinaryIO) -> None:
    writer = PatchWriter(stream, version=patch.version, base=patch.base)
    for name, tensor in patch.tensors.items():
        writer.add(name, tensor)
    writer.finish()


def to_bytes(patch: WeightPatch) -> bytes:
    stream = BytesIO()
    write_patch(patch, stream)
    return stream.getvalue()


def from_bytes(data: Buffer) -> WeightPatch:
    """The patch; its payloads are views of `data`.

    Raises:
        ValueError: when any bit of it is not as it was written, or it is not a patch.
    """
    view = memoryview(data)
    body, digest = view[:-_DIGEST_BYTES], view[-_DIGEST_BYTES:]
    if xxhash.xxh3_128(body).digest() != digest:
        raise ValueError(
            f"the patch of {len(view)} bytes is damaged or cut short: they do not match the checksum at their end"
        )
    if body[: len(MAGIC)] != MAGIC:
        raise ValueError(f"this is no weight patch: it begins with {bytes(body[: len(MAGIC)])!r} instead of {MAGIC!r}")
    end = len(body) - _MANIFEST_LENGTH.size
    start = end - _MANIFEST_LENGTH.unpack(body[end:])[0]
    manifest = json.loads(zstandard.decompress(body[start:end]))
    tensors, offset = {}, len(MAGIC)
    for name, entry in manifest["tensors"].items():
        pieces = []
        for first, stop, encoding, num_changed, num_bytes in entry["pieces"]:
            payload = body[offset : (offset := offset + num_bytes)]
            pieces.append(Piece(start=first, stop=stop, encoding=encoding, num_changed=num_changed, payload=payload))
        tensors[name] = TensorPatch(
            shape=tuple(entry["shape"]),
            dtype=getattr(torch, entry["dtype"]),
            pieces=tuple(pieces),
            sections=tuple(Section(start=s[0], stop=s[1], before=s[2], after=s[3]) for s in entry["sections"]),
        )
    return WeightPatch(version=manifest["version"], base=manifest["base"], tensors=tensors)


def _check_follows(patch: WeightPatch, held: int | None) -> None:
    if patch.base != held:
        applies, holding = (f"version {number}" if number is not None else "nothing" for number in (patch.base, held))
        raise ValueError(f"the patch to version {patch.version} applies to {applies}, and {holding} is held")


def _advanced(patch: TensorPatch, held: Tensor | None) -> Tensor:
    """The tensor held, changed in place; a new one where the patch is whole."""
    check_sections(patch)
    if patch.is_complete:
        return apply(patch, None)
    tensor = fitting(patch, held)
    apply_pieces(patch.pieces, tensor.view(-1))
    return tensor


@contextmanager
def naming(tensor: str) -> Iterator[None]:
    """ValueErrors about a tensor say which."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{tensor}: {error}") from error
