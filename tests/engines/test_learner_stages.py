"""What every learner promises of a stage, its steps and its errors, whatever it computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from rlpost.core.objective import PolicyGradient
from rlpost.core.optimizers import AdamW
from rlpost.core.weights import unchanged_fraction
from rlpost.engines.base import LearnerEngine
from rlpost.engines.plain_learner import PlainLearner, check_finite
from tests.engines.learner_checks import (
    OBJECTIVES,
    deepspeed_kinds,
    error,
    full_kinds,
    kinds,
    same,
    tolerance_of,
)
from tests.engines.learner_jobs import (
    PLAIN,
    SPEC,
    Job,
    Kind,
    Result,
    critic_masters,
    make_learner,
    make_rollouts,
    masters,
    run,
    stir,
    train,
)


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_rollouts_without_gradient_change_no_bit(kind: Kind, tied_model: Path) -> None:
    """Rollouts 2 and 8 have advantage 0: with and without them the step is the same, so they were never computed."""
    job = Job(kind, tied_model, cuts=(7,))
    without = replace(job, rows=tuple(i for i in range(12) if i not in (2, 8)), cuts=(6,))
    ours, expected = run(job), run(without)
    assert same(ours.masters, expected.masters)
    assert [r.tally.sums for r in ours.reports] == [r.tally.sums for r in expected.reports]


@pytest.mark.parametrize("rows", [(), (2, 8)], ids=["no-rollouts", "no-advantage"])
@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_step_without_gradient_moves_nothing(kind: Kind, tied_model: Path, rows: tuple[int, ...]) -> None:
    result = run(Job(kind, tied_model, num_steps=2, rows=rows, cuts=()))
    assert result.norms == [0.0, 0.0]
    assert same(result.masters, result.before)


@pytest.mark.parametrize("kind", deepspeed_kinds, indirect=True)
def test_a_step_without_gradient_follows_its_momentum(kind: Kind, make: Callable[..., Any], tied_model: Path) -> None:
    """As AdamW does: its moments decay, and the weights go on."""
    job = Job(kind, tied_model)
    ours, plain = make(), make(kind=kind.plain)
    for learner in (ours, plain):
        train(learner, job)
    before = [masters(learner) for learner in (ours, plain)]
    for learner in (ours, plain):
        assert learner.step(denominator=5.0, lr=1.0).grad_norm == 0.0
    results = [Result(b, masters(learner), {}) for b, learner in zip(before, (ours, plain), strict=True)]
    assert results[1].moved.norm() > 0
    assert error(*results) < tolerance_of(kind)


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_gradient_that_is_not_finite_is_an_error_and_moves_nothing(
    kind: Kind, make: Callable[..., Any], tied_model: Path
) -> None:
    """Sampled at log-prob -10,000 and unwanted: the ratio overflows."""
    learner: LearnerEngine = make()
    before = masters(learner)
    rollouts, _ = make_rollouts(tied_model)
    broken = replace(rollouts[0], sampler_logprobs=torch.where(rollouts[0].loss_mask, -1e4, 0.0))
    learner.accumulate([rollouts[1], broken], [1.0, -1.0], learner_version=1, max_staleness=1)
    with pytest.raises(RuntimeError, match="gradient's norm is"):
        learner.step(denominator=1.0, lr=1.0)
    assert same(masters(learner), before)


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_weights_are_copies_under_checkpoint_names_with_tied_ones_once(
    kind: Kind, make: Callable[..., Any], tied_model: Path, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(tied_model).save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    learner = make()
    weights = learner.weights()
    assert set(weights) == names
    assert all(w.dtype == kind.dtype and w.device.type == "cpu" for w in weights.values())
    for tensor in weights.values():
        tensor.zero_()
    assert all(w.any() for name, w in learner.weights().items() if not name.endswith("bias"))


@pytest.mark.parametrize("kind", full_kinds, indirect=True)
def test_weights_are_the_masters_rounded_to_the_served_dtype(kind: Kind, tied_model: Path) -> None:
    result = run(Job(kind, tied_model, num_steps=2))
    assert same(result.weights, {name: p.to(kind.dtype) for name, p in result.masters.items()})


@pytest.mark.parametrize("kind", [k for k in full_kinds if "bfloat16" in str(k.id)], indirect=True)
def test_updates_too_small_for_bfloat16_add_up_in_the_masters(kind: Kind, tied_model: Path) -> None:
    """Ten AdamW steps of 1e-6 move a master by up to 1e-5. The bfloat16 neighbours of a weight of 0.1 are 4e-4 away."""
    spec = replace(SPEC, optimizer=AdamW())
    result = run(Job(kind, tied_model, num_steps=10, spec=spec, lr=1e-6))
    assert 5e-6 < result.moved.abs().max() < 1.5e-5
    assert (result.moved != 0).float().mean() > 0.5
    image = {name: p.to(torch.bfloat16) for name, p in result.before.items()}
    assert 0.9 < unchanged_fraction(image, result.weights) < 1.0


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_new_stage_has_fresh_moments(kind: Kind, make: Callable[..., Any], tied_model: Path) -> None:
    """A step at lr 0 fills the moments and leaves the weights. After begin_stage the next one is a first step."""
    job = Job(kind, tied_model, spec=replace(SPEC, optimizer=AdamW()), lr=1e-2)
    used, fresh = make(spec=job.spec), make(spec=job.spec)
    train(used, replace(job, lr=0.0))
    used.begin_stage(job.spec)
    for learner in (used, fresh):
        train(learner, job)
    assert same(masters(used), masters(fresh))


@pytest.mark.parametrize("kind", full_kinds, indirect=True)
def test_a_new_stage_moves_nothing(kind: Kind, make: Callable[..., Any], tied_model: Path) -> None:
    used = make()
    train(used, Job(kind, tied_model, lr=1e-2))
    before = masters(used)
    used.begin_stage(SPEC)
    assert same(masters(used), before)
    assert used.step(denominator=1.0, lr=1.0).grad_norm == 0.0
    assert same(masters(used), before)


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_settings_of_the_new_stage_hold(kind: Kind, make: Callable[..., Any], tied_model: Path) -> None:
    spec = replace(SPEC, optimizer=AdamW(eps=0.5, weight_decay=0.1, betas=(0.5, 0.9)))
    job = Job(kind, tied_model, spec=spec)
    learner = make()
    learner.begin_stage(spec)
    if kind.lora is not None:
        stir(learner)
    before = masters(learner)
    for _ in range(2):
        train(learner, job)
    expected = run(replace(job, kind=job.kind.plain, num_steps=2))
    assert error(Result(before, masters(learner), {}), expected) < tolerance_of(kind)


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_the_reference_is_the_policy_of_the_start_of_the_stage(
    kind: Kind, make: Callable[..., Any], tied_model: Path
) -> None:
    """KL to it is 0 at first, then not; and 0 again in the next stage, which starts from the moved policy."""
    spec = replace(SPEC, objective=PolicyGradient(kl_coef=0.01))
    job = Job(kind, tied_model, spec=spec, lr=0.05)
    learner = make(spec=spec)
    if kind.lora is not None:
        stir(learner)
        learner.begin_stage(spec)
    noise = 1e-3 if kind.dtype == torch.bfloat16 else 1e-6
    per_token = [train(learner, job).tally for _ in range(2)]
    learner.begin_stage(spec)
    per_token.append(train(learner, job).tally)
    kl = [tally.sums["reference_kl"] / tally.sums["tokens"] for tally in per_token]
    assert abs(kl[0]) < noise and abs(kl[2]) < noise and kl[1] > 20 * noise


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_critic_begins_as_the_policy_of_its_stage_with_values_of_zero_and_ends_with_it(
    kind: Kind, make: Callable[..., Any], tied_model: Path
) -> None:
    spec = replace(SPEC, objective=OBJECTIVES["ppo"])
    job = Job(kind, tied_model, spec=spec, lr=0.05)
    learner = make(spec=spec)
    first, second = (train(learner, job).tally.sums["value"] for _ in range(2))
    assert first == 0.0 and abs(second) > 0.1
    for objective in (spec.objective, PolicyGradient(), spec.objective):
        learner.begin_stage(replace(spec, objective=objective))
        critic = critic_masters(learner)
        assert bool(critic) == (objective is spec.objective)
        if critic:
            policy = {f"backbone.{n.removeprefix('model.')}": p for n, p in learner.weights().items()}
            assert not critic.pop("head.weight").any() and not critic.pop("head.bias").any()
            assert same(critic, {n: policy[n].float() for n in critic})
        report = train(learner, job)
        assert report.tally.sums.get("value") == (0.0 if critic else None)
        assert (report.critic_grad_norm is not None) == bool(critic)


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_return_that_is_not_finite_is_an_error_and_moves_no_critic(
    kind: Kind, make: Callable[..., Any], tied_model: Path
) -> None:
    learner: LearnerEngine = make(spec=replace(SPEC, objective=OBJECTIVES["ppo"]))
    before = critic_masters(learner)
    learner.accumulate(make_rollouts(tied_model)[0][:1], [float("inf")], learner_version=1, max_staleness=1)
    with pytest.raises(RuntimeError, match="gradient's norm is"):
        learner.step(denominator=1.0, lr=1.0)
    assert same(critic_masters(learner), before)


def test_the_error_of_a_critics_gradient_names_its_learning_rate() -> None:
    with pytest.raises(RuntimeError, match=r"the critic's gradient's norm is inf.*a lower critic\.lr"):
        check_finite(1.0, float("inf"))


def test_dropout_is_off(tied_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tied_model, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    assert AutoConfig.from_pretrained(path).attention_dropout == 0.5
    # Not bit for bit: how a buffer is aligned can change the last bit of a sum. Dropout would turn the update elsewhere.
    moved, expected = run(Job(PLAIN, path)).moved, run(Job(PLAIN, tied_model)).moved
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.999


def test_a_model_that_changes_its_logits_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_logit_softcapping=None,
        final_logit_softcapping=0.5,
        initializer_range=1.0,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="soft-capping"):
        PlainLearner(tmp_path)


@pytest.mark.engines
@pytest.mark.parametrize("change", [{"zero_stage": 0}, {"dtype": torch.float16}])
def test_settings_that_train_wrongly_are_refused(tied_model: Path, change: dict[str, Any]) -> None:
    kind = replace(Kind(1, torch.bfloat16), **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        make_learner(Job(kind, tied_model))
