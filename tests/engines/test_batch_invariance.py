"""The gradient of a step is one number per weight, however the batch was cut, ordered or spread over ranks.

Read off the weights after one step of plain SGD at a rate so large that they are all gradient: no optimizer state, no
square root and no grain of the weights stands between. Held to the plain learner, which trains each rollout alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpost.core.batching import plan_micro_batches
from rlpost.core.objective import PolicyGradient
from rlpost.core.optimizers import SGD
from tests.engines.learner_jobs import (
    FULL,
    PLAIN,
    SPEC,
    Job,
    Kind,
    Result,
    close,
    make_learner,
    make_rollouts,
    masters,
    run,
    run_in_children,
)

TOLERANCE = 1e-6
"""Relative error of the gradient as one vector, float32 throughout."""
KINDS = [kind for kind in FULL if kind.dtype == torch.float32]
OBJECTIVE = PolicyGradient(truncated="mask", kl_coef=0.1)
"""Rollouts cut at the token limit are left out; all others have a gradient."""
GRADIENT = replace(SPEC, objective=OBJECTIVE, optimizer=SGD(momentum=0.0, max_grad_norm=1e30))
ROWS_AND_TOKENS = {1: 1, 2: 20, 5: 60, 9: 10_000}
"""Most rows in a micro-batch, of the nine that are not truncated, to the token budget that gives it."""
CUTS: dict[str, dict[str, Any]] = {
    **{f"micro-batches-of-{rows}": {"micro_batch_tokens": tokens} for rows, tokens in ROWS_AND_TOKENS.items()},
    "reversed": {"rows": tuple(reversed(range(12)))},
    "shuffled": {"rows": (5, 0, 11, 3, 8, 1, 10, 7, 2, 6, 9, 4), "cuts": (1, 6)},
    "one-call": {"cuts": ()},
    "one-rollout-a-call": {"cuts": tuple(range(1, 12))},
    "gradient-checkpointing": {"gradient_checkpointing": True},
}


def job_of(kind: Kind, model_path: Path, **changes: Any) -> Job:
    """One step; tokens of version 0, the first two of each response, are too old to be trained on."""
    return Job(kind, model_path, num_steps=1, spec=GRADIENT, lr=1e9, max_staleness=0, **changes)


@pytest.fixture(scope="module")
def expected(tied_model: Path) -> Result:
    return run(job_of(PLAIN, tied_model))


def error(result: Result, expected: Result) -> float:
    return float((result.moved - expected.moved).norm() / expected.moved.norm())


def test_the_budgets_give_micro_batches_of_one_two_five_and_all_rows(tied_model: Path) -> None:
    rollouts = [r for r in make_rollouts(tied_model)[0] if r.finish_reason != "length"]
    lengths = [len(r.token_ids) for r in rollouts]
    for rows, tokens in ROWS_AND_TOKENS.items():
        assert max(map(len, plan_micro_batches(lengths, max_tokens=tokens))) == rows


def test_weights_after_the_step_are_all_gradient(expected: Result) -> None:
    """A millionth of the move is more than all weights."""
    assert expected.moved.norm() > 1e6 * torch.cat([w.flatten() for w in expected.before.values()]).norm()
    assert expected.norms[0] == pytest.approx(float(expected.moved.norm()) / 1e9, rel=1e-5)


@pytest.mark.parametrize(
    "change", [{"max_staleness": 1}, {"spec": replace(GRADIENT, objective=PolicyGradient(kl_coef=0.1))}]
)
def test_what_is_masked_or_truncated_would_have_made_a_difference(
    change: dict[str, Any], tied_model: Path, expected: Result
) -> None:
    assert error(run(replace(job_of(PLAIN, tied_model), **change)), expected) > 0.01


@pytest.mark.engines
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_on_one_rank(kind: Kind, tied_model: Path, expected: Result) -> None:
    errors = {name: error(run(job_of(kind, tied_model, **change)), expected) for name, change in CUTS.items()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.engines
def test_on_two_ranks(tied_model: Path, expected: Result) -> None:
    names = ("micro-batches-of-1", "micro-batches-of-5", "micro-batches-of-9", "shuffled", "gradient-checkpointing")
    jobs = {f"{kind} {name}": job_of(kind, tied_model, **CUTS[name]) for kind in KINDS for name in names}
    results = run_in_children(list(jobs.values()), world_size=2)[0]
    errors = {name: error(result, expected) for name, result in zip(jobs, results, strict=True)}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.engines
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_samplers_say_off_the_mask_changes_no_bit(kind: Kind, value: float, tied_model: Path) -> None:
    rollouts, advantages = make_rollouts(tied_model)
    broken = [replace(r, sampler_logprobs=torch.where(r.loss_mask, r.sampler_logprobs, value)) for r in rollouts]
    after = []
    for given in (rollouts, broken):
        learner = make_learner(job_of(kind, tied_model))
        learner.begin_stage(GRADIENT)
        learner.accumulate(given, advantages, learner_version=1, max_staleness=0)
        learner.step(denominator=20.0, lr=1e9)
        after.append(masters(learner))
        close(learner)
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
