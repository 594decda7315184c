"""Gap codes and planes byte by byte, and payloads that are not what was packed."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.core.payloads import ESCAPE, PlaneWriter, gap_codes, positions_of, unpack, unpack_at, unzigzag, zigzag

UINT16 = np.dtype(np.uint16)


def test_two_values_at_two_places_byte_by_byte() -> None:
    """Entries 1 and 4: one entry lies before the first, two between. Two values, two codes, then low and high bytes of each."""
    payload = PlaneWriter().pack_at(np.array([1, 4]), np.array([0x0102, 0x0304], np.uint16))
    counts = bytes([2, 0, 0, 0, 2, 0, 0, 0])
    length = bytes([2, 0, 0, 0])
    gaps = length + bytes([1, 2]) + length + bytes([0, 0])
    values = length + bytes([0x02, 0x04]) + length + bytes([0x01, 0x03])
    assert payload == counts + gaps + values


@pytest.mark.parametrize(
    ("positions", "codes"),
    [
        ([0, 1, 5, 70_000], [0, 0, 3, ESCAPE, 69_994 - 65_535]),
        ([65_534], [65_534]),
        ([65_535], [ESCAPE, 0]),
        ([65_536, 65_537], [ESCAPE, 1, 0]),
        ([131_070], [ESCAPE, ESCAPE, 0]),
        ([], []),
    ],
)
def test_gaps_are_codes_of_sixteen_bits_with_an_escape(positions: list[int], codes: list[int]) -> None:
    assert gap_codes(np.array(positions, np.int64)).tolist() == codes
    assert positions_of(np.array(codes, np.uint16)).tolist() == positions


@settings(deadline=None)
@given(st.sets(st.integers(0, 1 << 22), max_size=50))
def test_positions_survive_their_codes(positions: set[int]) -> None:
    assert positions_of(gap_codes(np.array(sorted(positions), np.int64))).tolist() == sorted(positions)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_small_steps_up_and_down_are_small_numbers(dtype: type) -> None:
    top = np.iinfo(dtype).max
    steps = np.array(
        [0, top, 1, top - 1, 2, top // 2, top // 2 + 1], dtype
    )  # 0, -1, 1, -2, 2, the largest, the smallest
    assert zigzag(steps).tolist() == [0, 1, 2, 3, 4, top - 1, top]
    assert unzigzag(zigzag(steps)).tolist() == steps.tolist()


@settings(deadline=None)
@given(st.binary(max_size=400).map(lambda data: data[: len(data) // 8 * 8]), st.sampled_from([1, 2, 4, 8]))
def test_values_survive_their_planes(data: bytes, itemsize: int) -> None:
    values = np.frombuffer(data * 5, f"u{itemsize}")
    assert unpack(PlaneWriter().pack(values), len(values), values.dtype).tolist() == values.tolist()


def test_a_constant_plane_costs_next_to_nothing() -> None:
    """Low bytes of 1 ... 255 at random, high bytes all 3: half the bytes remain."""
    values = np.random.default_rng(0).integers(0x300, 0x400, 100_000).astype(np.uint16)
    assert 100_000 <= len(PlaneWriter().pack(values)) < 100_000 + 150


def test_of_two_forms_the_one_that_packs_smaller_is_taken_and_the_first_in_a_tie() -> None:
    writer, random = PlaneWriter(), np.random.default_rng(0).integers(0, 1 << 16, 50_000).astype(np.uint16)
    assert writer.smaller(random, random & 3) is not random
    small = random & 3
    assert writer.smaller(small, random) is small
    assert writer.smaller(small, small.copy()) is small


def planes(*bodies: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(body)) + body for body in bodies)


def broken_payloads() -> dict[str, tuple[bytes, str]]:
    """Name to payload and message, for a range of 10 entries of two bytes."""
    two = struct.pack("<II", 2, 2)
    frame = zstandard.compress(b"abc")
    return {
        "nothing": (b"", "ends after 0 bytes, before its counts"),
        "no values": (struct.pack("<II", 0, 0), "states 0 values"),
        "more values than entries": (struct.pack("<II", 11, 11), "states 11 values at 11 gaps, for a range of 10"),
        "fewer gaps than values": (struct.pack("<II", 3, 2), "states 3 values at 2 gaps"),
        "more gaps than could be": (struct.pack("<II", 2, 3), "states 2 values at 3 gaps"),
        "cut in a length": (two + b"\x02", "ends after 9 bytes, inside a plane"),
        "cut in a plane": (two + planes(b"\x00\x00")[:-1], "inside a plane of 2 values"),
        "an index outside": (two + planes(b"\x00\x09", b"\x00\x00", b"ab", b"cd"), "index 10 is outside a range of 10"),
        "an escape at the end": (two + planes(b"\x00\xff", b"\x00\xff", b"ab", b"cd"), "has 1 indices for 2 values"),
        "a plane that is too long": (two + planes(frame, frame, b"ab", b"cd"), "a plane is of 3 values instead of 2"),
        "a plane that is no frame": (two + planes(b"1", b"\x00\x00", b"ab", b"cd"), "a plane is no zstd frame"),
        "bytes at the end": (two + planes(b"\x00\x08", b"\x00\x00", b"ab", b"cd") + b"!", "goes on for 1 bytes"),
    }


@pytest.mark.parametrize("name", broken_payloads())
def test_what_is_wrong_with_a_payload_is_named(name: str) -> None:
    payload, message = broken_payloads()[name]
    with pytest.raises(ValueError, match=message):
        unpack_at(payload, 10, UINT16)


def test_a_plane_with_room_for_any_size_is_refused_before_it_is_decoded() -> None:
    bomb = zstandard.ZstdCompressor().compress(b"\x00" * (1 << 28))
    assert len(bomb) < 1 << 15
    with pytest.raises(ValueError, match="a plane is of 268435456 values instead of 100000"):
        unpack(planes(bomb, bomb), 100_000, UINT16)


def test_any_cut_and_any_flipped_bit_is_an_error_or_decodes_within_the_range() -> None:
    positions = np.flatnonzero(np.random.default_rng(0).random(2_000) < 0.3)
    payload = PlaneWriter().pack_at(positions, (positions % 7).astype(np.uint16))
    for end in range(len(payload)):
        with pytest.raises(ValueError, match=r"it |plane"):
            unpack_at(payload[:end], 2_000, UINT16)
    refused = 0
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found, values = unpack_at(bytes(flipped), 2_000, UINT16)
        except ValueError:
            refused += 1
        else:
            assert len(found) == len(values) and np.all(np.diff(found) > 0) and found[0] >= 0 and found[-1] < 2_000
    assert refused > 100
