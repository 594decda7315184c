"""A sampling temperature that keeps the entropy of what is sampled at a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlpost.types import GroupSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How random the rollouts of a step were."""

    entropy: float
    """Nats per token: the mean of -log-prob over all their tokens, each under the distribution it was drawn from. It estimates
    the mean entropy of those distributions without a forward pass, so that groups without signal count as well."""
    temperature: float
    """At which they were drawn: the geometric mean over the tokens."""

    @classmethod
    def of(cls, groups: Sequence[GroupSummary]) -> Draws:
        tokens = [sum(group.num_tokens_G) for group in groups]
        nats = math.fsum(nats for group in groups for nats in group.surprisals_G)
        first = groups[0].temperature  # relative to it, so that the mean of equal temperatures is exactly theirs
        logs = [n * math.log(group.temperature / first) for n, group in zip(tokens, groups, strict=True)]
        return cls(entropy=nats / sum(tokens), temperature=first * math.exp(math.fsum(logs) / sum(tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyTarget:
    """What a stage's temperature is moved for, after each step."""

    entropy: float
    """Nats per token, of what is sampled at that temperature."""
    min: float
    max: float
    """Bounds of the temperature."""
    gain: float
    """Share of a step's relative error by which log T moves: in (0, 1]."""

    def adjusted(self, temperature: float, draws: Draws) -> float:
        """The next groups' temperature T, from the last one and from what a step's groups, drawn at T', came to.

            e     = (target - H) / max(target, H)                          in (-1, 1]
            log T <- log T + gain (e - (log T - log T'))                   within [log min, log max]

        Integral control of log T, whose state is T itself: at a bound nothing adds up behind it. The groups of a step were
        admitted up to `max_staleness` + 1 steps ago, and what has been changed since is not in their entropy: it is taken
        off the error, as if entropy grew in proportion to T (Smith's predictor, 1957). A plain integral would correct the
        same error once for each step under way; this oscillates at no delay where log entropy grows up to twice as fast as
        log T.
        """
        error = (self.entropy - draws.entropy) / max(self.entropy, draws.entropy)
        under_way = math.log(temperature / draws.temperature)
        return min(max(temperature * math.exp(self.gain * (error - under_way)), self.min), self.max)
