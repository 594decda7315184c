"""LoRA: what is served is base + s B A, the base stays as it was, and a stage begins where the last one ended.

Steps, cuts, ranks, resuming: `test_learner_*.py` hold learners with an adapter to the same promises as those without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlpost.core.objective import PolicyGradient
from rlpost.core.preference import Preference
from rlpost.engines.base import RolloutRequest
from rlpost.engines.forward import Scorer, load_policy
from rlpost.engines.lora import Weight, checkpoint_weights
from rlpost.engines.lora_layers import LoraSpec
from rlpost.engines.plain_learner import PlainLearner
from rlpost.engines.plain_sampler import PlainSampler
from rlpost.engines.pretrained import save_pretrained
from tests.engines.conftest import make_update
from tests.engines.learner_jobs import (
    DEEPSPEED_LORA,
    LORA,
    PLAIN_LORA,
    SPEC,
    Job,
    Kind,
    alone,
    check_first_ratio,
    make_rollouts,
    stir,
    train,
)

kinds = [pytest.param(PLAIN_LORA, id="plain")] + [
    pytest.param(kind, id=str(kind), marks=pytest.mark.engines) for kind in DEEPSPEED_LORA
]
in_float32 = [param for param in kinds if "bfloat16" not in str(param.id)]


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def base_of(learner: Any) -> dict[str, Tensor]:
    """The frozen weights, whole."""
    found = {}
    for weight in checkpoint_weights(learner._scorer.policy):
        with learner._adapter._whole(weight.parameters, False):
            found[weight.name] = weight.base.detach().clone()
    return found


def adapters_of(learner: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every adapted layer, by the layer's checkpoint name."""
    tensors = learner.adapter().tensors
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model.") + ".weight": (
            tensors[f"{name}.lora_A.weight"],
            tensors[f"{name}.lora_B.weight"],
        )
        for name in names
    }


# -- what is served ----------------------------------------------------------------------------------------------------


def test_a_weight_is_its_base_plus_the_scaled_product() -> None:
    """[1 2; 3 4] + 0.5 [2; 1] [1 -2] = [2 0; 3.5 3]"""
    base, A, B = (nn.Parameter(torch.tensor(x)) for x in ([[1.0, 2.0], [3.0, 4.0]], [[1.0, -2.0]], [[2.0], [1.0]]))
    weight = Weight(name="w", base=base, adapter=(A, B), scale=0.5)
    assert weight.value().tolist() == [[2.0, 0.0], [3.5, 3.0]]
    assert weight.renew(torch.Generator())
    assert base.tolist() == [[2.0, 0.0], [3.5, 3.0]] and B.tolist() == [[0.0], [0.0]]


def test_a_sum_is_rounded_once() -> None:
    """In bfloat16, 256 + 1 is 256; from 256 + (1 + 0.75) comes 258, the neighbour nearest to 257.75."""
    base, A, B = (
        nn.Parameter(torch.tensor(x, dtype=torch.bfloat16)) for x in ([[256.0]], [[1.0], [0.75]], [[1.0, 1.0]])
    )
    assert Weight(name="w", base=base, adapter=(A, B), scale=1.0).value().bfloat16().item() == 258.0


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_scales_are_those_of_the_papers(tied_model: Path, rslora: bool, scale: float) -> None:
    learner = PlainLearner(tied_model, lora=replace(LORA, rslora=rslora))
    scales = {weight.scale for weight in checkpoint_weights(learner._scorer.policy) if weight.adapter}
    assert scales == {scale}


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_hundred_publishes_leave_the_base_as_it_was_and_serve_the_sum(
    kind: Kind, make: Callable[..., Any], tied_model: Path
) -> None:
    """Computed here from the model directory, by another product: einsum in float64, then one rounding."""
    learner = make()
    stored = {n: p.detach() for n, p in load_policy(tied_model, kind.dtype).named_parameters()}
    weights: Mapping[str, Tensor] = {}
    for count in range(100):
        if count % 20 == 0:
            train(learner, Job(kind, tied_model, lr=0.05))
        weights = learner.weights()
    assert same(base_of(learner), stored)
    adapters = adapters_of(learner)
    assert len(adapters) == 14 and all(B.any() for _, B in adapters.values())
    for name, tensor in weights.items():
        expected = stored[name].double()
        if name in adapters:
            A, B = adapters[name]
            expected = expected + 2.0 * torch.einsum("mr,rn->mn", B.double(), A.double())
        torch.testing.assert_close(
            tensor, expected.to(kind.dtype), rtol=1e-6 if kind.dtype == torch.float32 else 8e-3, atol=1e-7
        )


def test_a_sampler_of_the_published_weights_draws_tokens_as_the_learner_scores_them(served_model: Path) -> None:
    learner = PlainLearner(served_model, lora=LORA)
    learner.begin_stage(SPEC)
    rollouts, advantages = make_rollouts(served_model)
    learner.accumulate(rollouts, advantages, learner_version=1, max_staleness=1)
    learner.step(denominator=20.0, lr=0.2)
    sampler = PlainSampler(served_model)
    sampler.update(make_update(1, learner.weights()))
    for seed in range(4):
        sampler.add(RolloutRequest(id=str(seed), prompt_ids=(5, 6, 7), seed=seed, temperature=1.0, max_tokens=16))
    drawn = []
    while sampler.has_work():
        drawn += [rollout for _, rollout in sampler.step()]
    before = Scorer(load_policy(served_model, torch.float32))
    gaps, moves = [], []
    with torch.no_grad():
        for rollout in drawn:
            inputs = alone(rollout)
            ours = learner._scorer(*inputs)[0][0]
            gaps.append((ours - rollout.sampler_logprobs).abs().max())
            moves.append((before(*inputs)[0][0] - rollout.sampler_logprobs).abs().max())
    assert max(gaps) < 1e-5 and max(moves) > 0.01


# -- stages and the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_stage_begins_with_exactly_what_was_served(kind: Kind, make: Callable[..., Any], tied_model: Path) -> None:
    learner, job = make(), Job(kind, tied_model, lr=0.05)
    start = served = base_of(learner)
    for _ in range(2):
        train(learner, job)
        served = learner.weights()
        learner.begin_stage(job.spec)
        assert same(base_of(learner), served) and same(learner.weights(), served)
        assert not any(B.any() for _, B in adapters_of(learner).values())
    moved = {name for name in start if not torch.equal(served[name], start[name])}
    assert moved == set(adapters_of(learner))
    assert learner.step(denominator=1.0, lr=1.0).grad_norm == 0.0
    assert same(learner.weights(), served)


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_fresh_adapter_depends_on_the_seed_alone(kind: Kind, make: Callable[..., Any]) -> None:
    """Not on what was drawn before, and rounded to the dtype of the policy from the same numbers."""
    learner = make(spec=replace(SPEC, adapter_seed=3))
    torch.manual_seed(99)
    again = [A for A, _ in adapters_of(make(spec=replace(SPEC, adapter_seed=3))).values()]
    other = [A for A, _ in adapters_of(make(spec=replace(SPEC, adapter_seed=4))).values()]
    plain = [A for A, _ in adapters_of(make(kind=PLAIN_LORA, spec=replace(SPEC, adapter_seed=3))).values()]
    for ours, a, o, p in zip(adapters_of(learner).values(), again, other, plain, strict=True):
        assert torch.equal(ours[0], a) and not torch.equal(ours[0], o) and torch.equal(ours[0], p.to(kind.dtype))
        assert 0.9 < ours[0].abs().max() * ours[0].shape[1] ** 0.5 <= 1.0  # uniform up to 1 / sqrt(N)


@pytest.mark.parametrize("kind", in_float32, indirect=True)
def test_the_reference_is_the_base_bit_for_bit_and_no_second_model(
    kind: Kind, make: Callable[..., Any], tied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a frozen copy of the policy at the start of the second stage, while the adapter is far from 0."""
    spec = replace(SPEC, objective=PolicyGradient(kl_coef=0.1))
    learner, job = make(spec=spec), Job(kind, tied_model, spec=spec, lr=0.05)
    train(learner, job)
    policy = load_policy(tied_model, torch.float32)
    monkeypatch.delattr(f"{type(learner).__module__}.load_policy")
    learner.begin_stage(spec)
    policy.load_state_dict(dict(learner.weights()), strict=False)
    frozen = Scorer(policy).requires_grad_(False)
    train(learner, job)
    assert learner._reference is not None
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in learner._scorer.parameters())
    assert num_parameters == sum(p.numel() for p in policy.parameters()) + sum(
        A.numel() + B.numel() for A, B in adapters_of(learner).values()
    )
    for rollout in make_rollouts(tied_model)[0]:
        inputs = alone(rollout)
        with torch.no_grad():
            reference = learner._reference(*inputs)
            assert torch.equal(reference, frozen(*inputs)[0])
            present = learner._scorer(*inputs)[0]
        assert (present - reference).abs().max() > 1e-3


@pytest.mark.parametrize("kind", in_float32, indirect=True)
def test_each_round_of_dpo_begins_at_a_margin_of_zero(kind: Kind, make: Callable[..., Any], tied_model: Path) -> None:
    """Then policy and reference are one, and the loss of a pair is log 2; during a round it falls."""
    spec = replace(SPEC, objective=Preference(beta=0.5))
    learner, job = make(spec=spec), Job(kind, tied_model, spec=spec, lr=0.1, cuts=(6,))
    for _ in range(3):
        first, second = (train(learner, job).tally.sums for _ in range(2))
        assert first["loss"] / first["pairs"] == pytest.approx(0.6931472, abs=2e-7)
        assert second["loss"] / second["pairs"] < 0.68
        learner.begin_stage(spec)


@pytest.mark.parametrize("kind", in_float32, indirect=True)
def test_fresh_tokens_have_a_ratio_of_exactly_one_under_a_fresh_adapter(
    kind: Kind, make: Callable[..., Any], tied_model: Path
) -> None:
    """Scored one by one by the model without any adapter, and not 1 after a step."""
    learner = make(micro_batch_tokens=1)
    rollouts, advantages = make_rollouts(tied_model)
    scorer = Scorer(load_policy(tied_model, torch.float32))
    with torch.no_grad():
        fresh = [replace(r, sampler_logprobs=scorer(*alone(r))[0][0]) for r in rollouts]
    check_first_ratio(learner, fresh, advantages)


# -- what is trained, and what is stored -------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_merged_weight_through_the_chain_rule(tied_model: Path) -> None:
    """dL/dA = s B^T G and dL/dB = s G A^T, with G the gradient of the merged weight in a model without adapters."""
    learner = PlainLearner(tied_model, lora=LORA)
    learner.begin_stage(SPEC)
    stir(learner)
    policy = load_policy(tied_model, torch.float32)
    policy.load_state_dict(dict(learner.weights()), strict=False)
    rollouts, advantages = make_rollouts(tied_model)
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        logprobs = Scorer(policy)(*alone(rollout))[0][0]
        ratios = (logprobs - rollout.sampler_logprobs)[rollout.loss_mask].exp()
        surrogate = torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.28) * advantage)
        (-surrogate.sum()).backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}

    learner.accumulate(rollouts, advantages, learner_version=1, max_staleness=1)

    for weight in checkpoint_weights(learner._scorer.policy):
        if weight.adapter is None:
            assert weight.base.grad is None
            continue
        (A, B), G = weight.adapter, gradients[weight.name]
        assert G is not None
        torch.testing.assert_close(A.grad, 2.0 * B.detach().T @ G, rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(B.grad, 2.0 * G @ A.detach().T, rtol=1e-4, atol=5e-5)


@pytest.mark.engines
@pytest.mark.parametrize("kind", [param for param in kinds if param.id != "plain"], indirect=True)
def test_a_checkpoint_holds_the_adapter_and_not_the_model(
    kind: Kind, make: Callable[..., Any], tied_model: Path, tmp_path: Path
) -> None:
    learner = make()
    train(learner, Job(kind, tied_model))
    learner.save(tmp_path)
    for file in tmp_path.rglob("*model_states.pt"):
        names = torch.load(file, weights_only=False)["module"].keys()
        assert names and all(".lora_" in name for name in names)
    assert not (tmp_path / "base.safetensors").exists()
    trained = sum(A.numel() + B.numel() for A, B in adapters_of(learner).values())
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.pt")) < 16 * trained + 100_000


@pytest.mark.parametrize("kind", in_float32, indirect=True)
def test_an_adapter_of_other_settings_is_not_resumed(
    kind: Kind, make: Callable[..., Any], tied_model: Path, tmp_path: Path
) -> None:
    """The tensors of alpha 16 would fit alpha 8, and give another policy."""
    learner = make(kind=replace(kind, lora=replace(LORA, alpha=16.0)))
    learner.save(tmp_path)
    with pytest.raises(
        ValueError, match=r"saved with lora = rank 4, alpha 16, .* this learner has lora = rank 4, alpha 8"
    ):
        make().load(tmp_path)


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_each_stage_exports_an_adapter_that_peft_adds_to_its_base(
    kind: Kind, make: Callable[..., Any], tied_model: Path, tmp_path: Path
) -> None:
    """Base and adapter of two stages, merged by peft in float32 and rounded once: the merged model of the export."""
    learner, base = make(), tied_model
    rtol = 1e-6 if kind.dtype == torch.float32 else 2**-7
    for name in ("first", "second"):
        train(learner, Job(kind, tied_model, lr=0.05))
        save_pretrained(learner.weights(), tied_model, tmp_path / name, learner.adapter())
        policy = AutoModelForCausalLM.from_pretrained(base, dtype=kind.dtype).float()
        before = {n: p.to(kind.dtype, copy=True) for n, p in policy.named_parameters()}
        adapted: Any = PeftModel.from_pretrained(policy, tmp_path / name / "adapter")
        merged = dict(adapted.merge_and_unload().named_parameters())
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert expected.dtype == kind.dtype
        moved = set()
        for n, tensor in expected.named_parameters():
            torch.testing.assert_close(merged[n].to(kind.dtype), tensor, rtol=rtol, atol=1e-7)
            moved |= {n} if not torch.equal(tensor, before[n]) else set()
        assert moved == set(adapters_of(learner))
        learner.begin_stage(SPEC)
        base = tmp_path / name
    config = json.loads((tmp_path / "second" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")


# -- targets -----------------------------------------------------------------------------------------------------------


def test_targets_are_last_parts_of_names_or_whole_names(tied_model: Path) -> None:
    def adapted(*targets: str) -> list[str]:
        learner = PlainLearner(tied_model, lora=LoraSpec(rank=2, alpha=2.0, targets=targets))
        return [weight.name for weight in checkpoint_weights(learner._scorer.policy) if weight.adapter]

    assert adapted("v_proj") == [f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)]
    assert adapted("model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("target", ["w1", "proj", "lm_head", "embed_tokens", "mlp", "norm"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_target_that_has_no_adapter_is_refused_with_those_that_do(
    tied_model: Path, tiny_model: Path, target: str, tied: bool
) -> None:
    with pytest.raises(ValueError, match=rf"'{target}' is no layer of Llama.*'down_proj', 'gate_proj'.*\"all-linear\""):
        PlainLearner(tied_model if tied else tiny_model, lora=replace(LORA, targets=("q_proj", target)))
