"""A sampling temperature that keeps the entropy of what is sampled at a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlpost.types import GroupSummary


def sampled_entropy(groups: Sequence[GroupSummary]) -> float:
    """Nats per token: the mean of -log-prob over all tokens of the groups, each under the distribution it was drawn from.

    It estimates the mean entropy of those distributions without a forward pass, so groups without signal count as well.
    """
    nats = math.fsum(nats for group in groups for nats in group.surprisals_G)
    return nats / sum(sum(group.num_tokens_G) for group in groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyTarget:
    """What a stage's temperature is moved for, after each step."""

    entropy: float
    """Nats per token, of what is sampled at that temperature."""
    min: float
    max: float
    """Bounds of the temperature."""
    gain: float
    """Relative change of the temperature and relative error of the entropy: in (0, 1]."""

    def adjusted(self, temperature: float, groups: Sequence[GroupSummary]) -> float:
        """The temperature T of the next groups, from that of the last ones and from a step's groups, of entropy H.

            log T <- log T + gain (target - H) / max(target, H)            within [log min, log max]

        Integral control of log T. Its state is T itself, so that at a bound nothing adds up behind it. A step changes nothing
        unless all its groups were drawn at T: those admitted before T was changed last do not know of it, and would have
        the same error corrected once for each step under way. So the loop has no delay, however many these are, and settles
        wherever log H grows less than 2 / gain times as fast as log T, evenly where less than half of that.
        """
        if any(group.temperature != temperature for group in groups):
            return temperature
        entropy = sampled_entropy(groups)
        error = (self.entropy - entropy) / max(self.entropy, entropy)
        return min(max(temperature * math.exp(self.gain * error), self.min), self.max)
