"""Training a subnetwork: what is frozen keeps every bit, what is allowed moves as it should, under every sharding."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from rlpost.analysis.mask import write_mask
from rlpost.core.optimizers import SGD, AdamW, Lion, OptimizerSpec
from rlpost.core.subnetwork import (
    Control,
    FileEntries,
    PrincipalEntries,
    RandomEntries,
    Subnetwork,
    UpdatedEntries,
    random_mask,
)
from rlpost.engines.mask_file import write_masks
from rlpost.engines.plain_learner import PlainLearner
from rlpost.engines.pretrained import save_pretrained
from rlpost.engines.subnetwork import hold_gradients
from tests.engines.learner_jobs import (
    FULL,
    PLAIN,
    SPEC,
    Job,
    Kind,
    Result,
    close,
    free_port,
    learner_optimizer,
    make_learner,
    masters,
    num_state,
    run,
    run_in_children,
    train,
)

THIRD = RandomEntries(density=0.3, seed=4)
deepspeed_kinds = [pytest.param(kind, id=str(kind), marks=pytest.mark.engines) for kind in FULL]
kinds = [pytest.param(PLAIN, id="plain"), *deepspeed_kinds]


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param.zero_stage is not None and not torch.distributed.is_initialized():
        from rlpost.engines.deepspeed_learner import init_distributed

        init_distributed(rank=0, world_size=1, master_port=free_port())
    return request.param


@pytest.fixture
def make(kind: Kind) -> Iterator[Callable[[Job], Any]]:
    made: list[Any] = []

    def make(job: Job) -> Any:
        made.append(make_learner(job))
        return made[-1]

    yield make
    for learner in made:
        close(learner)


def random_masks(weights: Mapping[str, Tensor], choice: RandomEntries = THIRD) -> dict[str, Tensor]:
    return {
        name: random_mask(w.shape, count=round(choice.density * w.numel()), seed=choice.seed, name=name)
        for name, w in weights.items()
    }


def moved_entries(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where any bit differs: comparing floats would take -0 for 0."""
    return {name: before[name].view(torch.int32) != after[name].view(torch.int32) for name in before}


# -- the plain learner, from first principles --------------------------------------------------------------------------


def test_the_norm_and_the_clip_are_those_of_the_gradient_that_is_used(tied_model: Path) -> None:
    """SGD without momentum, decay 0.1: the whole gradient from an unclipped step without a mask, then by hand g x mask,
    its norm, the clip to half of that, and the update."""
    lr, free = 1.0, SGD(momentum=0.0, max_grad_norm=1e9)
    whole = run(Job(PLAIN, tied_model, num_steps=1, spec=replace(SPEC, optimizer=free), lr=lr))
    masks = random_masks(whole.before)
    gradients = {name: (whole.before[name] - whole.masters[name]) * masks[name] / lr for name in masks}
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    assert norm < 0.8 * whole.norms[0]

    optimizer = SGD(momentum=0.0, max_grad_norm=norm / 2, weight_decay=0.1)
    spec = replace(SPEC, optimizer=optimizer, subnetwork=THIRD)
    result = run(Job(PLAIN, tied_model, num_steps=1, spec=spec, lr=lr))
    assert result.norms == pytest.approx([norm], rel=1e-4)
    for name, weight in result.before.items():
        expected = torch.where(masks[name], weight * 0.9 - gradients[name] / 2, weight)
        torch.testing.assert_close(result.masters[name], expected, rtol=1e-5, atol=2e-7)


# -- under every sharding ----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": AdamW(eps=1.0, weight_decay=0.1, max_grad_norm=0.5),
    "lion": Lion(weight_decay=0.1),
    "sgd": SGD(weight_decay=0.1, max_grad_norm=0.5),
}
MOMENTS = {AdamW: 2, Lion: 1, SGD: 1}
LR = {"adamw": 1e-2, "lion": 1e-6, "sgd": 1e-3}
CASES = [(kind, "sgd" if kind.zero_stage == 2 else "adamw") for kind in FULL]


def job_of(kind: Kind, name: str, model_path: Path, subnetwork: Subnetwork | None = THIRD) -> Job:
    spec = replace(SPEC, optimizer=OPTIMIZERS[name], subnetwork=subnetwork)
    return Job(kind, model_path, num_steps=5, spec=spec, lr=LR[name])


def num_entries(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def check_frozen_and_moved(result: Result, job: Job, expected: Result) -> None:
    masks = random_masks(result.before)
    moved = moved_entries(result.before, result.masters)
    assert not any((moved[name] & ~masks[name]).any() for name in masks)
    # Decay moves what is not 0; a few come back to the bit.
    allowed = torch.cat([moved[name][masks[name] & (result.before[name] != 0)] for name in masks])
    assert allowed.float().mean() > 0.99
    assert all(torch.equal(result.weights[name], m.to(job.kind.dtype)) for name, m in result.masters.items())
    precise = job.kind.dtype == torch.float32
    difference = result.moved - expected.moved
    if isinstance(job.spec.optimizer, Lion):  # the sign of a gradient near 0 is rounding's
        assert (difference.abs() > 0.5 * job.lr).float().mean() < (1e-3 if precise else 0.1)
    else:
        assert difference.norm() / expected.moved.norm() < (2e-4 if precise else 0.04)
    # Served in bfloat16, the policy does not follow every small move of its masters, so later gradients differ.
    compared = slice(None) if precise else slice(1)
    assert result.norms[compared] == pytest.approx(expected.norms[compared], rel=2e-4 if precise else 0.04)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_frozen_entries_keep_every_bit_and_the_others_take_the_plain_learners_steps(
    kind: Kind, name: str, tied_model: Path
) -> None:
    job = job_of(kind, name, tied_model)
    result = run(job)
    check_frozen_and_moved(result, job, run(replace(job, kind=PLAIN)))
    assert result.num_state == MOMENTS[type(job.spec.optimizer)] * num_entries(random_masks(result.before))


@pytest.mark.engines
@pytest.mark.parametrize("world_size", [2, 3])
def test_so_they_do_when_several_ranks_cut_the_weights_anywhere(tied_model: Path, world_size: int) -> None:
    """Three ranks divide no weight of this model evenly: every one is padded."""
    cases = CASES if world_size == 2 else [case for case in CASES if case[0].zero_stage != 2]
    jobs = [job_of(kind, name, tied_model) for kind, name in cases]
    for job, *ranks in zip(jobs, *run_in_children(jobs, world_size=world_size), strict=True):
        for result in ranks:
            check_frozen_and_moved(result, job, run(replace(job, kind=PLAIN)))
        numbers = MOMENTS[type(job.spec.optimizer)] * num_entries(random_masks(ranks[0].before))
        assert sum(result.num_state for result in ranks) == numbers
        assert max(result.num_state for result in ranks) < 1.05 * numbers / world_size


@pytest.mark.engines
def test_two_ranks_resume_exactly(tied_model: Path, tmp_path: Path) -> None:
    """In fresh processes; each of DeepSpeed's three optimizers writes and reads state of its own size."""
    cases = [case for case in CASES if (case[0].zero_stage == 1) == (case[0].dtype == torch.bfloat16)]
    jobs = [replace(job_of(kind, name, tied_model), num_steps=3, save=tmp_path / str(kind)) for kind, name in cases]
    wholes = run_in_children(jobs, world_size=2)
    rests = run_in_children([replace(job, num_steps=1, load=job.save, save=None) for job in jobs], world_size=2)
    for whole, rest in zip(chain(*wholes), chain(*rests), strict=True):
        assert rest.norms == whole.norms[2:] and rest.num_state == whole.num_state > 0
        assert all(torch.equal(rest.before[name], saved) for name, saved in whole.saved.items())
        assert all(torch.equal(rest.masters[name], master) for name, master in whole.masters.items())
        assert any(not torch.equal(whole.saved[name], master) for name, master in whole.masters.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_its_steps_are_those_of_state_for_all_entries(
    kind: Kind, name: str, make: Callable[[Job], Any], tied_model: Path
) -> None:
    """To the bit: a stage that trains all entries, on gradients that are 0 off the masks. Only its decay would differ."""
    job = job_of(kind, name, tied_model)
    job = replace(job, spec=replace(job.spec, optimizer=replace(job.spec.optimizer, weight_decay=0.0)))
    ours, full = make(job), make(job)
    ours.begin_stage(job.spec)
    full.begin_stage(replace(job.spec, subnetwork=None))
    masks = random_masks(masters(ours))
    hold_gradients(dict(full._scorer.policy.named_parameters()), masks)
    for _ in range(4):
        assert train(ours, job).grad_norm == train(full, job).grad_norm
    expected = masters(full)
    assert not any(moved_entries(expected, masters(ours))[name].any() for name in expected)
    numbers = MOMENTS[type(job.spec.optimizer)]
    assert num_state(learner_optimizer(ours)) == numbers * num_entries(masks)
    assert num_state(learner_optimizer(full)) >= numbers * sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("first", [None, THIRD], ids=["all", "subnetwork"])
@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_stage_leaves_nothing_of_its_state_to_the_next(
    kind: Kind, first: Subnetwork | None, make: Callable[[Job], Any], tied_model: Path
) -> None:
    """Not in the steps: after a stage at lr 0, which moves nothing, a stage of the other sort is what it is alone. Not in
    memory either."""
    second = THIRD if first is None else None
    job = job_of(kind, "adamw", tied_model, second)
    fresh = make(job)
    fresh.begin_stage(job.spec)
    train(fresh, job)
    expected = masters(fresh)

    learner = make(job)
    learner.begin_stage(replace(job.spec, subnetwork=first))
    train(learner, replace(job, lr=0.0))
    state = learner_optimizer(learner).state
    held = [StorageWeakRef(tensor.untyped_storage()) for of in state.values() for tensor in of.values()]
    assert held
    del state
    learner.begin_stage(job.spec)
    gc.collect()
    assert all(storage.expired() for storage in held)
    train(learner, job)
    assert not any(moved.any() for moved in moved_entries(expected, masters(learner)).values())


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_the_next_stage_trains_what_it_says_and_no_more(
    kind: Kind, make: Callable[[Job], Any], tied_model: Path
) -> None:
    """All, then a subnetwork (no momentum of the first stage may move the rest), then all again."""
    job = job_of(kind, "adamw", tied_model)
    learner, shares = make(job), []
    for subnetwork in (None, THIRD, None):
        coverage = learner.begin_stage(replace(job.spec, subnetwork=subnetwork))
        assert bool(coverage) == (subnetwork is not None)
        before = masters(learner)
        train(learner, job)
        moved = moved_entries(before, masters(learner))
        shares.append(sum(int(m.sum()) for m in moved.values()) / sum(m.numel() for m in moved.values()))
    # Fresh biases are 0: decay does not move them, and some have no gradient.
    assert shares[0] > 0.9 and 0.25 < shares[1] <= 0.301 and shares[2] > 0.9


@pytest.mark.parametrize("kind", kinds, indirect=True)
def test_a_resume_trains_the_entries_that_were_chosen_when_the_stage_began(
    kind: Kind, make: Callable[[Job], Any], tied_model: Path, tmp_path: Path
) -> None:
    """Principal entries of the weights after a stage that moved them far; the resuming learner begins from others."""
    job = job_of(kind, "adamw", tied_model, PrincipalEntries(rank=4, density=0.2))
    learner = make(job)
    learner.begin_stage(replace(job.spec, subnetwork=None))
    train(learner, replace(job, lr=3.0))
    learner.begin_stage(job.spec)
    start = masters(learner)
    train(learner, job)
    learner.save(tmp_path / "checkpoint")
    train(learner, job)

    resumed = make(job)
    resumed.begin_stage(job.spec)
    resumed.load(tmp_path / "checkpoint")
    train(resumed, job)
    ours, theirs = masters(resumed), masters(learner)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = make(job)
    other.begin_stage(job.spec)
    before = masters(other)
    train(other, job)
    chosen, fresh = moved_entries(start, theirs), moved_entries(before, masters(other))
    assert any((chosen[name] != fresh[name]).any() for name in chosen)


# -- which entries -----------------------------------------------------------------------------------------------------


def coverage_of(model_path: Path, subnetwork: Subnetwork) -> tuple[Mapping[str, tuple[int, int]], dict[str, Tensor]]:
    learner = PlainLearner(model_path, serve_dtype=torch.bfloat16)
    coverage = learner.begin_stage(replace(SPEC, subnetwork=subnetwork))
    return coverage, dict(learner._masks)


@pytest.fixture
def updated_model(tied_model: Path, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A model directory with some entries changed enough to be served otherwise, and where."""
    weights = load_file(tied_model / "model.safetensors")
    masks = random_masks(weights)
    changed = {name: torch.where(masks[name], w + 0.25, w * (1 + 1e-5)) for name, w in weights.items()}
    save_pretrained(changed, tied_model, tmp_path / "updated")
    return tmp_path / "updated", masks


def test_updated_entries_are_those_whose_served_bytes_changed(
    tied_model: Path, updated_model: tuple[Path, dict[str, Tensor]]
) -> None:
    """The others changed as well, but hardly any by enough to round to another bfloat16."""
    after, expected = updated_model
    choice = UpdatedEntries(before=str(tied_model), after=str(after))
    coverage, masks = coverage_of(tied_model, choice)
    assert all(masks[name][mask].all() for name, mask in expected.items())
    extra = sum(int((masks[name] & ~mask).sum()) for name, mask in expected.items())
    assert extra < 0.01 * sum(mask.numel() for mask in expected.values())
    assert coverage == {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    for control in ("random", "complement"):
        sizes, others = coverage_of(tied_model, replace(choice, control=control))
        assert sizes == coverage
        assert any((others[name] != mask).any() for name, mask in masks.items())
    assert not any((others[name] & mask).any() for name, mask in masks.items())  # of the complement


@pytest.mark.parametrize("control", [None, "complement"])
def test_a_stage_on_the_file_of_an_update_is_the_stage_on_the_update(
    control: Control | None, tied_model: Path, updated_model: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """To the bit, of every weight and every optimizer step."""
    before, after, file = str(tied_model), str(updated_model[0]), tmp_path / "mask.safetensors"
    write_mask(before, after, file)
    update = UpdatedEntries(before=before, after=after, control=control, seed=7)
    job = replace(job_of(PLAIN, "adamw", tied_model, update), serve_dtype=torch.bfloat16)
    listed = replace(job, spec=replace(job.spec, subnetwork=FileEntries(path=str(file), control=control, seed=7)))
    expected, result = run(job), run(listed)
    assert result.norms == expected.norms and result.num_state == expected.num_state > 0
    assert not any(moved.any() for moved in moved_entries(expected.masters, result.masters).values())
    assert any(moved.any() for moved in moved_entries(expected.before, expected.masters).values())


def test_principal_entries_are_of_linear_layers_and_not_of_the_output_layer(tiny_model: Path) -> None:
    coverage, _ = coverage_of(tiny_model, PrincipalEntries(rank=2, density=0.25))
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, weight in policy.named_parameters():
        linear = "_proj" in name and weight.ndim == 2
        assert coverage[name] == (round(0.25 * weight.numel()) if linear else 0, weight.numel())
    assert "lm_head.weight" in coverage


def test_a_subnetwork_that_cannot_be_trained_is_refused(tied_model: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="selects no entry"):
        coverage_of(tied_model, UpdatedEntries(before=str(tied_model), after=str(tied_model)))
    with pytest.raises(ValueError, match=r"is of shape .* and of .* in the policy"):
        policy = AutoModelForCausalLM.from_pretrained(tied_model)
        wider = {name: torch.zeros(*p.shape, 2) for name, p in policy.named_parameters()}
        shutil.copytree(tied_model, tmp_path / "source")
        save_pretrained(wider, tmp_path / "source", tmp_path / "wider")
        coverage_of(tied_model, UpdatedEntries(before=str(tied_model), after=str(tmp_path / "wider")))
    with pytest.raises(ValueError, match="holds no weight"):
        coverage_of(tiny_model, UpdatedEntries(before=str(tiny_model), after=str(tmp_path)))
    write_masks({"model.norm.weight": torch.Size([3])}, lambda _: torch.ones(3) > 0, tmp_path / "mask", provenance={})
    with pytest.raises(ValueError, match=r"mask holds no mask of model.embed_tokens.weight, which is of"):
        coverage_of(tied_model, FileEntries(path=str(tmp_path / "mask")))
