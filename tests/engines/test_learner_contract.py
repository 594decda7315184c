"""What every `LearnerEngine` promises: the plain one against a dense formula, DeepSpeed against the plain one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from rlpost.core.critic import Critic
from rlpost.core.kto import KTO
from rlpost.core.metrics import Tally
from rlpost.core.objective import Objective, PolicyGradient, StageSpec, Supervised
from rlpost.core.optimizers import AdamW
from rlpost.core.preference import Preference
from rlpost.core.weights import unchanged_fraction
from rlpost.engines.base import LearnerEngine
from rlpost.engines.plain_learner import PlainLearner, check_finite
from rlpost.types import Rollout, VersionSpan
from tests.engines.learner_jobs import (
    DEEPSPEED,
    DEEPSPEED_LORA,
    FULL,
    LINEAR,
    LORA,
    PLAIN,
    PLAIN_LORA,
    SPEC,
    Job,
    Kind,
    Result,
    alone,
    check_first_ratio,
    close,
    critic_masters,
    dense_logprobs,
    free_port,
    make_learner,
    make_rollouts,
    masters,
    run,
    run_in_children,
    stir,
    train,
)

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


@pytest.fixture(scope="module")
def process_group() -> None:
    from rlpost.engines.deepspeed_learner import init_distributed

    if not torch.distributed.is_initialized():
        init_distributed(rank=0, world_size=1, master_port=free_port())


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param.zero_stage is not None:
        request.getfixturevalue("process_group")
    return request.param


@pytest.fixture
def make(kind: Kind, tied_model: Path) -> Iterator[Callable[..., Any]]:
    """make(**changes) is a learner of this kind whose stage has begun."""
    made: list[Any] = []

    def make(**changes: Any) -> Any:
        job = replace(Job(kind, tied_model), **changes)
        learner = make_learner(job)
        made.append(learner)
        learner.begin_stage(job.spec)
        return learner

    yield make
    for learner in made:
        close(learner)


def error(result: Result, expected: Result) -> float:
    """Relative error of the displacement."""
    return float((result.moved - expected.moved).norm() / expected.moved.norm())


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the plain learner, from first principles --------------------------------------------------------------------------


def test_the_plain_learner_takes_the_step_of_the_dense_formula(tied_model: Path) -> None:
    """Gradient of -sum min(r A, clip(r) A) / D over dense log-softmax tables, clipped to norm 0.01; then AdamW's first
    step, w - lr (g / (|g| + eps) + decay w), since both of its moments are then the gradient's own."""
    policy = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    rollouts, advantages = make_rollouts(tied_model)
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        table = torch.log_softmax(policy(rollout.token_ids[None]).logits[0, :-1] / 0.8, -1)
        logprobs = table.gather(-1, rollout.token_ids[1:, None])[:, 0][rollout.loss_mask[1:]]
        ratios = (logprobs - rollout.sampler_logprobs[rollout.loss_mask]).exp()
        surrogate = torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.28) * advantage)
        (-surrogate.sum() / 20.0).backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm()
    optimizer = AdamW(eps=0.1, weight_decay=0.01, max_grad_norm=0.01)

    result = run(Job(PLAIN, tied_model, num_steps=1, spec=replace(SPEC, optimizer=optimizer), lr=0.5))

    assert result.norms == pytest.approx([float(norm)], rel=1e-5)
    for name, p in policy.named_parameters():
        gradient = p.grad * 0.01 / norm
        expected = p - 0.5 * (gradient / (gradient.abs() + 0.1) + 0.01 * p)
        torch.testing.assert_close(result.masters[name], expected.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cuts", [(), (1,), (4, 5, 9), tuple(range(1, 12))])
def test_streaming_the_plain_learner_gives_the_batch_bit_for_bit(tied_model: Path, cuts: tuple[int, ...]) -> None:
    streamed, whole = run(Job(PLAIN, tied_model, cuts=cuts)), run(Job(PLAIN, tied_model, cuts=(7,)))
    assert same(streamed.masters, whole.masters)
    assert streamed.norms == whole.norms


def test_fresh_tokens_have_a_ratio_of_exactly_one_and_no_longer_after_a_step(tied_model: Path) -> None:
    learner = PlainLearner(tied_model)
    learner.begin_stage(SPEC)
    rollouts, advantages = make_rollouts(tied_model)
    fresh = []
    for rollout in rollouts:
        with torch.no_grad():
            logprobs = learner._scorer(*alone(rollout), SPEC.temperature)[0][0]
        fresh.append(replace(rollout, sampler_logprobs=logprobs))
    check_first_ratio(learner, fresh, advantages)


def test_the_proximal_policy_is_the_one_at_the_start_of_each_step(tied_model: Path) -> None:
    """Gradient of -sum min(c, p / b) A log pi / D with p frozen when the step began, over dense tables; cut into three
    calls, in the second step too. The p of the step before would give another gradient."""
    objective = PolicyGradient(proximal="learner", weight_high=1.5)
    learner = PlainLearner(tied_model)
    learner.begin_stage(replace(SPEC, objective=objective))
    rollouts, advantages = make_rollouts(tied_model)
    policies: list[Any] = []
    for _ in range(2):
        policy = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
        policy.load_state_dict(dict(learner.weights()), strict=False)
        policies.append(policy)
        norms = []
        for proximal in policies:
            policy.zero_grad()
            for rollout, advantage in zip(rollouts, advantages, strict=True):
                table = torch.log_softmax(policy(rollout.token_ids[None]).logits[0, :-1] / SPEC.temperature, -1)
                logprobs = table.gather(-1, rollout.token_ids[1:, None])[:, 0]
                frozen = dense_logprobs(proximal, rollout.token_ids) - rollout.sampler_logprobs
                weights = frozen.exp().clamp(max=1.5)[1:]
                (-(weights * advantage * logprobs)[rollout.loss_mask[1:]].sum() / 20.0).backward()
            norms.append(float(torch.cat([p.grad.flatten() for p in policy.parameters()]).norm()))
        for start, end in ((0, 1), (1, 5), (5, 12)):
            learner.accumulate(rollouts[start:end], advantages[start:end], learner_version=1, max_staleness=1)
        assert learner.step(denominator=20.0, lr=0.2).grad_norm == pytest.approx(norms[-1], rel=1e-5)
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)


# -- DeepSpeed against the plain learner -------------------------------------------------------------------------------

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


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("kind", deepspeed_kinds, indirect=True)
def test_three_steps_are_those_of_the_specification(kind: Kind, tied_model: Path, objective: Objective) -> None:
    cuts = (6,) if isinstance(objective, Preference) else (7,)  # pairs are never cut
    job = Job(kind, tied_model, spec=replace(SPEC, objective=objective), cuts=cuts)
    result, expected = run(job), run(replace(job, kind=job.kind.plain))
    tolerance = tolerance_of(kind)
    assert error(result, expected) < tolerance
    assert result.norms == pytest.approx(expected.norms, rel=tolerance)
    if expected.critic:
        check_critic(result, expected, CRITIC_TOLERANCE[kind.dtype])
    for ours, theirs in zip(result.reports, expected.reports, strict=True):
        assert ours.tally.sums["tokens"] == theirs.tally.sums["tokens"]
        per_token = tolerance * theirs.tally.sums["tokens"]
        if kind.dtype == torch.bfloat16:  # whose grain hides what these steps move: scores are 0, and on no side
            theirs.tally.sums.pop("responses_right", None)
            ours.tally.sums.pop("responses_right", None)
        assert ours.tally.sums == pytest.approx(theirs.tally.sums, rel=tolerance, abs=per_token)


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


@pytest.mark.parametrize("kind", deepspeed_kinds, indirect=True)
def test_clipping_bounds_the_mean_gradient_and_not_the_sum(kind: Kind, tied_model: Path) -> None:
    """The sum's norm is 20 times the mean's. A bound between them must not act, one of half the mean's norm must."""
    free = run(Job(kind, tied_model, num_steps=1))
    bounds = (2 * free.norms[0], 0.5 * free.norms[0])
    loose, tight = (replace(SPEC, optimizer=replace(LINEAR, max_grad_norm=bound)) for bound in bounds)
    assert error(run(Job(kind, tied_model, num_steps=1, spec=loose)), free) < tolerance_of(kind) / 4
    clipped, expected = (run(Job(k, tied_model, num_steps=1, spec=tight)) for k in (kind, kind.plain))
    assert error(clipped, expected) < tolerance_of(kind)
    assert clipped.norms == free.norms  # reported before clipping
    assert clipped.moved.norm() < 0.7 * free.moved.norm()


@pytest.mark.parametrize("kind", deepspeed_kinds, indirect=True)
def test_the_step_does_not_depend_on_how_it_was_cut(kind: Kind, tied_model: Path) -> None:
    job = Job(kind, tied_model, num_steps=2)
    base = run(job)
    changes: list[dict[str, Any]] = [
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 10_000},
        {"cuts": ()},
        {"cuts": tuple(range(1, 12))},
        {"rows": tuple(reversed(range(12))), "cuts": (2, 3)},
        {"gradient_checkpointing": True},
    ]
    for change in changes:
        assert error(run(replace(job, **change)), base) < tolerance_of(kind) / 4, change


@pytest.mark.parametrize("kind", deepspeed_kinds, indirect=True)
def test_the_critics_step_does_not_depend_on_how_it_was_cut(kind: Kind, tied_model: Path) -> None:
    job = Job(kind, tied_model, num_steps=2, spec=replace(SPEC, objective=OBJECTIVES["ppo"]))
    base = run(job)
    changes: list[dict[str, Any]] = [
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 10_000, "cuts": ()},
        {"rows": tuple(reversed(range(12))), "cuts": (2, 3)},
        {"gradient_checkpointing": True},
    ]
    for change in changes:
        changed = run(replace(job, **change))
        assert error(changed, base) < tolerance_of(kind) / 4, change
        check_critic(changed, base, CRITIC_TOLERANCE[kind.dtype] / 4)


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_the_step_does_not_depend_on_how_its_pairs_were_cut(kind: Kind, tied_model: Path) -> None:
    """Calls may begin and end between pairs, and micro-batches hold one pair or all."""
    spec = replace(SPEC, objective=Preference(beta=0.5))
    job = Job(kind, tied_model, num_steps=2, spec=spec, cuts=(6,))
    base = run(job)
    assert base.reports[0].tally.sums["pairs"] == 5
    changes: list[dict[str, Any]] = [
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 10_000, "cuts": ()},
        {"cuts": (2, 6, 8)},
        {"rows": (6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5), "cuts": (2,)},
    ]
    for change in changes:
        assert error(run(replace(job, **change)), base) < tolerance_of(kind) / 4, change


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_small_gradients_are_not_lost_beside_large_ones(kind: Kind, make: Callable[..., Any], tied_model: Path) -> None:
    """Sixteen times g between 512 g and -512 g: added up in bfloat16, whose neighbours of 512 are 4 apart, nothing of
    it is left."""
    policy = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    rollout = make_rollouts(tied_model)[0][0]
    on_policy = torch.where(rollout.loss_mask, dense_logprobs(policy, rollout.token_ids), 0.0)
    rollout = replace(rollout, sampler_logprobs=on_policy)
    norms = []
    for advantages in ([512.0, *[1.0] * 16, -512.0], [16.0]):
        learner: LearnerEngine = make(micro_batch_tokens=1)
        learner.accumulate([rollout] * len(advantages), advantages, learner_version=1, max_staleness=1)
        norms.append(learner.step(denominator=1.0, lr=0.0).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("kind", deepspeed_kinds, indirect=True)
def test_an_untied_model_of_long_rows_scores_tokens_as_the_model_itself_does(
    kind: Kind, make: Callable[..., Any], tiny_model: Path
) -> None:
    """The sampler is the model: every ratio is 1. Row of 200 tokens, where rotary frequencies rounded to bfloat16 would
    turn positions by a radian."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    token_ids = torch.randint(0, 250, (200,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(200) >= 5
    rollout = Rollout(
        token_ids=token_ids,
        loss_mask=mask,
        sampler_logprobs=torch.where(mask, dense_logprobs(policy, token_ids), 0.0),
        spans=(VersionSpan(version=1, start=0, end=195),),
        finish_reason="stop",
        text="",
    )
    learner = make(model_path=tiny_model)
    short = make_rollouts(tiny_model)[0][0]
    learner.accumulate([rollout, short], [1.0, 0.0], learner_version=1, max_staleness=0)
    tally = learner.step(denominator=1.0, lr=0.0).tally
    assert tally.sums["tokens"] == 195
    assert tally.maxima["gap"] < (1e-4 if kind.dtype == torch.float32 else 0.06)


# -- what holds for all of them ----------------------------------------------------------------------------------------


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


# -- several ranks, and resuming ---------------------------------------------------------------------------------------

PAIRED = [*FULL[:3], DEEPSPEED_LORA[2]]
KL_SPEC = replace(SPEC, objective=PolicyGradient(kl_coef=0.5))
CRITIC_KINDS = DEEPSPEED[:4]
"""Every ZeRO stage, and the optimizer that DeepSpeed has for bfloat16."""
CRITIC_SPEC = replace(
    SPEC,
    objective=PolicyGradient(
        advantage=Critic(lr=CRITIC_LR, gae_lambda=0.9), kl_coef=0.5, kl_place="reward", kl_estimator="k1"
    ),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def whole_run(kind: Kind, model_path: Path, save: Path, spec: StageSpec = KL_SPEC) -> Job:
    """Four steps, a checkpoint after two; of an adapter, on a base that an earlier stage has changed (in float32: rounded to
    bfloat16, a merged base is another policy than the specification's)."""
    stages_before = 1 if kind.lora is not None and kind.dtype == torch.float32 else 0
    return Job(kind, model_path, num_steps=4, spec=spec, save=save, stages_before=stages_before)


def rest_of(job: Job) -> Job:
    return replace(job, num_steps=job.num_steps - job.save_after, load=job.save, save=None, stages_before=0)


@pytest.fixture(scope="module")
def two_rank_jobs(tied_model: Path, checkpoints: Path) -> dict[str, Job]:
    """The whole run of every kind, and steps whose first call has one rollout, or one pair: one of the ranks has nothing
    to train there, and the collectives of the second call must still meet."""
    jobs = {str(kind): whole_run(kind, tied_model, checkpoints / f"two-{kind}") for kind in DEEPSPEED}
    few = {f"{kind}-few": Job(kind, tied_model, rows=(0, 3, 4, 5, 6), cuts=(1,), num_steps=1) for kind in PAIRED}
    pairs = replace(SPEC, objective=Preference(beta=0.5))
    paired = {f"{kind}-pairs": Job(kind, tied_model, spec=pairs, cuts=(2,), num_steps=1) for kind in PAIRED}
    critic = {
        f"{kind}-critic": whole_run(kind, tied_model, checkpoints / f"two-{kind}-critic", CRITIC_SPEC)
        for kind in CRITIC_KINDS
    }
    few_critic = {f"{kind}-critic-few": replace(few[f"{kind}-few"], spec=CRITIC_SPEC) for kind in FULL[:3]}
    return jobs | few | paired | critic | few_critic


@pytest.fixture(scope="module")
def two_ranks(two_rank_jobs: dict[str, Job]) -> dict[str, list[Result]]:
    """Results per job and rank; one start of two processes serves all jobs."""
    ranks = run_in_children(list(two_rank_jobs.values()), world_size=2)
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(two_rank_jobs)}


@pytest.fixture(scope="module")
def two_ranks_resumed(two_rank_jobs: dict[str, Job], two_ranks: object) -> dict[str, list[Result]]:
    jobs = {name: rest_of(job) for name, job in two_rank_jobs.items() if job.save is not None}
    ranks = run_in_children(list(jobs.values()), world_size=2)
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(jobs)}


@pytest.mark.engines
@pytest.mark.parametrize(
    "name",
    [
        *map(str, DEEPSPEED),
        *(f"{kind}-critic" for kind in CRITIC_KINDS),
        *(f"{kind}-{few}" for kind in FULL[:3] for few in ("few", "critic-few")),
        *(f"{kind}-pairs" for kind in PAIRED),
    ],
)
def test_two_ranks_take_the_steps_of_one(
    name: str, two_rank_jobs: dict[str, Job], two_ranks: dict[str, list[Result]]
) -> None:
    job, results = two_rank_jobs[name], two_ranks[name]
    expected = run(replace(job, kind=job.kind.plain, save=None))
    # With a critic, what it rounds is in the policy's advantages.
    tolerance = CRITIC_TOLERANCE[job.kind.dtype] if expected.critic else tolerance_of(job.kind)
    assert same(results[0].weights, results[1].weights)
    assert results[0].norms == results[1].norms == pytest.approx(expected.norms, rel=tolerance)
    assert error(results[0], expected) < tolerance
    if expected.critic:
        if "few" not in name:  # in the first step only the head moves
            check_critic(results[0], expected, tolerance)
        assert same(results[0].critic, results[1].critic)
    merged = Tally.merge(result.reports[0].tally for result in results)
    assert merged.sums["tokens"] == expected.reports[0].tally.sums["tokens"]
    assert merged.sums["loss"] == pytest.approx(expected.reports[0].tally.sums["loss"], rel=3 * tolerance)


@pytest.mark.engines
@pytest.mark.parametrize("name", [*map(str, DEEPSPEED), *(f"{kind}-critic" for kind in CRITIC_KINDS)])
def test_two_ranks_resume_bit_for_bit_in_fresh_processes(
    name: str, two_ranks: dict[str, list[Result]], two_ranks_resumed: dict[str, list[Result]]
) -> None:
    for whole, rest in zip(two_ranks[name], two_ranks_resumed[name], strict=True):
        check_resumed(whole, rest)


@pytest.fixture(scope="module")
def resumed(process_group: None, tied_model: Path, checkpoints: Path) -> dict[str, tuple[Result, Result]]:
    """Whole runs in one fresh process, and their second halves in another.

    Not in this one: what other tests did to its threads and libraries can change the last bit of a sum.
    """
    kinds_of = {str(kind): kind for kind in (PLAIN, PLAIN_LORA, *DEEPSPEED)}
    jobs = {name: whole_run(kind, tied_model, checkpoints / f"one-{name}") for name, kind in kinds_of.items()}
    for kind in (PLAIN, *CRITIC_KINDS):
        name = f"{kind}-critic"
        jobs[name] = whole_run(kind, tied_model, checkpoints / f"one-{name}", CRITIC_SPEC)
    wholes = run_in_children(list(jobs.values()), world_size=1)[0]
    rests = run_in_children([rest_of(job) for job in jobs.values()], world_size=1)[0]
    return {name: (w, r) for name, w, r in zip(jobs, wholes, rests, strict=True)}


@pytest.mark.engines
@pytest.mark.parametrize(
    "name", [*map(str, (PLAIN, PLAIN_LORA, *DEEPSPEED)), *(f"{kind}-critic" for kind in (PLAIN, *CRITIC_KINDS))]
)
def test_a_fresh_process_resumes_bit_for_bit(name: str, resumed: dict[str, tuple[Result, Result]]) -> None:
    check_resumed(*resumed[name])


def check_resumed(whole: Result, rest: Result) -> None:
    assert same(rest.before, whole.saved) and not same(whole.saved, whole.before)
    assert rest.norms == whole.norms[2:]
    assert [r.tally.sums for r in rest.reports] == [r.tally.sums for r in whole.reports[2:]]
    assert same(rest.masters, whole.masters) and same(rest.weights, whole.weights)
    assert same(rest.critic_before, whole.critic_saved) and same(rest.critic, whole.critic)
    if whole.critic:
        assert not same(whole.critic_saved, whole.critic_before)
        assert [r.critic_grad_norm for r in rest.reports] == [r.critic_grad_norm for r in whole.reports[2:]]


@pytest.mark.engines
def test_a_checkpoint_of_other_ranks_is_refused_by_both_numbers(
    process_group: None, two_ranks: object, tied_model: Path, checkpoints: Path
) -> None:
    kind = DEEPSPEED[0]
    with pytest.raises(ValueError, match="saved with world_size = 2 and this learner has world_size = 1"):
        run(Job(kind, tied_model, load=checkpoints / f"two-{kind}"))


@pytest.mark.engines
@pytest.mark.parametrize(
    ("other", "key"),
    [
        (Kind(2, torch.float32), "zero_stage = 1"),
        (Kind(1, torch.bfloat16), "dtype = torch.float32"),
        (Kind(1, torch.float32, LORA), "lora = None"),
    ],
)
def test_a_checkpoint_of_another_zero_stage_dtype_or_adapter_is_refused(
    other: Kind, key: str, resumed: object, tied_model: Path, checkpoints: Path
) -> None:
    with pytest.raises(ValueError, match=f"saved with {key}"):
        run(Job(other, tied_model, load=checkpoints / f"one-{DEEPSPEED[0]}"))
