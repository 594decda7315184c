"""What every `SamplerEngine` promises, held against the plain one and against vLLM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlpost.engines.vllm_sampler as vllm_sampler
from rlpost.core.delta import TensorPatch, encode
from rlpost.core.patch import UpdateRefused, WeightPatch
from rlpost.core.weights import bits
from rlpost.engines.base import RolloutRequest, SamplerEngine
from rlpost.engines.lora_layers import LoraSpec
from rlpost.engines.plain_sampler import PlainSampler
from rlpost.engines.weight_map import _served
from rlpost.types import Rollout, WeightImage
from tests.engines.conftest import END_IDS, Reference, make_update, random_weights, stepped
from tests.engines.in_child import SamplerInChild

ENGINES = ["plain", pytest.param("vllm", marks=pytest.mark.engines)]
WITH_ADAPTER = [pytest.param(f"{engine}-with-adapter", marks=pytest.mark.engines) for engine in ("plain", "vllm")]
ADAPTER = LoraSpec(rank=4, alpha=4.0, targets=("q_proj", "v_proj", "up_proj", "down_proj"))
"""Of what vLLM fuses, not all; and of a rank below the least it has room for."""
MAX_MODEL_LEN = 256
EXACT = 1e-5
"""Largest log-prob difference between two float32 implementations; another version's weights are off by more than 1."""


@dataclass
class Subject:
    """The engine under test, and the weights of every version it was given."""

    engine: SamplerEngine
    model_path: Path
    reference: Reference
    weights: dict[int, Mapping[str, Tensor]]
    adapter: LoraSpec | None = None

    def publish(self, seed: int, *, delta: bool = False, num_ranks: int = 1) -> int:
        """Give it the random weights of `seed` as its next version, whole or as what changed."""
        version = self.engine.version + 1
        self.weights[version] = self.random_weights(seed)
        base = self.image if delta else None
        self.engine.update(make_update(version, self.weights[version], base=base, num_ranks=num_ranks))
        return version

    def random_weights(self, seed: int) -> dict[str, Tensor]:
        return random_weights(self.model_path, seed, self.adapter)

    @property
    def image(self) -> WeightImage:
        """What it was given last."""
        return WeightImage(version=self.engine.version, tensors=self.weights[self.engine.version])

    def finish(self) -> dict[str, Rollout]:
        rollouts = {}
        while self.engine.has_work():
            rollouts.update(self.engine.step())
        return rollouts

    def sample(self, *requests: RolloutRequest) -> list[Rollout]:
        for request in requests:
            self.engine.add(request)
        rollouts = self.finish()
        return [rollouts[request.id] for request in requests]

    def lasting(self, *prompt: int, num_steps: int, temperature: float = 1.0) -> RolloutRequest:
        """A request that runs for more than `num_steps` under the present weights, whatever these are; engine idle."""
        for seed in range(100):
            request = ask(*prompt, seed=seed, temperature=temperature, max_tokens=num_steps)
            (rollout,) = self.sample(request)
            if rollout.finish_reason == "length":
                return replace(request, id=f"{request.id}-lasting", max_tokens=40)
        raise AssertionError(f"all of 100 responses end within {num_steps} tokens")

    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            assert not self.engine.step()

    def largest_error(
        self, rollout: Rollout, *, temperature: float, weights: Mapping[str, Tensor] | None = None
    ) -> float:
        """Against a recomputation with the weights each span names, or with `weights` throughout."""
        start_of_response = len(rollout.token_ids) - rollout.num_response_tokens
        errors = []
        for span in rollout.spans:
            expected = self.reference.logprobs(
                weights or self.weights[span.version], rollout.token_ids, temperature=temperature
            )
            tokens = slice(start_of_response + span.start, start_of_response + span.end)
            errors.append((rollout.sampler_logprobs[tokens] - expected[tokens]).abs().max())
        return float(max(errors))


def build_vllm(model_path: Path, adapter: LoraSpec | None) -> Any:
    return vllm_sampler.VllmSampler(
        model_path,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=128,
        kv_cache_bytes=16 << 20,
        lora=adapter,
    )


def _subject(kind: str, model_path: Path) -> Iterator[Subject]:
    adapter = ADAPTER if kind.endswith("-with-adapter") else None
    if kind.startswith("plain"):
        yield Subject(PlainSampler(model_path, lora=adapter), model_path, Reference(model_path), {}, adapter)
        return
    engine = SamplerInChild(build_vllm, model_path, adapter, env=vllm_sampler.environment("cpu"))
    try:
        yield Subject(engine, model_path, Reference(model_path), {}, adapter)
    finally:
        engine.close()


@pytest.fixture(scope="module", params=[*ENGINES, *WITH_ADAPTER])
def running_subject(request: pytest.FixtureRequest, served_model: Path) -> Iterator[Subject]:
    yield from _subject(request.param, served_model)


@pytest.fixture
def subject(running_subject: Subject) -> Subject:
    """An idle engine that holds the weights of seed 1."""
    running_subject.publish(1)
    running_subject.finish()  # what a failed test left behind
    return running_subject


_ids = count()


def ask(*prompt: int, seed: int = 0, temperature: float = 1.0, max_tokens: int = 40) -> RolloutRequest:
    return RolloutRequest(
        id=f"request-{next(_ids)}", prompt_ids=prompt, seed=seed, temperature=temperature, max_tokens=max_tokens
    )


@pytest.mark.parametrize(("delta", "num_ranks"), [(False, 1), (True, 1), (True, 3)])
def test_every_logprob_is_that_of_its_version_on_its_own_prefix(subject: Subject, delta: bool, num_ranks: int) -> None:
    """Six requests of different lengths, weights replaced by unrelated ones after 9 tokens and again after 8 more."""
    requests = [subject.lasting(*range(50, 53 + 5 * i), num_steps=9, temperature=0.7) for i in range(6)]
    for request in requests:
        subject.engine.add(request)
    subject.steps(9)
    subject.publish(2, delta=delta, num_ranks=num_ranks)
    done = dict(finished for _ in range(8) for finished in subject.engine.step())
    subject.publish(3, delta=delta, num_ranks=num_ranks)
    done |= subject.finish()
    assert max(len(rollout.spans) for rollout in done.values()) == 3
    for rollout in done.values():
        assert subject.largest_error(rollout, temperature=0.7) < EXACT
        assert [span.end - span.start for span in rollout.spans][:-1] == [9, 8][: len(rollout.spans) - 1]
        one_version = subject.weights[rollout.spans[-1].version]
        assert subject.largest_error(rollout, temperature=0.7, weights=one_version) > 1


def test_a_prompt_sampled_under_old_weights_is_read_again_under_new_ones(subject: Subject) -> None:
    """The prompt is longer than any cache block, so that vLLM would find it in its prefix cache."""
    prompt = tuple(range(50, 250))
    subject.sample(ask(*prompt, max_tokens=4))
    subject.publish(2)
    (rollout,) = subject.sample(ask(*prompt, max_tokens=4))
    assert subject.largest_error(rollout, temperature=1.0) < EXACT


def test_logprobs_are_those_of_the_distribution_after_temperature(subject: Subject) -> None:
    (rollout,) = subject.sample(subject.lasting(60, 61, 62, num_steps=8, temperature=0.5))
    assert subject.largest_error(rollout, temperature=0.5) < EXACT
    assert subject.largest_error(rollout, temperature=1.0) > 0.1


def test_temperature_zero_is_greedy_with_logprobs_at_temperature_one(subject: Subject) -> None:
    first, second = subject.sample(
        ask(60, 61, 62, seed=1, temperature=0.0, max_tokens=12), ask(60, 61, 62, seed=2, temperature=0.0, max_tokens=12)
    )
    assert torch.equal(first.token_ids, second.token_ids)
    assert subject.largest_error(first, temperature=1.0) < EXACT


def test_a_response_stops_at_its_first_end_token_or_at_its_limit(subject: Subject) -> None:
    requests = [ask(60 + i, seed=i, max_tokens=24) for i in range(24)]
    rollouts = subject.sample(*requests)
    for request, rollout in zip(requests, rollouts, strict=True):
        response = rollout.token_ids[len(request.prompt_ids) :].tolist()
        ends = [i for i, token in enumerate(response) if token in END_IDS]
        if rollout.finish_reason == "stop":
            assert ends == [len(response) - 1]
        else:
            assert rollout.finish_reason == "length" and len(response) == 24 and not ends
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


def test_mask_spans_and_text_cover_exactly_the_sampled_tokens(subject: Subject) -> None:
    requests = [ask(*range(60, 61 + i), seed=i, max_tokens=8 + i) for i in range(8)]
    for request, rollout in zip(requests, subject.sample(*requests), strict=True):
        num_prompt, num_response = len(request.prompt_ids), rollout.num_response_tokens
        assert rollout.token_ids[:num_prompt].tolist() == list(request.prompt_ids)
        assert rollout.loss_mask.tolist() == [False] * num_prompt + [True] * num_response
        assert (rollout.sampler_logprobs[:num_prompt] == 0).all() and (rollout.sampler_logprobs[num_prompt:] < 0).all()
        assert [(s.version, s.start, s.end) for s in rollout.spans] == [(subject.engine.version, 0, num_response)]
        assert "<|eos|>" not in rollout.text


def test_a_rollout_depends_on_its_seed(subject: Subject) -> None:
    seeds = (2**62 + 7, 2**62 + 7, 8, 9)
    first, again, *others = [subject.sample(ask(60, 61, 62, seed=seed))[0] for seed in seeds]
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(bits(first.sampler_logprobs), bits(again.sampler_logprobs))
    assert all(other.token_ids.tolist() != first.token_ids.tolist() for other in others)


def test_the_seed_outlives_a_swap_of_equal_weights(subject: Subject) -> None:
    """A swap drops what is cached; the request's random numbers go on where they were."""
    request = subject.lasting(60, 61, 62, num_steps=5)
    (undisturbed,) = subject.sample(request)
    subject.engine.add(request)
    subject.steps(5)
    subject.publish(1)
    (disturbed,) = subject.finish().values()
    assert len(disturbed.spans) == 2
    assert torch.equal(undisturbed.token_ids, disturbed.token_ids)


def test_many_seeded_prompts_may_arrive_at_once(subject: Subject) -> None:
    """100 x 24 prompt tokens are more than vLLM reads in a step; pieces of prompts crash its seeded CPU sampling."""
    rollouts = subject.sample(*(ask(*range(60, 84), seed=i, max_tokens=2) for i in range(100)))
    assert len({tuple(rollout.token_ids.tolist()) for rollout in rollouts}) > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 254}, "3 prompt tokens \\+ max_tokens 254 = 257"),
        ({"prompt_ids": ()}, "0 prompt tokens"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"temperature": 0.001}, "temperature 0.001"),
    ],
)
def test_a_request_that_would_be_sampled_otherwise_is_refused(
    subject: Subject, change: dict[str, Any], message: str
) -> None:
    if isinstance(subject.engine, PlainSampler) and change == {"max_tokens": 254}:
        change, message = {"max_tokens": 2046}, "3 prompt tokens \\+ max_tokens 2046 = 2049"
    with pytest.raises(ValueError, match=message):
        subject.engine.add(replace(ask(60, 61, 62), **change))
    assert not subject.engine.has_work()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_sparse_delta_gives_the_weights_of_a_complete_update(subject: Subject, num_ranks: int) -> None:
    """1% of the entries of every matrix; the same tokens, their log-probs equal in every bit."""
    request = ask(60, 61, 62, max_tokens=24)
    base, version = subject.image, subject.engine.version + 1
    subject.weights[version] = stepped(base.tensors, 0.01, seed=5)
    patch = make_update(version, subject.weights[version], base=base, num_ranks=num_ranks)
    assert 0.005 < patch.num_changed / patch.num_values < 0.015
    subject.engine.update(patch)
    (changed,) = subject.sample(request)
    assert subject.engine.held == version
    assert subject.largest_error(changed, temperature=1.0) < EXACT
    assert subject.largest_error(changed, temperature=1.0, weights=base.tensors) > 0.01
    subject.engine.update(make_update(version, subject.weights[version]))
    (complete,) = subject.sample(replace(request, id="again"))
    assert torch.equal(changed.token_ids, complete.token_ids)
    assert torch.equal(bits(changed.sampler_logprobs), bits(complete.sampler_logprobs))


def test_a_delta_of_another_version_is_refused_and_sampling_goes_on(subject: Subject) -> None:
    version, weights = subject.engine.version, subject.random_weights(2)
    subject.engine.add(subject.lasting(60, 61, 62, num_steps=5))
    subject.steps(5)
    elsewhere = replace(subject.image, version=version - 1)
    message = f"update {version + 1} applies to version {version - 1}, and version {version} is held"
    with pytest.raises(UpdateRefused, match=message):
        subject.engine.update(make_update(version + 1, weights, base=elsewhere))
    assert (subject.engine.version, subject.engine.held) == (version, version)
    (rollout,) = subject.finish().values()
    assert [(s.version, s.start) for s in rollout.spans] == [(version, 0)]
    assert subject.largest_error(rollout, temperature=1.0) < EXACT


Tensors = dict[str, TensorPatch]
NORM = "model.norm.weight"


def _state_another_result(tensors: Tensors) -> None:
    (section,) = tensors[NORM].sections
    tensors[NORM] = replace(tensors[NORM], sections=(replace(section, after="0" * 32),))


def _state_a_base(tensors: Tensors) -> None:
    (section,) = tensors[NORM].sections
    tensors[NORM] = replace(tensors[NORM], sections=(replace(section, before="0" * 32),))


def _flip_one_bit(tensors: Tensors) -> None:
    """The lowest one of the payload's last byte."""
    (piece,) = tensors[NORM].pieces
    payload = bytes(piece.payload)
    tensors[NORM] = replace(tensors[NORM], pieces=(replace(piece, payload=payload[:-1] + bytes([payload[-1] ^ 1])),))


def _cut_payload(tensors: Tensors) -> None:
    (piece,) = tensors[NORM].pieces
    tensors[NORM] = replace(tensors[NORM], pieces=(replace(piece, payload=piece.payload[:-1]),))


def _lose_section(tensors: Tensors) -> None:
    tensors[NORM] = replace(tensors[NORM], sections=())


def _lose_tensor(tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def _cut_tensor(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = encode(None, torch.ones(tensors["lm_head.weight"].shape[0], 1))


def _widen_tensor(tensors: Tensors) -> None:
    tensors[NORM] = encode(None, torch.ones(64, dtype=torch.float64))


def _add_tensor(tensors: Tensors) -> None:
    tensors["model.norm.bias"] = encode(None, torch.zeros(64))


BAD = [
    (_state_another_result, f"{NORM}: entries 0 to 64 have checksum"),
    (_flip_one_bit, NORM),
    (_cut_payload, NORM),
    (_lose_section, f"{NORM}: its sections end at entry 0"),
    (_lose_tensor, "model.layers.1.self_attn"),
    (_cut_tensor, "lm_head.weight"),
    (_widen_tensor, NORM),
    (_add_tensor, "model.norm.bias"),
]


@pytest.mark.parametrize(
    ("spoil", "named", "delta"),
    [
        *((spoil, named, delta) for spoil, named in BAD for delta in (False, True)),
        (_state_a_base, f"{NORM}: the update applies to no version, and is not all of it", False),
    ],
)
def test_a_bad_update_is_refused_and_sampling_waits_for_a_complete_one(
    subject: Subject, spoil: Callable[[Tensors], None], named: str, delta: bool
) -> None:
    version, base = subject.engine.version, subject.image
    subject.engine.add(subject.lasting(60, 61, 62, num_steps=5))
    subject.steps(5)
    good = make_update(version + 1, subject.random_weights(2), base=base if delta else None)
    tensors = dict(good.tensors)
    spoil(tensors)
    with pytest.raises(UpdateRefused, match=f"weight update {version + 1}: .*{named}"):
        subject.engine.update(replace(good, tensors=tensors))
    assert (subject.engine.version, subject.engine.held) == (version, None)
    with pytest.raises(RuntimeError, match=named):
        subject.engine.step()
    with pytest.raises(UpdateRefused, match="nothing proved is held"):
        subject.engine.update(make_update(version + 1, subject.random_weights(2), base=base))
    with pytest.raises(RuntimeError, match=named):
        subject.engine.step()
    assert subject.engine.has_work()
    assert subject.publish(2) == version + 1
    assert subject.engine.held == version + 1
    (rollout,) = subject.finish().values()
    assert [(s.version, s.start) for s in rollout.spans] == [(version, 0), (version + 1, 5)]
    assert subject.largest_error(rollout, temperature=1.0) < EXACT


def test_stats_count_the_requests(subject: Subject) -> None:
    for request in [subject.lasting(token, num_steps=1) for token in (60, 61)]:
        subject.engine.add(request)
    subject.steps(1)
    assert subject.engine.stats() == {"running": 2, "waiting": 0}  # pyright: ignore[reportAttributeAccessIssue]
    subject.finish()


@pytest.mark.parametrize("kind", ENGINES)
def test_what_a_sampler_starts_with_is_not_proved_and_a_tied_output_layer_follows_its_embedding(
    kind: str, tied_model: Path
) -> None:
    """Its first version must come whole, though it could be a delta of the model directory."""
    for subject in _subject(kind, tied_model):
        assert (subject.engine.version, subject.engine.held) == (0, None)
        weights = random_weights(tied_model, 1)
        with pytest.raises(UpdateRefused, match="update 1 applies to version 0, and nothing proved is held"):
            subject.engine.update(make_update(1, weights, base=WeightImage(version=0, tensors=weights)))
        subject.publish(1)
        assert (subject.engine.version, subject.engine.held) == (1, 1)
        assert "lm_head.weight" not in subject.weights[1]
        subject.engine.add(subject.lasting(60, 61, 62, num_steps=5))
        subject.steps(5)
        subject.publish(2)
        (rollout,) = subject.finish().values()
        assert len(rollout.spans) == 2
        assert subject.largest_error(rollout, temperature=1.0) < EXACT


def flip_bit(sampler: Any, parameter_name: str, index: int) -> None:
    """Make the sampler's model lose one bit."""

    def flip(model: Any) -> None:
        bits(dict(_served(model))[parameter_name].data).view(-1)[index] ^= 1

    flip(sampler._model) if isinstance(sampler, PlainSampler) else sampler._engine.apply_model(flip)


def flip_bit_before_proof(sampler: Any, parameter_name: str, index: int) -> None:
    """Make the next update of this vLLM sampler lose one bit between writing and proof."""
    weight_map = sampler._weight_map
    prove = weight_map.prove

    def prove_after_loss(patch: WeightPatch) -> None:
        weight_map.prove = prove
        flip_bit(sampler, parameter_name, index)
        prove(patch)

    weight_map.prove = prove_after_loss


@pytest.mark.parametrize("share", [0.0, 0.01])
@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight"])
def test_a_delta_is_refused_by_a_model_that_lost_one_bit_since(subject: Subject, name: str, share: float) -> None:
    """Whether the delta changes something elsewhere in the tensor, only in others, or nowhere."""
    version, base = subject.engine.version, subject.image
    if isinstance(subject.engine, SamplerInChild):
        subject.engine.call(flip_bit, name, 7)
    else:
        flip_bit(subject.engine, name, 7)
    with pytest.raises(UpdateRefused, match=f"{name}: entries 0 to"):
        subject.engine.update(make_update(version + 1, stepped(base.tensors, share, seed=5), base=base))
    assert (subject.engine.version, subject.engine.held) == (version, None)
    subject.publish(1)
    (rollout,) = subject.sample(ask(60, 61, 62))
    assert subject.largest_error(rollout, temperature=1.0) < EXACT


QKV, GATE_UP = "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"


@pytest.mark.engines
@pytest.mark.parametrize("running_subject", ["vllm"], indirect=True)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(
    ("parameter_name", "index", "named"),
    [
        (f"{QKV}.weight", 64 * 64 + 5, "model.layers.0.self_attn.k_proj.weight: entries 0"),
        (f"{GATE_UP}.weight", -1, "model.layers.1.mlp.up_proj.weight: entries 0"),
        ("model.embed_tokens.weight", -1, "model.embed_tokens.weight: 1 of"),
    ],
)
def test_vllm_refuses_an_update_that_lost_one_bit_inside_the_model(
    subject: Subject, parameter_name: str, index: int, named: str, delta: bool
) -> None:
    """k_proj starts after q_proj's 64 x 64 values in the fused qkv; the embedding's last rows pad the vocabulary."""
    check_a_lost_bit_is_refused(subject, parameter_name, index, named, delta=delta)


@pytest.mark.engines
@pytest.mark.parametrize("running_subject", ["vllm-with-adapter"], indirect=True)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(
    ("parameter_name", "index", "named"),
    [
        (f"{QKV}.base_layer.weight", 64 * 64 + 5, "model.layers.0.self_attn.k_proj.weight: entries 0"),
        (f"{QKV}.lora_a_stacked.2", 5, "model.layers.0.self_attn.v_proj.lora_A.weight: entries 0"),
        (f"{GATE_UP}.lora_b_stacked.1", 8, "model.layers.1.mlp.up_proj.lora_B.weight: entries 0"),
        (f"{QKV}.lora_a_stacked.0", -1, f"{QKV}: 1 of 256 values of its padding are not 0"),
        (f"{QKV}.lora_b_stacked.0", 4, f"{QKV}: 1 of 256 values of its padding are not 0"),
        (f"{QKV}.lora_b_stacked.1", 0, f"{QKV}: 1 of 512 values of its padding are not 0"),
    ],
)
def test_vllm_refuses_an_update_that_lost_one_bit_of_an_adapter_or_beside_it(
    subject: Subject, parameter_name: str, index: int, named: str, delta: bool
) -> None:
    """Rows and columns from the fifth on pad an adapter of rank 4 in a place for rank 8; k_proj has none."""
    check_a_lost_bit_is_refused(subject, parameter_name, index, named, delta=delta)


def check_a_lost_bit_is_refused(subject: Subject, parameter_name: str, index: int, named: str, *, delta: bool) -> None:
    assert isinstance(subject.engine, SamplerInChild)
    version = subject.engine.version
    subject.engine.call(flip_bit_before_proof, parameter_name, index)
    with pytest.raises(UpdateRefused, match=named):
        subject.publish(2, delta=delta)
    assert (subject.engine.version, subject.engine.held) == (version, None)
    subject.publish(2)


def test_importing_the_vllm_sampler_does_not_import_vllm() -> None:
    code = "import sys; from rlpost.engines import vllm_sampler; vllm_sampler.environment('cpu'); assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
