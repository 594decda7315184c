"""What every `LearnerEngine` computes: the plain one against a dense formula, DeepSpeed against the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlpost.core.objective import Objective, PolicyGradient
from rlpost.core.optimizers import AdamW
from rlpost.core.preference import Preference
from rlpost.engines.base import LearnerEngine
from rlpost.engines.plain_learner import PlainLearner
from rlpost.types import Rollout, VersionSpan
from tests.engines.learner_checks import (
    CRITIC_TOLERANCE,
    OBJECTIVES,
    check_critic,
    deepspeed_kinds,
    error,
    kinds,
    same,
    tolerance_of,
)
from tests.engines.learner_jobs import (
    LINEAR,
    PLAIN,
    SPEC,
    Job,
    Kind,
    alone,
    check_first_ratio,
    dense_logprobs,
    make_rollouts,
    run,
)


def gradients_of(policy: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def norm_of(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()


# -- the plain learner, from first principles --------------------------------------------------------------------------


def test_the_plain_learner_takes_the_step_of_the_dense_formula(tied_model: Path) -> None:
    """Gradient of -sum min(r A, clip(r) A) / D over dense log-softmax tables, clipped to norm 0.01; then AdamW's first
    step, w - lr (g / (|g| + eps) + decay w), since both of its moments are then the gradient's own."""
    policy = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
    rollouts, advantages = make_rollouts(tied_model)
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        table = torch.log_softmax(policy(rollout.token_ids[None]).logits[0, :-1] / rollout.temperature, -1)
        logprobs = table.gather(-1, rollout.token_ids[1:, None])[:, 0][rollout.loss_mask[1:]]
        ratios = (logprobs - rollout.sampler_logprobs[rollout.loss_mask]).exp()
        surrogate = torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.28) * advantage)
        (-surrogate.sum() / 20.0).backward()
    gradients = gradients_of(policy)
    norm = norm_of(gradients)
    optimizer = AdamW(eps=0.1, weight_decay=0.01, max_grad_norm=0.01)

    result = run(Job(PLAIN, tied_model, num_steps=1, spec=replace(SPEC, optimizer=optimizer), lr=0.5))

    assert result.norms == pytest.approx([float(norm)], rel=1e-5)
    for name, p in policy.named_parameters():
        gradient = gradients[name] * 0.01 / norm
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
            logprobs = learner._scorer(*alone(rollout))[0][0]
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
    norms: list[float] = []
    for _ in range(2):
        policy = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float32)
        policy.load_state_dict(dict(learner.weights()), strict=False)
        policies.append(policy)
        norms.clear()
        for proximal in policies:
            policy.zero_grad()
            for rollout, advantage in zip(rollouts, advantages, strict=True):
                table = torch.log_softmax(policy(rollout.token_ids[None]).logits[0, :-1] / rollout.temperature, -1)
                logprobs = table.gather(-1, rollout.token_ids[1:, None])[:, 0]
                frozen = dense_logprobs(proximal, rollout.token_ids, rollout.temperature) - rollout.sampler_logprobs
                weights = frozen.exp().clamp(max=1.5)[1:]
                (-(weights * advantage * logprobs)[rollout.loss_mask[1:]].sum() / 20.0).backward()
            norms.append(float(norm_of(gradients_of(policy))))
        for start, end in ((0, 1), (1, 5), (5, 12)):
            learner.accumulate(rollouts[start:end], advantages[start:end], learner_version=1, max_staleness=1)
        assert learner.step(denominator=20.0, lr=0.2).grad_norm == pytest.approx(norms[-1], rel=1e-5)
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)


# -- DeepSpeed against the plain learner -------------------------------------------------------------------------------


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
    logprobs = dense_logprobs(policy, rollout.token_ids, rollout.temperature)
    on_policy = torch.where(rollout.loss_mask, logprobs, 0.0)
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
        sampler_logprobs=torch.where(mask, dense_logprobs(policy, token_ids, 0.9), 0.0),
        temperature=0.9,
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
