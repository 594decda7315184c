"""The temperature that holds an entropy: one step by hand, and on a policy that sharpens while groups are under way."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from rlpost.core.temperature import Draws, EntropyTarget
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


def test_what_is_drawn_is_measured_over_its_tokens() -> None:
    """(0.5 + 0.1 + 1.0) nats on 2 + 1 + 1 tokens, three of them at 1 and one at 1/16: (1/16)^(1/4) = 1/2."""
    draws = Draws.of([group(1.0, (2, 0.5), (1, 0.1)), group(1 / 16, (1, 1.0))])
    assert (draws.entropy, draws.temperature) == (pytest.approx(0.4), pytest.approx(0.5))
    assert Draws.of([group(0.6, (3, 0.1)), group(0.6, (7, 0.2))]).temperature == 0.6


@pytest.mark.parametrize(
    ("temperature", "drawn_at", "entropy", "expected"),
    [
        (1.0, 1.0, 0.3, 1.0),
        (1.0, 1.0, 0.2, math.exp(0.5 / 3)),  # a third too little, and half of that is made up for
        (1.0, 1.0, 0.4, math.exp(-0.5 / 4)),
        (1.0, 1.0, 0.0, math.exp(0.5)),  # the most it can move
        (1.2, 1.0, 0.25, 1.2),  # 1/6 too little, and a fifth is under way: ln 1.2 is a little more than 1/6
        (1.2, 1.0, 0.3, 1.2**0.5),  # right before what is under way, of which half is taken back
        (1.9, 1.9, 0.2, 2.0),
        (0.5, 0.5, 9.0, 0.5),
    ],
)
def test_a_step_of_the_temperature_by_hand(
    temperature: float, drawn_at: float, entropy: float, expected: float
) -> None:
    adjusted = TARGET.adjusted(temperature, Draws(entropy=entropy, temperature=drawn_at))
    assert adjusted == pytest.approx(expected, rel=0.01 if (temperature, entropy) == (1.2, 0.25) else 1e-12)


def test_a_bound_is_left_in_the_first_step_that_asks_for_it() -> None:
    temperature = 1.9
    for _ in range(50):
        temperature = TARGET.adjusted(temperature, Draws(entropy=0.01, temperature=temperature))
    assert temperature == 2.0
    assert TARGET.adjusted(temperature, Draws(entropy=0.4, temperature=2.0)) == pytest.approx(2.0 * math.exp(-0.125))


@pytest.mark.parametrize("delay", [0, 3, 9])
def test_the_entropy_of_a_policy_that_sharpens_is_held_without_swinging(delay: int) -> None:
    """64 tokens of 8 choices whose logits grow by a third in 200 steps; what a step learns from was drawn `delay` steps ago.

    At temperature 1 the entropy goes from 0.42 to 0.32. The temperature must rise all the way to 1.66: one that forgets what
    is under way rises too far at a delay of 3 and comes back, and swings ever further at 9.
    """
    logits = 6.0 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def entropy_at(step: int, temperature: float) -> float:
        sharpened = logits * (1 + step / 600) / temperature
        return float(torch.distributions.Categorical(logits=sharpened).entropy().mean())

    target = EntropyTarget(entropy=0.525, min=0.2, max=4.0, gain=0.2)
    temperatures, entropies = [1.0], []
    for step in range(200):
        drawn_at = temperatures[max(step - delay, 0)]
        entropies.append(entropy_at(step, drawn_at))
        temperatures.append(target.adjusted(temperatures[-1], Draws(entropy=entropies[-1], temperature=drawn_at)))
    assert (entropies[0], entropy_at(199, 1.0)) == (pytest.approx(0.42, abs=0.005), pytest.approx(0.32, abs=0.005))
    assert all(0.95 < entropy / target.entropy < 1.001 for entropy in entropies[60:])
    assert all(after >= before for before, after in pairwise(temperatures))
