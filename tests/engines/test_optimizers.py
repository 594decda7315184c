"""The optimizers' steps by hand, and DeepSpeed's sharded ones against the plain learner's, on one rank and two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlpost.core.optimizers import SGD, AdamW, Lion, OptimizerSpec
from rlpost.engines.optimizers import apply_settings, make_optimizer
from tests.engines.learner_jobs import FULL, PLAIN, SPEC, Job, Kind, Result, num_state, run, run_in_children


def take_steps(
    spec: OptimizerSpec, start: list[float], gradients: list[list[float]], *, lr: float
) -> list[list[float]]:
    """The weights after each step."""
    weight = torch.tensor(start, requires_grad=True)
    optimizer, entries = make_optimizer([weight], type(spec))
    apply_settings(spec, optimizer, entries)
    after = []
    for gradient in gradients:
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        after.append(weight.tolist())
    return after


def test_two_steps_of_lion_by_hand() -> None:
    """Decay leaves 0.95. Step 1: m = 0, so the update is the gradient's sign; then m = 0.01 g = (0.01, -0.02, 0).
    Step 2: 0.9 m + 0.1 g = (0.009 - 0.005, -0.018 + 0.3, 0): momentum outweighs the first gradient, not the second. An
    entry without gradient only decays."""
    spec = Lion(weight_decay=0.5)
    first, second = take_steps(spec, [1.0, 1.0, 1.0], [[1.0, -2.0, 0.0], [-0.05, 3.0, 0.0]], lr=0.1)
    assert first == pytest.approx([0.95 - 0.1, 0.95 + 0.1, 0.95])
    assert second == pytest.approx([0.85 * 0.95 - 0.1, 1.05 * 0.95 - 0.1, 0.95 * 0.95])


def test_lion_remembers_by_its_second_beta() -> None:
    """m = 0.01 x 100 = 1 after the first step, and 0.9 m outweighs 0.1 x 8; 0.91 after the second, and 0.9 m does not
    outweigh 0.1 x 9. With 0.999, DeepSpeed's default, m is a tenth of that and the second step turns already."""
    gradients = [[100.0], [-8.0], [-9.0]]
    after = take_steps(Lion(), [0.0], gradients, lr=1.0)
    assert after == [[-1.0], [-2.0], [-1.0]]
    assert take_steps(Lion(betas=(0.9, 0.999)), [0.0], gradients, lr=1.0) == [[-1.0], [0.0], [1.0]]


def test_two_steps_of_sgd_by_hand() -> None:
    """m = 2, then 0.5 x 2 - 1 = 0: the second step only decays. Decay is not part of m."""
    spec = SGD(momentum=0.5, weight_decay=0.5)
    first, second = take_steps(spec, [1.0], [[2.0], [-1.0]], lr=0.1)
    assert first == pytest.approx([0.95 - 0.1 * 2.0])
    assert second == pytest.approx([0.75 * 0.95])


def test_two_steps_of_adamw_by_hand() -> None:
    """First step: the gradient's sign, for both moments are the gradient's own. Second:
    m = (0.9 x 0.2 - 0.1) / 0.19, v = (0.99 x 0.04 + 0.01) / 0.0199."""
    spec = AdamW(betas=(0.9, 0.99), eps=0.0, weight_decay=0.5)
    first, second = take_steps(spec, [1.0], [[2.0], [-1.0]], lr=0.1)
    assert first == pytest.approx([0.95 - 0.1])
    update = (0.08 / 0.19) / (0.0496 / 0.0199) ** 0.5
    assert second == pytest.approx([0.85 * 0.95 - 0.1 * update])


# -- a mask ------------------------------------------------------------------------------------------------------------

MASKED: dict[str, tuple[OptimizerSpec, int]] = {
    "adamw": (AdamW(weight_decay=0.1), 2),
    "lion": (Lion(weight_decay=0.1), 1),
    "sgd": (SGD(weight_decay=0.1), 1),
    "sgd-without-momentum": (SGD(momentum=0.0, weight_decay=0.1), 0),
}
"""Settings, and how many numbers of state they take for an entry."""


def optimize(
    spec: OptimizerSpec, master_MN: Tensor, mask_MN: Tensor | None, state: dict[str, Any] | None = None
) -> Callable[[Tensor], torch.optim.Optimizer]:
    """step(gradient_MN), from the beginning or from a saved state."""
    master_MN.requires_grad_()
    optimizer, entries = make_optimizer([master_MN], type(spec))
    if mask_MN is not None:
        entries.masks = {master_MN: mask_MN}
    if state is not None:
        optimizer.load_state_dict(state)
    apply_settings(spec, optimizer, entries)
    optimizer.param_groups[0]["lr"] = 0.01

    def step(gradient_MN: Tensor) -> torch.optim.Optimizer:
        master_MN.grad = gradient_MN
        optimizer.step()
        return optimizer

    return step


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_leaves_a_step_its_entries_alone(name: str) -> None:
    """Against state for all entries, gradients that are 0 off the mask, and a restored weight there. What is outside
    keeps its bits, whatever they are and whatever its gradient. After three steps another optimizer goes on from a copy
    of the state."""
    spec, numbers = MASKED[name]
    torch.manual_seed(0)
    mask_MN = torch.randn(10, 20) > 0.5
    start_MN = torch.where(mask_MN, torch.randn(10, 20), torch.tensor([torch.nan, -0.0, torch.inf, 1e-40, 2.0] * 4))
    ours_MN, reference_MN = start_MN.clone(), start_MN.clone()
    ours, reference = optimize(spec, ours_MN, mask_MN), optimize(spec, reference_MN, None)
    for step, gradient_MN in enumerate(torch.randn(6, 10, 20)):
        optimizer = ours(torch.where(mask_MN, gradient_MN, torch.nan))
        reference(torch.where(mask_MN, gradient_MN, 0.0))
        with torch.no_grad():
            reference_MN.copy_(torch.where(mask_MN, reference_MN, start_MN))
        assert torch.equal(ours_MN.view(torch.int32), reference_MN.view(torch.int32))
        assert num_state(optimizer) == numbers * int(mask_MN.sum())
        assert optimizer.param_groups[0]["params"] == [ours_MN] and set(optimizer.state) <= {ours_MN}
        if step == 2:
            ours = optimize(spec, ours_MN, mask_MN, copy.deepcopy(optimizer.state_dict()))
    assert (ours_MN - start_MN)[mask_MN].abs().min() > 0


# -- DeepSpeed ---------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "lion": Lion(weight_decay=0.1, max_grad_norm=0.1),
    "sgd": SGD(weight_decay=0.1, max_grad_norm=1e9),
    "sgd-without-momentum": SGD(momentum=0.0, max_grad_norm=0.1),
}
KINDS = [kind for kind in FULL if kind.dtype == torch.float32 or kind.zero_stage == 1]
"""In bfloat16, ZeRO-1 has an optimizer of its own; 2 and 3 share theirs with float32."""
CASES = [(kind, name) for kind in KINDS for name in OPTIMIZERS]
LR = {"lion": 1e-6, "sgd": 1e-5, "sgd-without-momentum": 1e-2}


def job_of(kind: Kind, name: str, model_path: Path) -> Job:
    """Four steps. Moves are small: a token that crossed a clip by rounding would turn the gradient elsewhere."""
    return Job(kind, model_path, num_steps=4, spec=replace(SPEC, optimizer=OPTIMIZERS[name]), lr=LR[name])


@pytest.fixture(scope="module")
def sharded(tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Kind, str], list[Result]]:
    """Whole runs on two ranks that write a checkpoint after two steps, then the rest of each in fresh processes: results
    of (whole, rest) on rank 0, then on rank 1."""
    root = tmp_path_factory.mktemp("checkpoints")
    jobs = [replace(job_of(kind, name, tied_model), save=root / f"{kind}-{name}") for kind, name in CASES]
    wholes = run_in_children(jobs, world_size=2)
    rests = run_in_children([replace(j, num_steps=2, load=j.save, save=None) for j in jobs], world_size=2)
    return {
        case: [results[i] for pair in zip(wholes, rests, strict=True) for results in pair]
        for i, case in enumerate(CASES)
    }


@pytest.mark.engines
@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: str(value))
def test_two_ranks_take_the_steps_of_the_plain_learner(
    sharded: dict[tuple[Kind, str], list[Result]], kind: Kind, name: str, tied_model: Path
) -> None:
    """Lion moves an entry by its gradient's sign alone, so entries whose gradient is within rounding of 0 may go the
    other way: few do."""
    whole, expected = sharded[kind, name][0], run(job_of(PLAIN, name, tied_model))
    precise = kind.dtype == torch.float32
    difference = whole.moved - expected.moved
    if name == "lion":
        assert (difference.abs() > 0.5 * LR["lion"]).float().mean() < (1e-3 if precise else 0.1)
    else:
        assert difference.norm() / expected.moved.norm() < (2e-4 if precise else 0.04)
    assert whole.norms == pytest.approx(expected.norms, rel=2e-4 if precise else 0.04)


@pytest.mark.engines
@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: str(value))
def test_a_resume_is_exact(sharded: dict[tuple[Kind, str], list[Result]], kind: Kind, name: str) -> None:
    for whole, rest in (sharded[kind, name][:2], sharded[kind, name][2:]):
        assert rest.norms == whole.norms[2:]
        assert all(torch.equal(rest.before[n], saved) for n, saved in whole.saved.items())
        assert all(torch.equal(rest.masters[n], master) for n, master in whole.masters.items())
        assert any(not torch.equal(whole.saved[n], master) for n, master in whole.masters.items())
