"""The temperature that holds an entropy: one step by hand, and on a policy that sharpens while groups are under way."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from rlpost.core.temperature import EntropyTarget, sampled_entropy
from rlpost.types import GroupSummary

TARGET = EntropyTarget(entropy=0.3, min=0.5, max=2.0, gain=0.5)


def group(temperature: float, *rollouts: tuple[int, float]) -> GroupSummary:
    """Of rollouts of these (response tokens, nats)."""
    return GroupSummary(
        prompt_id="p",
        num_tokens_G=tuple(tokens for tokens, _ in rollouts),
        num_prompt_tokens=1,
        finish_reasons_G=("stop",) * len(rollouts),
        temperature=temperature,
        surprisals_G=tuple(nats for _, nats in rollouts),
        oldest_version=0,
        newest_version=0,
    )


def test_entropy_is_measured_over_tokens_and_not_over_rollouts_or_groups() -> None:
    """(0.5 + 0.1 + 1.0) nats on 2 + 1 + 1 tokens."""
    assert sampled_entropy([group(1.0, (2, 0.5), (1, 0.1)), group(1.0, (1, 1.0))]) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("temperature", "entropy", "expected"),
    [
        (1.2, 0.3, 1.2),
        (1.2, 0.2, 1.2 * math.exp(0.5 / 3)),  # a third too little, and half of that is made up for
        (1.2, 0.4, 1.2 * math.exp(-0.5 / 4)),
        (1.2, 0.0, 1.2 * math.exp(0.5)),  # the most it can move
        (1.9, 0.2, 2.0),
        (0.5, 9.0, 0.5),
    ],
)
def test_a_step_of_the_temperature_by_hand(temperature: float, entropy: float, expected: float) -> None:
    assert TARGET.adjusted(temperature, [group(temperature, (1, entropy))]) == pytest.approx(expected)


def test_groups_drawn_before_the_last_change_change_nothing() -> None:
    assert TARGET.adjusted(1.2, [group(1.2, (1, 0.1)), group(1.1, (1, 0.1))]) == 1.2


def test_a_bound_is_left_in_the_first_step_that_asks_for_it() -> None:
    temperature = 1.9
    for _ in range(50):
        temperature = TARGET.adjusted(temperature, [group(temperature, (1, 0.01))])
    assert temperature == 2.0
    assert TARGET.adjusted(2.0, [group(2.0, (1, 0.4))]) == pytest.approx(2.0 * math.exp(-0.125))


@pytest.mark.parametrize("delay", [0, 2, 9])
@pytest.mark.parametrize("steepness", [1, 7])
def test_the_entropy_of_a_policy_that_sharpens_is_held_without_swinging(delay: int, steepness: int) -> None:
    """64 tokens of 8 choices whose logits grow by a tenth in 200 steps; what a step learns from was drawn `delay` steps ago.

    The temperature must rise all the way. One that does not wait for what is under way rises too far at a delay of 9 and
    comes back; and at any, where entropy grows 7 times as fast as the temperature, as a small sharp policy's does.
    """
    logits = 6.0 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def entropy_at(step: int, temperature: float) -> float:
        sharpened = logits * (1 + step / 2000) / temperature**steepness
        return float(torch.distributions.Categorical(logits=sharpened).entropy().mean())

    target = EntropyTarget(entropy=1.25 * entropy_at(0, 1.0), min=0.5, max=2.0, gain=0.1)
    temperatures, entropies = [1.0], []
    for step in range(200):
        drawn_at = temperatures[max(step - delay, 0)]
        entropies.append(entropy_at(step, drawn_at))
        temperatures.append(target.adjusted(temperatures[-1], [group(drawn_at, (1, entropies[-1]))]))
    late = [entropy / target.entropy for entropy in entropies[150:]]
    assert min(late) > 0.9 and max(late) < 1.005 and entropy_at(199, 1.0) < 0.8 * target.entropy
    assert all(after >= before for before, after in pairwise(temperatures))
