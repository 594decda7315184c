"""A receiver of patches holds, byte for byte, a version that was published, and names it; or it asks for a complete one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor

from rlpost.core.delta import encode_section
from rlpost.core.patch import WeightPatch, diff, from_bytes, joined_patch, patched, rebuilt, to_bytes
from rlpost.core.weights import bits, checksum
from rlpost.types import WeightImage


def version_of(number: int, tensors: Mapping[str, Tensor]) -> WeightImage:
    return WeightImage(version=number, tensors=tensors)


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(30, 8, generator=generator).bfloat16(),
        "norm": torch.ones(8),
        "scale": torch.tensor(1.5, dtype=torch.float16),
        "unused": torch.empty(0, 8),
    }


def stepped(tensors: Mapping[str, Tensor], density: float, random: np.random.Generator) -> dict[str, Tensor]:
    """A share of the entries moves to the next value."""
    result = {}
    for name, tensor in tensors.items():
        moved = torch.from_numpy(np.asarray(random.random(tensor.shape) < density))
        result[name] = (bits(tensor) + moved.to(bits(tensor).dtype)).view(tensor.dtype)
    return result


def same(one: WeightImage, other: WeightImage) -> bool:
    return (
        one.version == other.version
        and one.tensors.keys() == other.tensors.keys()
        and all(t.dtype == other.tensors[name].dtype for name, t in one.tensors.items())
        and all(torch.equal(bits(t), bits(other.tensors[name])) for name, t in one.tensors.items())
    )


def test_a_patch_leads_from_version_to_version_and_names_every_tensor() -> None:
    before = version_of(7, weights())
    after = version_of(8, {**before.tensors, "embed": stepped(before.tensors, 0.1, np.random.default_rng(0))["embed"]})
    patch = from_bytes(to_bytes(diff(before, after)))
    assert (patch.version, patch.base) == (8, 7)
    for name, tensor in patch.tensors.items():
        assert [section.after for section in tensor.sections] == [checksum(after.tensors[name].flatten())]
    assert [name for name, tensor in patch.tensors.items() if tensor.pieces] == ["embed"]
    assert patch.num_changed == int((before.tensors["embed"] != after.tensors["embed"]).sum()) > 0
    assert 0 < patch.num_bytes < 480
    received = patched(before, patch)
    assert same(received, after)
    assert received.tensors["norm"].data_ptr() == before.tensors["norm"].data_ptr(), "unchanged tensors are not copied"


def test_a_complete_patch_needs_nothing_and_replaces_anything() -> None:
    target = version_of(8, weights())
    patch = from_bytes(to_bytes(diff(None, target)))
    assert patch.base is None
    assert same(patched(None, patch), target)
    assert same(patched(version_of(3, {"other": torch.ones(2)}), patch), target)


def test_added_and_reshaped_tensors_are_whole_and_removed_ones_are_named() -> None:
    before = version_of(1, {"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.ones(5)})
    after = version_of(2, {"a": torch.ones(3, 2), "b": torch.ones(4).half(), "c": torch.ones(5), "d": torch.ones(6)})
    patch = diff(before, after)
    assert {name for name, tensor in patch.tensors.items() if tensor.sections[0].before is None} == {"a", "b", "d"}
    assert same(patched(before, patch), after)
    with pytest.raises(ValueError, match="d would be gone"):
        diff(after, before)
    with pytest.raises(ValueError, match="e would be gone"):
        patched(version_of(1, {**before.tensors, "e": torch.ones(1)}), patch)


def test_a_wrong_base_is_refused_by_number_and_by_content() -> None:
    before, after = version_of(7, weights()), version_of(8, weights(seed=1))
    patch = diff(before, after)
    with pytest.raises(ValueError, match="to version 8 applies to version 7, and nothing is held"):
        patched(None, patch)
    with pytest.raises(ValueError, match="to version 8 applies to version 7, and version 8 is held"):
        patched(after, patch)
    # A tensor that did not change is part of the version, too.
    other = version_of(7, {**before.tensors, "norm": torch.zeros(8)})
    with pytest.raises(
        ValueError, match="norm, patched to version 8: the patch applies to entries 0 to 8 with checksum"
    ):
        patched(other, patch)


def chain() -> list[WeightImage]:
    """Four versions; the second has one tensor more, the third another shape of it."""
    random, versions = np.random.default_rng(0), [version_of(3, weights())]
    for number, extra in ((4, {"extra": torch.ones(6)}), (5, {"extra": torch.zeros(2, 4)}), (6, {})):
        versions.append(version_of(number, {**stepped(versions[-1].tensors, 0.1, random), **extra}))
    return versions


def test_a_chain_of_patches_rebuilds_its_last_version() -> None:
    versions = chain()
    patches = [diff(None, versions[0]), *itertools.starmap(diff, itertools.pairwise(versions))]
    for length in range(1, 5):
        assert same(rebuilt(patches[:length]), versions[length - 1])


def test_a_chain_with_a_gap_or_without_a_beginning_is_refused() -> None:
    versions = chain()
    patches = [diff(None, versions[0]), *itertools.starmap(diff, itertools.pairwise(versions))]
    with pytest.raises(ValueError, match="to version 4 applies to version 3, and nothing is held"):
        rebuilt(patches[1:])
    with pytest.raises(ValueError, match="to version 5 applies to version 4, and version 3 is held"):
        rebuilt([patches[0], patches[2]])
    with pytest.raises(ValueError, match="to version 3 applies to nothing, and version 4 is held"):
        rebuilt([*patches[:2], patches[0]])


def test_a_chain_that_loses_a_tensor_is_refused_by_its_name() -> None:
    versions = chain()
    patch = diff(*versions[:2])
    without = {name: tensor for name, tensor in patch.tensors.items() if name not in ("norm", "unused")}
    with pytest.raises(ValueError, match=r"^norm, unused would be gone"):
        rebuilt([diff(None, versions[0]), replace(patch, tensors=without)])


def test_a_chain_that_leads_elsewhere_is_refused_by_the_tensors_that_differ() -> None:
    versions = chain()[:2]
    patch = diff(*versions)
    other = version_of(3, {**versions[0].tensors, "norm": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"^norm, patched to version 4: entries 0 to 8 have checksum"):
        rebuilt([diff(None, other), patch])
    with pytest.raises(
        ValueError, match=r"embed, patched to version 4: .* shape \(30, 8\), and torch.bfloat16 of \(8, 30\)"
    ):
        rebuilt([diff(None, version_of(3, {**other.tensors, "embed": torch.ones(8, 30).bfloat16()})), patch])


def parts_of(base: WeightImage | None, target: WeightImage, num_ranks: int) -> list[WeightPatch]:
    """What each rank encodes: its even share of every tensor, if that has an entry; the first one those without."""
    of_ranks = []
    for rank in range(num_ranks):
        tensors = {}
        for name, tensor in target.tensors.items():
            start, stop = (tensor.numel() * r // num_ranks for r in (rank, rank + 1))
            if start < stop or (rank == 0 and not tensor.numel()):
                held = None if base is None else base.tensors[name].flatten()[start:stop]
                target_N = tensor.flatten()[start:stop]
                tensors[name] = encode_section(held, target_N, shape=tuple(tensor.shape), start=start)
        of_ranks.append(
            WeightPatch(version=target.version, base=None if base is None else base.version, tensors=tensors)
        )
    return of_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_what_the_ranks_encoded_joins_into_the_version(num_ranks: int) -> None:
    random = np.random.default_rng(0)
    versions = [version_of(7, weights())]
    for number in (8, 9):
        versions.append(version_of(number, stepped(versions[-1].tensors, 0.05, random)))
    patches = []
    for base, target in zip([None, *versions[:-1]], versions, strict=True):
        parts = parts_of(base, target, num_ranks)
        patch = from_bytes(to_bytes(joined_patch(parts)))
        assert same(patched(base, patch), target)
        assert patch.num_bytes == sum(part.num_bytes for part in parts)
        assert sum(part.full_bytes for part in parts) == patch.full_bytes == 30 * 8 * 2 + 8 * 4 + 2
        assert sum(part.num_values for part in parts) == patch.num_values == 30 * 8 + 8 + 1
        assert patch.num_changed == sum(part.num_changed for part in parts)
        patches.append(patch)
    assert len(patches[1].tensors["embed"].sections) == num_ranks
    assert same(rebuilt(patches), versions[-1])


def test_parts_of_different_versions_or_of_a_tensor_that_is_not_whole_do_not_join() -> None:
    versions = chain()
    first, second = parts_of(versions[2], versions[3], 2)
    for other in (replace(second, version=7), replace(second, base=None)):
        with pytest.raises(ValueError, match=r"parts are of different \(version, base\): .*\(6, 5\)"):
            joined_patch([first, other])
    with pytest.raises(ValueError, match=r"^embed, patched to version 6: its sections end at entry 120"):
        joined_patch([first])
    with pytest.raises(ValueError, match=r"^embed, patched to version 6: a section starts at entry 120"):
        joined_patch([first, second, second])


def test_any_flipped_bit_and_any_cut_is_found() -> None:
    before = version_of(7, weights())
    data = to_bytes(diff(before, version_of(8, stepped(before.tensors, 0.05, np.random.default_rng(0)))))
    from_bytes(data)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=f"patch of {len(data)} bytes is damaged or cut short"):
            from_bytes(bytes(flipped))
    for end in range(len(data)):
        with pytest.raises(ValueError, match=f"patch of {end} bytes is damaged or cut short"):
            from_bytes(data[:end])
    with pytest.raises(ValueError, match="damaged"):
        from_bytes(data + b"\x00")


def test_whole_bytes_that_are_no_patch_are_named_so() -> None:
    body = b"something else entirely"
    with pytest.raises(ValueError, match=r"no weight patch: it begins with b'somethin'"):
        from_bytes(body + xxhash.xxh3_128(body).digest())


def test_over_a_channel_that_loses_repeats_reorders_cuts_and_flips_a_receiver_is_right_or_asks() -> None:
    """1,000 versions. After every message the receiver holds some published version in every byte, under its name."""
    random = np.random.default_rng(0)
    published = [version_of(0, weights())]
    held = published[0]
    late: list[bytes] = []
    asked, outcomes = False, Counter[str]()
    for number in range(1, 1001):
        density = random.choice([0.0, 0.001, 0.02, 0.3, 1.0])
        published.append(version_of(number, stepped(published[-1].tensors, density, random)))
        data = to_bytes(diff(None if asked else published[-2], published[-1]))
        fault = str(
            random.choice(["none", "dropped", "repeated", "held back", "cut", "flipped"], p=[0.75] + [0.05] * 5)
        )
        messages = {
            "none": [data],
            "dropped": [],
            "repeated": [data, data],
            "held back": [],
            "cut": [data[: random.integers(len(data))]],
            "flipped": [flip(data, random)],
        }[fault]
        if fault == "held back":
            late.append(data)
        elif late and random.random() < 0.5:
            messages = [*messages, late.pop()]
            outcomes["reordered"] += 1
        outcomes[fault] += 1
        for message in messages:
            try:
                patch = from_bytes(message)
                held = patched(held, patch)
            except ValueError:
                asked = True
                outcomes["refused"] += 1
            else:
                outcomes["delta" if patch.base is not None else "complete"] += 1
                asked = False
            assert same(held, published[held.version])
    assert min(outcomes.values()) >= 20 and len(outcomes) == 10, outcomes
    assert outcomes["delta"] > 500, outcomes
    held = patched(held, from_bytes(to_bytes(diff(None, published[-1]))))
    assert same(held, published[1000])


def flip(data: bytes, random: np.random.Generator) -> bytes:
    flipped = bytearray(data)
    bit = int(random.integers(8 * len(data)))
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)
