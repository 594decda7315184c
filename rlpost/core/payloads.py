"""The bytes of one changed range: which entries changed, and to what, as integers in byte planes under zstd.

Values are split into byte planes (all lowest bytes, then all second ones, ...): the high bytes of weights and of gaps are nearly
constant, the low ones nearly random, and each plane gets a Huffman code of its own. Every payload is checked while it is
decoded; whatever is wrong with it is a ValueError. N entries of the range, K of them changed.
"""

from __future__ import annotations

import struct

import numpy as np
import zstandard

ESCAPE = 0xFFFF
"""A gap code: "add 65,535 and read on"."""
SAMPLE = 1 << 14
"""Values compressed to see which form of them is smaller."""

_LENGTH = struct.Struct("<I")
_COUNTS = struct.Struct("<II")
Buffer = bytes | memoryview


class PlaneWriter:
    """Packs arrays of unsigned integers. Not for two threads at once: zstd's context is not."""

    def __init__(self) -> None:
        # Planes hold Huffman codes and runs, hardly repetitions: a tiny match table and long matches are faster than level 1
        # and smaller. Negative levels would leave the literals without a Huffman code.
        settings = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, min_match=7, target_length=0
        )
        self._zstd = zstandard.ZstdCompressor(compression_params=settings)

    def pack(self, values: np.ndarray) -> bytes:
        """Each plane as its length and bytes: a zstd frame, or the plane itself where that is not longer."""
        parts = []
        for shift in range(0, 8 * values.itemsize, 8):
            plane = (values >> shift).astype(np.uint8)
            frame = self._zstd.compress(plane.data)
            body = frame if len(frame) < plane.size else plane.tobytes()
            parts += [_LENGTH.pack(len(body)), body]
        return b"".join(parts)

    def pack_at(self, positions_K: np.ndarray, values_K: np.ndarray) -> bytes:
        """Values and the ascending positions they stand at."""
        codes = gap_codes(positions_K)
        return _COUNTS.pack(len(values_K), len(codes)) + self.pack(codes) + self.pack(values_K)

    def smaller(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """That of two arrays of one length which packs smaller, judged by a sample; `one` in a tie."""
        step = max(1, one.size // SAMPLE)
        return one if len(self.pack(one[::step])) <= len(self.pack(other[::step])) else other


def unpack(payload: Buffer, count: int, dtype: np.dtype) -> np.ndarray:
    """[count] values as `pack` wrote them.

    Raises:
        ValueError: when the payload is anything else.
    """
    values, end = _unpack(memoryview(payload), 0, count, dtype)
    _check_end(payload, end)
    return values


def unpack_at(payload: Buffer, length: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """[K] ascending positions below `length`, int64, and their [K] values.

    Raises:
        ValueError: when the payload is anything that `pack_at` does not write.
    """
    view = memoryview(payload)
    if len(view) < _COUNTS.size:
        raise ValueError(f"it ends after {len(view)} bytes, before its counts")
    num_values, num_codes = _COUNTS.unpack_from(view)
    if not 0 < num_values <= length or not num_values <= num_codes <= num_values + length // ESCAPE:
        raise ValueError(f"it states {num_values} values at {num_codes} gaps, for a range of {length}")
    codes, end = _unpack(view, _COUNTS.size, num_codes, np.dtype(np.uint16))
    positions = positions_of(codes)
    if len(positions) != num_values:
        raise ValueError(f"it has {len(positions)} indices for {num_values} values")
    if positions[-1] >= length:
        raise ValueError(f"index {positions[-1]} is outside a range of {length}")
    values, end = _unpack(view, end, num_values, dtype)
    _check_end(payload, end)
    return positions, values


def gap_codes(positions_K: np.ndarray) -> np.ndarray:
    """uint16: how many unchanged entries lie before each changed one; every 65,535 of them are an `ESCAPE`.

    Example: positions 0, 1, 5 and 70,000 are 0, 0, 3, ESCAPE, 4459.
    """
    gaps = np.diff(positions_K, prepend=-1) - 1
    if gaps.max(initial=0) < ESCAPE:
        return gaps.astype(np.uint16)
    escapes, rest = np.divmod(gaps, ESCAPE)
    codes = np.full(len(gaps) + escapes.sum(), ESCAPE, np.uint16)
    codes[np.cumsum(escapes + 1) - 1] = rest
    return codes


def positions_of(codes: np.ndarray) -> np.ndarray:
    """Inverse of `gap_codes`. Ascending and distinct whatever the codes are: a gap is never negative."""
    ends = codes != ESCAPE
    positions = np.cumsum(codes + ends, dtype=np.int64) - 1
    return positions if ends.all() else positions[ends]


def zigzag(difference: np.ndarray) -> np.ndarray:
    """Differences modulo 2^w as numbers that are small for steps both up and down: 0, -1, 1, -2 become 0, 1, 2, 3."""
    top = 8 * difference.itemsize - 1
    return (difference << 1) ^ -(difference >> top)


def unzigzag(values: np.ndarray) -> np.ndarray:
    """Inverse of `zigzag`."""
    return (values >> 1) ^ -(values & 1)


def _unpack(view: memoryview, start: int, count: int, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """[count] values, and where they end."""
    values = np.zeros(count, dtype)
    for shift in range(0, 8 * dtype.itemsize, 8):
        begin = start + _LENGTH.size
        if begin > len(view) or (stop := begin + _LENGTH.unpack_from(view, start)[0]) > len(view):
            raise ValueError(f"it ends after {len(view)} bytes, inside a plane of {count} values")
        values |= _plane(view[begin:stop], count).astype(dtype) << shift
        start = stop
    return values, start


def _plane(body: memoryview, count: int) -> np.ndarray:
    if len(body) == count:
        return np.frombuffer(body, np.uint8)
    try:
        stated = zstandard.frame_content_size(body)
        # Asked before anything is decoded: a frame may claim any size, and memory would be taken for it.
        if stated != count:
            raise ValueError(f"a plane is of {stated} values instead of {count}")
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"a plane is no zstd frame: {error}") from error


def _check_end(payload: Buffer, end: int) -> None:
    if end != len(payload):
        raise ValueError(f"it goes on for {len(payload) - end} bytes after its values")
