"""A learner's versions inside real vLLM, over many swaps with requests in flight: nothing drifts, nothing is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlpost.core.objective import PolicyGradient, StageSpec
from rlpost.core.optimizers import AdamW
from rlpost.core.patch import from_bytes, to_bytes
from rlpost.core.weights import bits
from rlpost.engines.base import RolloutRequest
from rlpost.engines.plain_learner import PlainLearner
from rlpost.engines.pretrained import save_pretrained
from rlpost.engines.vllm_sampler import VllmSampler, environment
from rlpost.types import Rollout
from rlpost.workers.publisher import Publisher
from tests.engines.in_child import SamplerInChild

pytestmark = pytest.mark.engines

NUM_VERSIONS = 50
PROMPT = tuple(range(50, 130))
"""Longer than two cache blocks, so that the requests share a cached prefix."""


def build(model_path: Path) -> VllmSampler:
    return VllmSampler(model_path, dtype="float32", max_model_len=256, max_num_seqs=16, kv_cache_bytes=16 << 20)


def receive(sampler: VllmSampler, data: bytes) -> None:
    sampler.update(from_bytes(data))


def parameters(sampler: VllmSampler) -> dict[str, Tensor]:
    (named,) = sampler._engine.apply_model(lambda model: {n: p.data.clone() for n, p in model.named_parameters()})
    return named


@pytest.fixture
def sampler(served_model: Path) -> Iterator[SamplerInChild]:
    child = SamplerInChild(build, served_model, env=environment("cpu"))
    yield child
    child.close()


def train(sampler: SamplerInChild, model_path: Path, *, lr: float) -> tuple[PlainLearner, int, list[Rollout]]:
    """Publish versions 0 to NUM_VERSIONS, each with requests in flight that go on; the learner, all bytes, all rollouts."""
    learner, publisher = PlainLearner(model_path), Publisher()
    spec = StageSpec(objective=PolicyGradient(), optimizer=AdamW(), num_threads=1)
    learner.begin_stage(spec)
    num_bytes, num_requests, rollouts = 0, 0, []
    for version in range(NUM_VERSIONS + 1):
        patch = publisher.publish(version, learner.sections())
        num_bytes += patch.num_bytes if version else 0
        assert sampler.has_work() == (version > 0)
        sampler.call(receive, to_bytes(patch))
        finished: list[Rollout] = []
        while not finished or not sampler.has_work():
            for _ in range(4 if not sampler.has_work() else 1):
                request = RolloutRequest(
                    id=str(num_requests), prompt_ids=(*PROMPT, 130 + num_requests % 9), seed=num_requests,
                    temperature=1.0, max_tokens=12,
                )  # fmt: skip
                num_requests += 1
                sampler.add(request)
            finished += [rollout for _, rollout in sampler.step()]
        rollouts += finished
        advantages = [1.0 if int(r.token_ids.sum()) % 2 else -1.0 for r in finished]
        learner.accumulate(finished, advantages, learner_version=version, max_staleness=None)
        if version < NUM_VERSIONS:
            learner.step(denominator=float(len(finished)), lr=lr)
    while sampler.has_work():
        sampler.step()
    return learner, num_bytes, rollouts


def greedy(sampler: SamplerInChild) -> list[Rollout]:
    for index in range(6):
        request = RolloutRequest(
            id=f"greedy-{index}", prompt_ids=(*PROMPT[index:], 140), seed=0, temperature=0.0, max_tokens=30
        )
        sampler.add(request)
    done: dict[str, Rollout] = {}
    while sampler.has_work():
        done.update(sampler.step())
    return [done[f"greedy-{index}"] for index in range(6)]


def test_after_fifty_versions_vllm_is_what_a_fresh_engine_would_be(
    sampler: SamplerInChild, served_model: Path, tmp_path: Path
) -> None:
    """Its parameters are read without the map that wrote them: fused ones are concatenated here."""
    learner, _, rollouts = train(sampler, served_model, lr=3e-4)
    assert sum(len(rollout.spans) > 1 for rollout in rollouts) > NUM_VERSIONS
    weights: dict[str, Any] = dict(learner.weights())
    for name, held in sampler.call(parameters).items():
        parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        fused = next((key for key in parts if key in name), None)
        expected = torch.cat([weights[name.replace(fused, part)] for part in parts[fused]]) if fused else weights[name]
        assert torch.equal(bits(held[: len(expected)]), bits(expected)), name
        assert not held[len(expected) :].any(), "padding of the vocabulary"
    save_pretrained(learner.weights(), served_model, tmp_path / "export")
    fresh = SamplerInChild(build, tmp_path / "export", env=environment("cpu"))
    try:
        for kept, new in zip(greedy(sampler), greedy(fresh), strict=True):
            assert torch.equal(kept.token_ids, new.token_ids)
            torch.testing.assert_close(kept.sampler_logprobs, new.sampler_logprobs, atol=1e-6, rtol=0)
    finally:
        fresh.close()


def test_fifty_versions_at_a_learning_rate_of_zero_send_nothing_and_change_nothing(
    sampler: SamplerInChild, served_model: Path
) -> None:
    before = greedy(sampler)
    _, num_bytes, _ = train(sampler, served_model, lr=0.0)
    assert num_bytes == 0
    for old, new in zip(before, greedy(sampler), strict=True):
        assert torch.equal(old.token_ids, new.token_ids) and torch.equal(old.sampler_logprobs, new.sampler_logprobs)
