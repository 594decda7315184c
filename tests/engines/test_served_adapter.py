"""An adapter published beside its base: what travels, what real vLLM computes with, and what a stage's merge does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlpost.archive import VERSIONS, VersionArchive, checkout
from rlpost.config import MAX_SERVED_RANK
from rlpost.core.patch import UpdateRefused, WeightPatch, from_bytes, to_bytes
from rlpost.core.weights import bits, is_of_adapter, merged
from rlpost.engines.base import RolloutRequest
from rlpost.engines.lora_layers import LoraSpec
from rlpost.engines.plain_learner import PlainLearner
from rlpost.engines.plain_sampler import PlainSampler
from rlpost.engines.pretrained import StoredTensors, save_pretrained
from rlpost.engines.vllm_sampler import VllmSampler, environment
from rlpost.types import Rollout
from rlpost.workers.publisher import Publisher
from tests.engines.in_child import SamplerInChild
from tests.engines.learner_jobs import SPEC

LORA = LoraSpec(rank=4, alpha=8.0)
SCALE = 2.0
EXACT = 1e-5
"""As in the samplers' contract: largest log-prob difference between two float32 implementations."""
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def build(model_path: Path, lora: LoraSpec) -> VllmSampler:
    return VllmSampler(
        model_path, dtype="float32", max_model_len=256, max_num_seqs=16, kv_cache_bytes=16 << 20, lora=lora
    )


def receive(sampler: Any, data: bytes) -> None:
    sampler.update(from_bytes(data))


def stacked(sampler: VllmSampler) -> dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """vLLM's own buffers of A and B, slice by slice, by the name of its fused layer."""

    def copies(model: Any) -> dict[str, Any]:
        layers = model.lora_manager.modules.items()
        return {n: tuple([t[0, 0].clone() for t in s] for s in (m.lora_a_stacked, m.lora_b_stacked)) for n, m in layers}

    (found,) = sampler._engine.apply_model(copies)
    return found


def base_weights(sampler: VllmSampler) -> dict[str, Tensor]:
    """vLLM's parameters, with fused ones as they are."""
    (named,) = sampler._engine.apply_model(lambda model: {n: p.data.clone() for n, p in model.named_parameters()})
    return {name.replace(".base_layer.", "."): tensor for name, tensor in named.items()}


def spoil(sampler: VllmSampler, column: int) -> None:
    """One bit of the place for v_proj's B in the first layer."""

    def flip(model: Any) -> None:
        layer = model.lora_manager.modules["model.layers.0.self_attn.qkv_proj"]
        bits(layer.lora_b_stacked[2])[0, 0, 0, column] ^= 1

    sampler._engine.apply_model(flip)


def largest_rank(_: VllmSampler) -> int:
    from vllm.config.lora import MaxLoRARanks

    return max(get_args(MaxLoRARanks))


@pytest.fixture(scope="module")
def sampler(served_model: Path) -> Iterator[SamplerInChild]:
    child = SamplerInChild(build, served_model, LORA, env=environment("cpu"))
    yield child
    child.close()


@dataclass
class Trainer:
    """A learner that learns from what a sampler with requests in flight draws, and publishes every step."""

    model_path: Path
    sampler: Any
    learner: PlainLearner = field(init=False)
    publisher: Publisher = field(default_factory=Publisher)
    of_merged: Publisher = field(default_factory=Publisher)
    """What the same versions would cost merged."""
    patches: list[WeightPatch] = field(default_factory=list)
    merged_bytes: list[int] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    version: int = 0
    num_requests: int = 0

    def __post_init__(self) -> None:
        self.learner = PlainLearner(self.model_path, lora=LORA, serve_adapter=True)
        self.learner.begin_stage(replace(SPEC, adapter_seed=1))

    def publish(self) -> None:
        data = to_bytes(self.publisher.publish(self.version, self.learner.sections()))
        self.patches.append(from_bytes(data))
        with merging(self.learner):
            self.merged_bytes.append(self.of_merged.publish(self.version, self.learner.sections()).num_bytes)
        if isinstance(self.sampler, SamplerInChild):
            self.sampler.call(receive, data)
        else:
            receive(self.sampler, data)

    def step(self, *, lr: float = 0.1) -> None:
        """Sample until something has finished and something is in flight; learn; publish."""
        finished: list[Rollout] = []
        while not finished or not self.sampler.has_work():
            for _ in range(4 if not self.sampler.has_work() else 1):
                self.sampler.add(ask(str(self.num_requests), 130 + self.num_requests % 9, seed=self.num_requests))
                self.num_requests += 1
            finished += [rollout for _, rollout in self.sampler.step()]
        self.rollouts += finished
        advantages = [1.0 if int(r.token_ids.sum()) % 2 else -1.0 for r in finished]
        self.learner.accumulate(finished, advantages, learner_version=self.version, max_staleness=None)
        self.learner.step(denominator=float(len(finished)), lr=lr)
        self.version += 1
        self.publish()

    def drain(self) -> None:
        while self.sampler.has_work():
            self.sampler.step()


@contextmanager
def merging(learner: PlainLearner) -> Iterator[None]:
    learner._serve_adapter = False
    yield
    learner._serve_adapter = True


def ask(name: str, last: int, *, seed: int, temperature: float = 1.0, max_tokens: int = 12) -> RolloutRequest:
    return RolloutRequest(
        id=name, prompt_ids=(*range(50, 90), last), seed=seed, temperature=temperature, max_tokens=max_tokens
    )


def adapters_of(learner: PlainLearner) -> dict[str, tuple[Tensor, Tensor]]:
    """A and s B by the layer's name, from what peft would be given."""
    exported = learner.adapter()
    assert exported is not None
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in exported.tensors.items()}
    layers = {name.partition(".lora_")[0] for name in named}
    return {n: (named[f"{n}.lora_A.weight"], SCALE * named[f"{n}.lora_B.weight"]) for n in layers}


def check_holds(sampler: SamplerInChild, learner: PlainLearner, base: Mapping[str, Tensor]) -> None:
    """Every buffer and every parameter inside vLLM, in every bit, without the map that wrote them."""
    adapters, num_slices = adapters_of(learner), 0
    for name, (a_stacked, b_stacked) in sampler.call(stacked).items():
        layer, _, last = name.rpartition(".")
        parts = FUSED.get(last, (last,))
        for part, a_held, b_held in zip(parts, a_stacked, b_stacked, strict=True):
            A, sB = adapters[f"{layer}.{part}"]
            expected_a, expected_b = torch.zeros(a_held.shape), torch.zeros(b_held.shape)
            expected_a[:4], expected_b[:, :4] = A, sB
            assert torch.equal(bits(a_held), bits(expected_a)) and torch.equal(bits(b_held), bits(expected_b)), name
            num_slices += 1
    assert num_slices == len(adapters) == 14
    for name, held in sampler.call(base_weights).items():
        fused = next((key for key in FUSED if key in name), None)
        parts = [name.replace(fused, part) for part in FUSED[fused]] if fused else [name]
        expected = torch.cat([base[part] for part in parts])
        assert torch.equal(bits(held[: len(expected)]), bits(expected)), name


def check_answers(sampler: Any, reference: Any) -> None:
    """Greedy responses are those of a transformers model, and so are their log-probs."""
    for index in range(6):
        sampler.add(ask(f"greedy-{index}", 140 + index, seed=0, temperature=0.0, max_tokens=24))
    done: dict[str, Rollout] = {}
    while sampler.has_work():
        done.update(sampler.step())
    for rollout in done.values():
        with torch.no_grad():
            table = torch.log_softmax(reference(rollout.token_ids[None]).logits[0, :-1], -1)
        mask = rollout.loss_mask[1:]
        assert torch.equal(table.argmax(-1)[mask], rollout.token_ids[1:][mask])
        best = table.max(-1).values[mask]
        torch.testing.assert_close(rollout.sampler_logprobs[1:][mask], best, atol=EXACT, rtol=0)
        assert rollout.spans[-1].version == sampler.version


def peft_model(base: Path, learner: PlainLearner, directory: Path) -> Any:
    """The policy as peft and transformers have it, from an export of the adapter: W x + s B (A x)."""
    save_pretrained(learner.weights(), base, directory, learner.adapter())
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(policy, directory / "adapter").eval()


@pytest.mark.engines
def test_after_many_versions_and_a_merge_vllm_computes_what_peft_does(
    sampler: SamplerInChild, served_model: Path, tmp_path: Path
) -> None:
    """Eight versions with requests in flight, a second stage on the merged base, and eight more."""
    trainer = Trainer(served_model, sampler)
    stored = {n: t.float() for n, t in tensors_of(served_model).items()}
    trainer.publish()
    for _ in range(8):
        trainer.step()
    trainer.drain()
    assert sum(len(rollout.spans) > 1 for rollout in trainer.rollouts) >= 8
    check_holds(sampler, trainer.learner, stored)
    policy = peft_model(served_model, trainer.learner, tmp_path / "first")
    check_answers(sampler, policy)
    with pytest.raises(AssertionError), policy.disable_adapter():
        check_answers(sampler, policy)

    trainer.learner.begin_stage(replace(SPEC, adapter_seed=2))
    for _ in range(8):
        trainer.step()
    trainer.drain()
    check_holds(sampler, trainer.learner, tensors_of(tmp_path / "first"))
    check_answers(sampler, peft_model(tmp_path / "first", trainer.learner, tmp_path / "second"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    stored = StoredTensors(path)
    return {name: stored.tensor(name) for name in stored.names}


@pytest.mark.engines
@pytest.mark.parametrize(
    ("column", "lr", "named"),
    [
        (3, 0.0, "layers.0.self_attn.v_proj.lora_B.weight: entries 0 to 256"),
        (4, 0.1, "layers.0.self_attn.qkv_proj: 1 of 256 values of its padding are not 0"),
    ],
)
def test_a_spoilt_adapter_is_noticed_at_the_next_version_and_mended_by_a_complete_one(
    sampler: SamplerInChild, served_model: Path, column: int, lr: float, named: str
) -> None:
    """A version that changes nothing there; and one that changes all of an adapter of rank 4 in a place for rank 8."""
    trainer = Trainer(served_model, sampler)
    trainer.publish()
    trainer.step()
    sampler.call(spoil, column)
    version = sampler.version
    with pytest.raises(UpdateRefused, match=named):
        trainer.step(lr=lr)
    assert (sampler.version, sampler.held) == (version, None)
    sampler.call(receive, to_bytes(trainer.publisher.complete()))
    assert sampler.held == version + 1
    trainer.drain()
    check_holds(sampler, trainer.learner, {n: t.float() for n, t in tensors_of(served_model).items()})


@pytest.mark.engines
def test_the_largest_rank_a_recipe_may_serve_is_vllms(sampler: SamplerInChild) -> None:
    assert sampler.call(largest_rank) == MAX_SERVED_RANK


# -- what a version costs, and what becomes of it ----------------------------------------------------------------------


@pytest.fixture
def trainer(served_model: Path) -> Trainer:
    trainer = Trainer(served_model, PlainSampler(served_model, lora=LORA))
    trainer.publish()
    for _ in range(3):
        trainer.step()
    return trainer


def num_bytes(patch: WeightPatch, condition: Callable[[str], bool]) -> int:
    return sum(tensor.num_bytes for name, tensor in patch.tensors.items() if condition(name))


def test_a_version_is_the_adapters_changes_until_a_stage_merges_it(trainer: Trainer) -> None:
    """The adapter has 10,240 of the model's 120,000 numbers."""
    for patch, cost in zip(trainer.patches[1:], trainer.merged_bytes[1:], strict=True):
        assert num_bytes(patch, lambda name: not is_of_adapter(name)) == 0
        assert 0 < patch.num_bytes <= 10_240 * 4 and patch.num_bytes < cost / 5
    trainer.learner.begin_stage(replace(SPEC, adapter_seed=2))
    for _ in range(2):
        trainer.step()
    merge, after = trainer.patches[-2:]
    adapted = {f"{name}.weight" for name in adapters_of(trainer.learner)}
    assert {n for n, t in merge.tensors.items() if t.num_changed and not is_of_adapter(n)} == adapted
    assert num_bytes(after, lambda name: not is_of_adapter(name)) == 0 < after.num_bytes


def test_the_plain_sampler_answers_as_peft_does(trainer: Trainer, served_model: Path, tmp_path: Path) -> None:
    trainer.drain()
    policy = peft_model(served_model, trainer.learner, tmp_path / "export")
    check_answers(trainer.sampler, policy)
    with pytest.raises(AssertionError), policy.disable_adapter():
        check_answers(trainer.sampler, policy)


def test_any_version_is_checked_out_as_the_plain_model_it_is(
    trainer: Trainer, served_model: Path, tmp_path: Path
) -> None:
    """In float32 and at a scale of 2, which rounds nothing: what the learner itself merges, in every bit."""
    expected = [dict(trainer.learner.weights())]
    trainer.learner.begin_stage(replace(SPEC, adapter_seed=2))
    trainer.step()
    expected.append(dict(trainer.learner.weights()))
    archive = VersionArchive(tmp_path / VERSIONS)
    for patch in trainer.patches:
        archive.append(patch)
    (tmp_path / "events.jsonl").write_text(f'{{"event": "ready", "model": "{served_model}"}}\n')
    for version, weights in zip((3, 4), expected, strict=True):
        checkout(tmp_path, version, tmp_path / f"v{version}")
        found = tensors_of(tmp_path / f"v{version}")
        assert found.keys() == weights.keys()
        assert all(torch.equal(bits(found[name]), bits(weights[name])) for name in found)
        AutoModelForCausalLM.from_pretrained(tmp_path / f"v{version}")
    plain = merged(archive.rebuild(2).tensors)
    assert not torch.equal(plain["model.layers.0.mlp.up_proj.weight"], expected[0]["model.layers.0.mlp.up_proj.weight"])
