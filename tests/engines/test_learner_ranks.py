"""Learners on several ranks, and learners that resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rlpost.core.critic import Critic
from rlpost.core.metrics import Tally
from rlpost.core.objective import PolicyGradient, StageSpec
from rlpost.core.preference import Preference
from tests.engines.learner_checks import (
    CRITIC_LR,
    CRITIC_TOLERANCE,
    OBJECTIVES,
    assembled,
    check_critic,
    check_served,
    error,
    same,
    tolerance_of,
)
from tests.engines.learner_jobs import (
    DEEPSPEED,
    DEEPSPEED_LORA,
    FULL,
    LORA,
    PLAIN,
    PLAIN_LORA,
    SPEC,
    Job,
    Kind,
    Result,
    close,
    make_learner,
    run,
    run_in_children,
)

PAIRED = [*FULL[:3], DEEPSPEED_LORA[2]]
KL_SPEC = replace(SPEC, objective=PolicyGradient(kl_coef=0.5))
CRITIC_KINDS = DEEPSPEED[:4]
"""Every ZeRO stage, and the optimizer that DeepSpeed has for bfloat16."""
SERVED = {
    f"{kind}-serves-{str(dtype)[6:]}{'-beside' if beside else ''}": (kind, dtype, beside)
    for beside, kinds in ((False, (PLAIN, PLAIN_LORA, *DEEPSPEED)), (True, (PLAIN_LORA, *DEEPSPEED_LORA)))
    for kind in kinds
    for dtype in (torch.float32, torch.bfloat16)
}
"""Who serves in which dtype, and whether an adapter is served beside its base."""
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


def served_run(name: str, model_path: Path) -> Job:
    kind, serve_dtype, beside = SERVED[name]
    return Job(kind, model_path, num_steps=2, lr=1.0, serve_dtype=serve_dtype, serve_adapter=beside, watch=True)


def rest_of(job: Job) -> Job:
    return replace(job, num_steps=job.num_steps - job.save_after, load=job.save, save=None, stages_before=0)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most weights have an odd number of entries; the embedding so many (104,065) that ZeRO-3 does not keep it whole."""
    config = LlamaConfig(
        vocab_size=1601,
        hidden_size=65,
        intermediate_size=7,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("odd") / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def two_rank_jobs(tied_model: Path, odd_model: Path, checkpoints: Path) -> dict[str, Job]:
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
    kto = replace(SPEC, objective=OBJECTIVES["kto"])
    unpaired = {f"{kind}-kto": replace(few[f"{kind}-few"], spec=kto) for kind in PAIRED}
    served = {name: served_run(name, odd_model) for name, (kind, *_) in SERVED.items() if kind.zero_stage is not None}
    return jobs | few | paired | unpaired | critic | few_critic | served


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
        *(f"{kind}-{loss}" for kind in PAIRED for loss in ("pairs", "kto")),
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


@pytest.mark.engines
@pytest.mark.parametrize("kind", FULL, ids=str)
def test_masters_are_read_from_a_checkpoint_of_any_number_of_ranks(
    kind: Kind, resumed: dict[str, tuple[Result, Result]], two_ranks: dict[str, list[Result]], checkpoints: Path
) -> None:
    """Under checkpoint names. In bfloat16 they are not the working weights."""
    from rlpost.engines.deepspeed_learner import stored_masters

    for ranks, saved in (("one", resumed[str(kind)][0].saved), ("two", two_ranks[str(kind)][0].saved)):
        found = stored_masters(checkpoints / f"{ranks}-{kind}")
        assert found.keys() - {"lm_head.weight"} == saved.keys()  # tied
        assert all(torch.equal(found[name], master) for name, master in saved.items())
        assert not all(torch.equal(master, master.bfloat16().float()) for master in found.values())


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
@pytest.mark.parametrize("name", [name for name, (kind, *_) in SERVED.items() if kind.zero_stage is not None])
def test_the_sections_of_two_ranks_are_the_weights(name: str, two_ranks: dict[str, list[Result]]) -> None:
    check_served(two_ranks[name])


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if kind.zero_stage is None else pytest.mark.engines) for n, (kind, *_) in SERVED.items()],
)
def test_the_sections_of_one_rank_are_the_weights(name: str, odd_model: Path, request: pytest.FixtureRequest) -> None:
    job = served_run(name, odd_model)
    if job.kind.zero_stage is not None:
        request.getfixturevalue("process_group")
    result = run(job)
    check_served([result])
    beside = [len(version.readings) > 1 for version in result.served]
    reads_alone = job.kind.zero_stage is None or job.kind.lora is None or job.serve_adapter
    assert beside == [reads_alone, reads_alone, False]


@pytest.mark.engines
@pytest.mark.parametrize("num_ranks", [1, 3, 7])
def test_sections_of_many_ranks_leave_out_what_has_no_entry(
    num_ranks: int, process_group: None, odd_model: Path
) -> None:
    """Under ZeRO-1 a rank reads its sections from weights that it has whole, so one can be asked for all."""
    learner = make_learner(Job(DEEPSPEED[0], odd_model))
    learner._scorer.policy.few = nn.Parameter(torch.arange(2.0))
    learner._scorer.policy.scalar = nn.Parameter(torch.tensor(3.0))
    learner._scorer.policy.none = nn.Parameter(torch.empty(0, 5))
    sections = []
    for rank in range(num_ranks):
        learner._rank, learner._world_size = rank, num_ranks
        sections += learner.sections()
    assert same(assembled(sections), learner.weights())
    assert [len(s.values_N) for s in sections if s.name in ("few", "scalar", "none")].count(0) == 1
    close(learner)


@pytest.mark.engines
@pytest.mark.parametrize("kind", FULL, ids=str)
def test_sections_in_the_learners_dtype_are_views_of_what_a_step_writes(
    kind: Kind, process_group: None, odd_model: Path
) -> None:
    learner = make_learner(Job(kind, odd_model))
    live = [getattr(p, "ds_tensor", p) for p in learner._scorer.policy.parameters()]
    read = [section.values_N for section in learner.sections()]
    assert [t.data_ptr() for t in read] == [t.data_ptr() for t in live]
    close(learner)


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
