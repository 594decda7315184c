"""A rank publishes what changed since its last version, from one image, and any version whole when asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from rlpost.core.patch import joined_patch, patched
from rlpost.core.weights import bits
from rlpost.engines.base import WeightSection
from rlpost.types import WeightImage
from rlpost.workers.publisher import Publisher


def make_weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "wide": torch.randn(7, 9).bfloat16(),
        "narrow": torch.randn(5).bfloat16(),
        "scalar": torch.randn(()),
    }


def moved(weights: Mapping[str, Tensor], seed: int, density: float) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {n: torch.where(torch.rand(w.shape) < density, w * 1.5, w) for n, w in weights.items()}


def sections(weights: Mapping[str, Tensor], rank: int, num_ranks: int) -> Iterator[WeightSection]:
    for name, weight in weights.items():
        start, stop = (weight.numel() * r // num_ranks for r in (rank, rank + 1))
        if start < stop:
            yield WeightSection(name=name, shape=tuple(weight.shape), start=start, values_N=weight.view(-1)[start:stop])


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_the_ranks_publish_is_each_version_bit_for_bit(num_ranks: int) -> None:
    """The weights change in place, as a learner's do: what was published before must not change with them."""
    publishers = [Publisher() for _ in range(num_ranks)]
    live, held = make_weights(0), None
    for version in range(6):
        for name, weight in moved(live, version, density=0.1 * version).items():
            live[name].copy_(weight)
        parts = [p.publish(version, sections(live, rank, num_ranks)) for rank, p in enumerate(publishers)]
        patch = joined_patch(parts)
        assert (patch.version, patch.base) == (version, version - 1 if version else None)
        held = patched(held, patch)
        anew = patched(None, joined_patch([p.complete() for p in publishers]))
        for received in (held, anew):
            assert received.version == version
            assert all(torch.equal(bits(received.tensors[n]), bits(w)) for n, w in live.items())
        held = WeightImage(version=version, tensors={n: t.clone() for n, t in held.tensors.items()})


def test_nothing_moved_is_nothing_sent() -> None:
    publisher, weights = Publisher(), make_weights(0)
    publisher.publish(0, sections(weights, 0, 1))
    patch = publisher.publish(1, sections(weights, 0, 1))
    assert (patch.base, patch.num_bytes, patch.num_changed, patch.num_values) == (0, 0, 0, 69)


def test_without_changes_every_version_is_whole() -> None:
    publisher, weights = Publisher(changes=False), make_weights(0)
    for version in range(2):
        patch = publisher.publish(version, sections(weights, 0, 1))
        assert (patch.base, patch.num_bytes) == (None, patch.full_bytes) and patch.full_bytes == 2 * 68 + 4


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_policy_that_is_not_finite_is_not_published(value: float) -> None:
    publisher, weights = Publisher(), make_weights(0)
    publisher.publish(0, sections(weights, 0, 1))
    weights["narrow"][3] = value
    with pytest.raises(RuntimeError, match=r"version 1 has non-finite values in narrow.*lower lr"):
        publisher.publish(1, sections(weights, 0, 1))
