"""A patched tensor is the published one in every byte, whatever its dtype, layout and payload; or it is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlpost.core import delta
from rlpost.core.delta import Piece, TensorPatch, apply, apply_pieces, check_sections, encode, encode_section, joined
from rlpost.core.payloads import PlaneWriter
from rlpost.core.weights import bits, checksum

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
FLOATS += [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool]
SHAPES = [(), (0,), (0, 3), (1,), (7,), (5, 6), (20, 30), (3, 1, 4, 5)]


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    with mock.patch.object(delta, "CHUNK", size):
        yield


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, random: np.random.Generator) -> Tensor:
    """Any bits at all: NaN payloads, denormals, infinities and both zeros among them."""
    if dtype == torch.bool:
        return torch.from_numpy(random.integers(0, 2, shape, dtype=np.uint8)).view(torch.bool)
    drawn = np.frombuffer(random.bytes(math.prod(shape) * dtype.itemsize), f"i{dtype.itemsize}")
    return torch.from_numpy(drawn.copy()).view(dtype).reshape(shape)


def moved(before: Tensor, density: float, kind: str, random: np.random.Generator) -> Tensor:
    """A share of the entries gets other bits: any, the neighbouring value, or one and the same."""
    flat = bits(before).flatten().clone()
    changed = torch.from_numpy(random.random(len(flat)) < density)
    if kind == "any" or before.dtype == torch.bool:
        flat[changed] = bits(random_bits((len(flat),), before.dtype, random))[changed]
    elif kind == "next":
        flat[changed] += 1
    else:
        flat[changed] = 0
    return flat.view(before.dtype).reshape(before.shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another order of memory."""
    if layout == "transposed":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.ndim > 1 else tensor
    if layout == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor


@given(
    dtype=st.sampled_from(FLOATS + INTEGERS),
    shape=st.sampled_from(SHAPES),
    density=st.sampled_from([0.0, 1e-3, 0.01, 0.1, 0.4, 0.6, 0.9, 1.0]),
    kind=st.sampled_from(["any", "next", "same"]),
    layouts=st.tuples(*[st.sampled_from(["plain", "transposed", "strided"])] * 2),
    chunk=st.sampled_from([7, 64, 1 << 22]),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=300, deadline=None)
def test_a_patched_tensor_is_the_published_one_in_every_byte(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    density: float,
    kind: str,
    layouts: tuple[str, str],
    chunk: int,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    held = random_bits(shape, dtype, random)
    published = moved(held, density, kind, random)
    before, after = laid_out(held, layouts[0]), laid_out(published, layouts[1])
    with chunks_of(chunk):
        patch, complete = encode(before, after), encode(None, after)

    assert same_bytes(apply(patch, before), published)
    assert same_bytes(before, held), "the base was written to"
    assert same_bytes(apply(complete, None), published)
    flat = held.clone().flatten()
    apply_pieces(patch.pieces, flat)
    assert same_bytes(flat, published.flatten())

    assert max(patch.num_bytes, complete.num_bytes) <= published.numel() * dtype.itemsize
    assert patch.num_changed == int((bits(held) != bits(published)).sum())
    for found in (patch, complete):
        (section,) = found.sections
        assert (section.start, section.stop) == (0, held.numel())
        assert section.after == checksum(published.flatten())
    assert bool(patch.pieces) == (patch.num_changed > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_that_compare_equal_or_unequal_to_themselves_arrive_as_bits(dtype: torch.dtype) -> None:
    before = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), 1.0, 2.0, 3.0], dtype=dtype)
    after = torch.tensor([-0.0, -0.0, float("nan"), float("nan"), float("-inf"), 1.0, 2.0, 0.0], dtype=dtype)
    bits(after)[3] += 1  # another NaN
    bits(after)[7] = 1  # the smallest denormal
    patch = encode(before, after)
    assert patch.num_changed == 5
    assert same_bytes(apply(patch, before), after)


def test_each_encoding_is_taken_where_it_is_smallest() -> None:
    """Bits of weights: 20,000 numbers near one another, as bfloat16 weights of one layer are."""
    random = np.random.default_rng(0)
    weights = torch.from_numpy(random.normal(0, 0.02, 20_000)).bfloat16()
    few = torch.from_numpy(random.random(20_000) < 0.02)

    def encoding(before: Tensor | None, after: Tensor) -> tuple[str, int]:
        (piece,) = encode(before, after).pieces
        return piece.encoding, len(piece.payload)

    stepped, pruned, all_stepped = weights.clone(), weights.clone(), weights.clone()
    bits(stepped)[few] += 1
    pruned[few] = 0
    bits(all_stepped)[:] += 1
    noise = random_bits((20_000,), torch.bfloat16, random)
    assert encoding(weights, stepped)[0] == "index_diff"
    assert encoding(weights, pruned)[0] == "index"
    assert encoding(weights, all_stepped)[0] == "diff"
    assert encoding(noise, weights)[0] == "raw" and encoding(noise, weights)[1] < 30_000
    assert encoding(weights, noise) == ("raw", 40_000)
    assert encode(weights, noise).sections[0].before is None, "what is whole and raw applies to anything"
    assert encoding(None, weights)[0] == "raw" and encoding(None, noise) == ("raw", 40_000)


def test_a_piece_of_a_few_entries_by_hand() -> None:
    """Entry 130 of 256 goes from 0x3f80 to 0x3f7f, one step down: zigzag 1; two bytes of gap 130."""
    before = torch.ones(256, dtype=torch.bfloat16)
    after = before.clone()
    bits(after)[130] = 0x3F7F
    (piece,) = encode(before, after).pieces
    assert (piece.start, piece.stop, piece.num_changed) == (0, 256, 1)
    # One value at one gap; planes of one byte each: 130, 0; in a tie of sizes the new value itself, 0x7f, 0x3f.
    assert piece.encoding == "index"
    assert piece.payload.hex() == "0100000001000000" + "0100000082" + "0100000000" + "010000007f" + "010000003f"


def cut(num_entries: int, num_ranks: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """Where the sections of the ranks begin and end, anywhere; some may be empty."""
    ends = sorted(random.integers(0, num_entries + 1, num_ranks - 1).tolist())
    return list(itertools.pairwise([0, *ends, num_entries]))


def encode_sections(before: Tensor | None, after: Tensor, cuts: Sequence[tuple[int, int]]) -> list[TensorPatch]:
    base_N, target_N = None if before is None else before.flatten(), after.flatten()
    return [
        encode_section(
            None if base_N is None else base_N[start:stop],
            target_N[start:stop],
            shape=tuple(after.shape),
            start=start,
        )
        for start, stop in cuts
    ]


@given(
    dtype=st.sampled_from(FLOATS + INTEGERS),
    shape=st.sampled_from(SHAPES),
    densities=st.tuples(*[st.sampled_from([0.0, 0.01, 0.1, 0.4, 0.6, 1.0])] * 2),
    kind=st.sampled_from(["any", "next", "same"]),
    num_ranks=st.sampled_from([1, 2, 3, 7]),
    chunk=st.sampled_from([7, 64, 1 << 22]),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=300, deadline=None)
def test_sections_of_any_ranks_join_into_the_patch_of_the_tensor(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    densities: tuple[float, float],
    kind: str,
    num_ranks: int,
    chunk: int,
    seed: int,
) -> None:
    """The two halves of the tensor change more and less, so that one section may be whole and the next a change."""
    random = np.random.default_rng(seed)
    held = random_bits(shape, dtype, random)
    middle = held.numel() // 2
    halves = (held.flatten()[:middle], held.flatten()[middle:])
    bits_N = torch.cat([bits(moved(half, d, kind, random)) for half, d in zip(halves, densities, strict=True)])
    published = bits_N.view(dtype).view(shape)
    cuts = cut(held.numel(), num_ranks, random)
    with chunks_of(chunk):
        parts, complete = encode_sections(held, published, cuts), encode_sections(None, published, cuts)
    for base, of_ranks in ((held, parts), (None, complete)):
        patch = joined([of_ranks[i] for i in random.permutation(num_ranks)])
        assert same_bytes(apply(patch, base), published)
        assert [(section.start, section.stop) for section in patch.sections] == cuts
        assert patch.num_bytes == sum(part.num_bytes for part in of_ranks)
        assert patch.full_bytes == published.numel() * dtype.itemsize
    patch = joined(parts)
    assert patch.num_changed == int((bits(held) != bits(published)).sum())
    in_place = held.flatten().clone()
    apply_pieces(patch.pieces, in_place)
    assert same_bytes(in_place.view(shape), published)


def every_fiftieth(num_entries: int) -> Tensor:
    return torch.arange(num_entries).remainder(50).eq(7).float()


def test_sections_that_are_not_the_tensor_once_are_refused() -> None:
    before, after = torch.zeros(600), every_fiftieth(600)
    first, second, third = encode_sections(before, after, [(0, 200), (200, 300), (300, 600)])
    assert same_bytes(apply(joined([third, first, second]), before), after)
    (overlapping,) = encode_sections(before, after, [(200, 400)])
    for parts, message in [
        ([second, third], "a section starts at entry 200 and the one before it ends at 0"),
        ([first, third], "a section starts at entry 300 and the one before it ends at 200"),
        ([first, second], r"its sections end at entry 300 of a tensor of shape \(600,\)"),
        ([first, first, second, third], "a section starts at entry 0 and the one before it ends at 200"),
        ([first, second, third, third], "a section starts at entry 300 and the one before it ends at 600"),
        ([first, second, overlapping, third], "a section starts at entry 200 and the one before it ends at 300"),
        ([first, overlapping, third], "a section starts at entry 300 and the one before it ends at 400"),
    ]:
        with pytest.raises(ValueError, match=message):
            joined(parts)
        with pytest.raises(ValueError, match=message):
            apply(replace(first, sections=tuple(part.sections[0] for part in parts)), before)
    whole = encode_sections(None, after, [(0, 200), (200, 600)])
    for parts in (whole[:1], whole[1:], [*whole, whole[0]], [*whole, whole[1]]):
        with pytest.raises(ValueError, match=r"entr(y|ies) "):
            joined(parts)


def test_sections_of_different_tensors_do_not_join() -> None:
    parts = encode_sections(None, torch.ones(6), [(0, 3), (3, 6)])
    for other in (replace(parts[1], shape=(2, 3)), replace(parts[1], dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"its sections are of tensors of .*\(6, torch.float32\)"):
            joined([parts[0], other])


def test_one_section_may_be_whole_and_another_a_change() -> None:
    random = np.random.default_rng(0)
    before, noise = torch.zeros(800), random_bits((400,), torch.float32, random)
    after = torch.cat([noise, every_fiftieth(400)])
    whole, change = encode_sections(before, after, [(0, 400), (400, 800)])
    assert whole.sections[0].before is None and change.sections[0].before is not None
    patch = joined([whole, change])
    held = before.clone()
    held[:400] = 7.0  # whatever lies under the section that is whole
    assert same_bytes(apply(patch, held), after)
    with pytest.raises(ValueError, match="and none is held"):
        apply(patch, None)
    with pytest.raises(ValueError, match="states no base for entries 0 to 400, and its pieces do not cover them"):
        check_sections(replace(patch, pieces=change.pieces))
    other = encode_section(None, random_bits((400,), torch.float32, random), shape=(800,), compress=False)
    with pytest.raises(ValueError, match="entries 0 to 400 have checksum"):
        apply(replace(patch, pieces=(*other.pieces, *change.pieces)), before)
    held[400] = 7.0
    with pytest.raises(ValueError, match="applies to entries 400 to 800 with checksum"):
        apply(patch, held)


def test_new_values_left_as_they_are_are_views_and_nothing_is_packed() -> None:
    after = torch.ones(200, dtype=torch.bfloat16)
    with chunks_of(64), mock.patch.object(PlaneWriter, "pack", side_effect=AssertionError("packed")):
        first = encode_section(None, after[:50], shape=(200,), compress=False)
        rest = encode_section(None, after[50:], shape=(200,), start=50, compress=False)
    assert [(p.start, p.stop, p.encoding, len(p.payload)) for p in rest.pieces] == [
        (50, 114, "raw", 128), (114, 178, "raw", 128), (178, 200, "raw", 44),
    ]  # fmt: skip
    assert rest.num_changed == 150
    assert same_bytes(apply(joined([rest, first]), None), after)
    after[50], after[199] = 2.0, 3.0
    assert b"".join(piece.payload for piece in rest.pieces) == bits(after[50:]).numpy().tobytes(), "not the same memory"


def test_a_checksum_that_the_caller_knows_is_not_computed_again() -> None:
    before, after = torch.zeros(100), every_fiftieth(100)
    with mock.patch.object(delta, "checksum", side_effect=checksum) as computed:
        patch = encode_section(before, after, shape=(100,), before_checksum="known")
    (section,) = patch.sections
    assert (section.before, section.after) == ("known", checksum(after)) and computed.call_count == 1
    noise = random_bits((100,), torch.float32, np.random.default_rng(0))
    assert encode_section(before, noise, shape=(100,), before_checksum="known").sections[0].before is None


def test_a_served_parameter_changes_in_place_where_the_view_lies_and_nowhere_else() -> None:
    """Rows 2 and 3 of a fused matrix are one tensor of the checkpoint."""
    random = np.random.default_rng(0)
    fused = torch.nn.Parameter(torch.from_numpy(random.normal(0, 0.02, (6, 50))).bfloat16())
    untouched = fused.detach().clone()
    after = moved(fused.detach()[2:4], 0.1, "next", random)
    apply_pieces(encode(fused.detach()[2:4], after).pieces, fused.detach()[2:4].view(-1))
    assert same_bytes(fused.detach()[2:4], after)
    untouched[2:4] = after
    assert same_bytes(fused.detach(), untouched)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (None, r"applies to torch.float32 of shape \(4, 3\), and none is held"),
        (torch.ones(3, 4), r"torch.float32 of shape \(4, 3\), and torch.float32 of \(3, 4\) is held"),
        (torch.ones(4, 3, dtype=torch.float16), r"torch.float32 of shape \(4, 3\), and torch.float16"),
        (torch.ones(4, 3).index_fill(0, torch.tensor(3), 2.0), "to entries 0 to 12 with checksum [0-9a-f]{32}, and [0-9a-f]{32} is held"),
    ],
    ids=["none", "shape", "dtype", "values"],
)  # fmt: skip
@pytest.mark.parametrize("changed", [True, False])
def test_a_wrong_base_is_refused(held: Tensor | None, message: str, changed: bool) -> None:
    before, after = torch.ones(4, 3), torch.ones(4, 3)
    if changed:
        after[1, 1] = 3.0
    with pytest.raises(ValueError, match=message):
        apply(encode(before, after), held)


def test_a_patch_that_leads_elsewhere_is_refused() -> None:
    before = torch.ones(4)
    patch = encode(before, torch.tensor([1.0, 2.0, 1.0, 1.0]))
    other = encode(before, torch.tensor([1.0, 3.0, 1.0, 1.0]))
    (found,), (published,) = other.sections, patch.sections
    message = f"entries 0 to 4 have checksum {found.after}, and {published.after} was published"
    with pytest.raises(ValueError, match=message):
        apply(replace(patch, pieces=other.pieces), before)


def test_a_patch_without_a_base_must_cover_its_tensor() -> None:
    with chunks_of(2):
        patch = encode(None, torch.tensor([1.0, 2.0, 3.0]))
    for pieces in (patch.pieces[:1], patch.pieces[1:], ()):
        with pytest.raises(ValueError, match="states no base for entries 0 to 3, and its pieces do not cover them"):
            apply(replace(patch, pieces=pieces), None)


def raw(start: int, values: list[float]) -> Piece:
    tensor = torch.tensor(values)
    return replace(encode(None, tensor).pieces[0], start=start, stop=start + len(values))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (raw(1, [5.0]), "raw piece of entries 1 to 2 is broken: it must lie between entry 2 and 6"),
        (raw(5, [5.0, 6.0]), "entries 5 to 7 is broken: it must lie between entry 2 and 6"),
        (replace(raw(3, [5.0]), stop=3), "entries 3 to 3 is broken: it must lie"),
        (replace(raw(3, [5.0]), start=-1), "entries -1 to 4 is broken: it must lie"),
        (replace(raw(3, [5.0]), payload=b"abc"), "entries 3 to 4 is broken: it ends after 3 bytes, inside a plane"),
        (replace(raw(3, [5.0]), encoding="index"), "index piece of entries 3 to 4 is broken: it ends after 4 bytes"),
        (replace(raw(3, [5.0]), encoding="sum"), "encodings are raw, index, diff, index_diff, not 'sum'"),
        (
            replace(raw(3, [5.0]), encoding="index", payload=PlaneWriter().pack_at(np.array([2]), np.array([1], "u4"))),
            "index 2 is outside a range of 1",
        ),
    ],
)
def test_nothing_is_written_when_any_piece_is_broken(broken: Piece, message: str) -> None:
    held = torch.zeros(6)
    with pytest.raises(ValueError, match=message):
        apply_pieces([raw(0, [1.0, 2.0]), broken], held)
    assert not held.any()


def test_an_unchanged_tensor_is_not_copied() -> None:
    tensor = torch.ones(5)
    patch = encode(tensor, tensor.clone())
    assert patch.pieces == () and apply(patch, tensor).data_ptr() == tensor.data_ptr()
