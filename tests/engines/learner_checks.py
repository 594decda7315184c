"""What the tests of learners share: the kinds there are, the objectives, and how near is near enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from rlpost.core.critic import Critic
from rlpost.core.kto import KTO
from rlpost.core.objective import Objective, PolicyGradient, Supervised
from rlpost.core.preference import Preference
from rlpost.core.weights import checksum
from rlpost.engines.base import WeightSection
from tests.engines.learner_jobs import DEEPSPEED, FULL, PLAIN, PLAIN_LORA, Kind, Result

deepspeed_kinds = [pytest.param(kind, id=str(kind), marks=pytest.mark.engines) for kind in DEEPSPEED]
full_kinds = [pytest.param(PLAIN, id="plain"), *deepspeed_kinds[: len(FULL)]]
kinds = [*(pytest.param(kind, id=str(kind)) for kind in (PLAIN, PLAIN_LORA)), *deepspeed_kinds]


def tolerance_of(kind: Kind) -> float:
    """Largest relative error of a step's displacement against the float32 specification: the grain of float32 weights,
    and the rounding of a bfloat16 forward pass, which averages out less over the few numbers of an adapter. Another cut
    of the same step is 4 times as close."""
    if kind.dtype == torch.float32:
        return 2e-4
    return 0.04 if kind.lora is None else 0.1


def error(result: Result, expected: Result) -> float:
    """Relative error of the displacement."""
    return float((result.moved - expected.moved).norm() / expected.moved.norm())


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CRITIC_LR = 0.03
"""So large that the head, zero at first, lets a gradient through to the backbone in the second step."""
CRITIC_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.12}
"""As above, of the critic: in bfloat16 its gradient is coarser, because errors of both signs cancel in it."""
OBJECTIVES: dict[str, Objective] = {
    "around-the-sampler": PolicyGradient(),
    "around-the-learner": PolicyGradient(proximal="learner", weight_high=1.1, aggregation="sequence_mean"),
    "masked-weights": PolicyGradient(proximal="learner", weight_form="masked", weight_low=0.8, weight_high=1.3),
    "gspo": PolicyGradient(ratio_level="sequence", aggregation="sequence_mean", clip_low=1e-3, clip_high=0.5),
    "cispo-without-truncated": PolicyGradient(clip="cispo", clip_low=1.0, clip_high=0.3, truncated="mask"),
    "with-kl": PolicyGradient(kl_coef=0.5),
    "with-kl-in-the-reward": PolicyGradient(kl_coef=0.5, kl_place="reward", kl_estimator="k1"),
    "ppo": PolicyGradient(advantage=Critic(lr=CRITIC_LR, gae_lambda=0.9, gae_gamma=0.95), truncated="bootstrap"),
    "supervised": Supervised(),
    "dpo": Preference(beta=0.5, nll_coef=0.2),
    "simpo": Preference(loss="simpo", beta=2.0, gamma=0.3),
    "kto": KTO(beta=0.5, undesirable_weight=2.0),
}


def check_served(ranks: Sequence[Result]) -> None:
    """In every version the sections of all ranks are its weights in every byte, whenever they were read."""
    for number, versions in enumerate(zip(*(rank.served for rank in ranks), strict=True)):
        weights = versions[0].weights
        assert not number or not same(weights, ranks[0].served[number - 1].weights)
        found = assembled([section for version in versions for section in version.readings[0]])
        assert {n: checksum(t) for n, t in found.items()} == {n: checksum(t) for n, t in weights.items()}
        for version in versions:
            first, *later = ([(s.name, s.start, checksum(s.values_N)) for s in r] for r in version.readings)
            assert [name for name, _, _ in first] == list(weights)
            assert all(reading == first for reading in later)


def assembled(sections: Sequence[WeightSection]) -> dict[str, Tensor]:
    """The weights they are sections of, each entry from exactly one."""
    parts: dict[str, list[WeightSection]] = {}
    for section in sorted(sections, key=lambda section: section.start):
        parts.setdefault(section.name, []).append(section)
    weights = {}
    for name, of_weight in parts.items():
        assert len({section.shape for section in of_weight}) == 1
        ends = accumulate((len(section.values_N) for section in of_weight), initial=0)
        assert [*(section.start for section in of_weight), math.prod(of_weight[0].shape)] == list(ends), name
        weights[name] = torch.cat([section.values_N for section in of_weight]).view(of_weight[0].shape)
    return weights


def check_critic(result: Result, expected: Result, tolerance: float) -> None:
    """Head and backbone both moved, and each as it should."""
    for part in ("head.", "backbone."):
        ours, theirs = (
            replace(r.of_critic(), masters={n: p for n, p in r.critic.items() if n.startswith(part)})
            for r in (result, expected)
        )
        assert theirs.moved.norm() > 1e-3
        assert error(ours, theirs) < tolerance, part
    assert result.of_critic().norms == pytest.approx(expected.of_critic().norms, rel=tolerance)
