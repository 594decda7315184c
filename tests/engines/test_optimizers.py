"""The optimizers' steps by hand, and DeepSpeed's sharded ones against the plain learner's, on one rank and two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlpost.core.optimizers import SGD, AdamW, Lion, OptimizerSpec
from rlpost.engines.optimizers import apply_settings, make_optimizer
from tests.engines.learner_jobs import FULL, PLAIN, SPEC, Job, Kind, Result, run, run_in_children


def take_steps(
    spec: OptimizerSpec, start: list[float], gradients: list[list[float]], *, lr: float
) -> list[list[float]]:
    """The weights after each step."""
    weight = torch.tensor(start, requires_grad=True)
    optimizer, decay = make_optimizer([weight], type(spec))
    apply_settings(spec, optimizer, decay)
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
