"""Changes and complete versions through a whole run: the same learning, and no wrong version whatever goes wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpost.analysis.live import ObservedStage, VersionObserver
from rlpost.analysis.measure import analyze
from rlpost.archive import VERSIONS, VersionArchive
from rlpost.core.patch import UpdateRefused
from rlpost.core.sparsity import pooled
from rlpost.core.weights import checksum
from rlpost.engines.lora_layers import LoraSpec
from rlpost.engines.plain_sampler import PlainSampler
from rlpost.pipeline.evaluation import EvalSet
from rlpost.pipeline.fleet import Limits
from rlpost.pipeline.ports import WorkerLost
from rlpost.workers.local import LocalSampler
from tests.pipeline.conftest import PROMPTS, Run, make_stage

MakeRun = Callable[..., Run]


class Watched:
    """A sampler that notes what it was sent, and that a test can make go wrong."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.name = inner, inner.name
        self.sent: list[tuple[int | None, int]] = []

    async def sample(self, request: Any) -> Any:
        return await self.inner.sample(request)

    async def held(self) -> int | None:
        return await self.inner.held()

    async def update(self, export: Any) -> int:
        self.sent.append((export.base, export.version))
        return await self.inner.update(export)

    async def seconds(self) -> Any:
        return await self.inner.seconds()


def watch(make_run: MakeRun, kind: type[Watched] = Watched, **settings: Any) -> tuple[Run, list[Any]]:
    watched: list[Any] = []

    def wrap(sampler: Any) -> Watched:
        watched.append(kind(sampler))
        return watched[-1]

    return make_run([make_stage(staleness=1, steps=5)], wrap_sampler=wrap, **settings), watched


def test_after_the_first_version_only_changes_are_sent_and_the_run_is_that_of_complete_ones(make_run: MakeRun) -> None:
    stage = make_stage(staleness=0, steps=4)
    changes, complete = make_run([stage]), make_run([stage], publish_changes=False)
    assert changes.start().digest == complete.start().digest and changes.losses() == complete.losses()
    bytes_of_changes, bytes_of_all = (
        [row["publish/bytes"] / row["publish/full_bytes"] for row in run.tracker.of("step")]
        for run in (changes, complete)
    )
    assert set(bytes_of_all) == {1.0} and bytes_of_changes[0] == 1.0 and max(bytes_of_changes[1:]) < 1.0
    run, (sampler,) = watch(make_run)
    run.start()
    assert sampler.sent == [(None, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_n_steps_learn_from_groups_of_one_version(make_run: MakeRun) -> None:
    """N = 3 and S = 2, stages of 7 and 3 steps, the second one behind the first's seventh, its last and alone in its batch."""
    stages = [make_stage("a", staleness=2, steps=7), make_stage("b", staleness=2, steps=3)]
    watched: list[Any] = []

    def wrap(sampler: Any) -> Watched:
        watched.append(Watched(sampler))
        return watched[-1]

    run = make_run(stages, wrap_sampler=wrap, publish_every=3, log_groups=3).start()
    assert watched[0].sent == [(None, 0), (0, 3), (3, 6), (6, 7), (7, 10)]
    rows = run.tracker.of("step")[:7]
    for row in rows:
        age = (row["step"] - 1) % 3
        assert row[f"staleness/groups_age_{age}"] == 3 and row["staleness/group_mean"] == age
        assert row[f"staleness/token_share_age_{age}"] == 1.0
    drawn = {(row["step"], *(v for v, *_ in row["versions"])) for row in run.tracker.of("rollout") if row["step"] <= 7}
    assert drawn == {(1, 0), (2, 0), (3, 0), (4, 3), (5, 3), (6, 3), (7, 6)}


def test_the_first_of_n_steps_is_that_of_a_synchronous_run_and_the_others_go_on_from_it(make_run: MakeRun) -> None:
    """So that the first step of a batch is on-policy, and no other is: its ratios are 1 up to rounding."""
    run = make_run([make_stage(staleness=1, steps=4, lr=1e-2)], publish_every=2).start()
    synchronous = make_run([make_stage(staleness=0, steps=1, lr=1e-2)]).start()
    assert run.losses()[0] == synchronous.losses()[0]
    gaps = [row["mismatch/logprob_gap_mean"] for row in run.tracker.of("step")]
    assert max(gaps[0::2]) < 1e-5 and min(gaps[1::2]) > 1e-3


def test_an_adapter_beside_its_base_learns_what_a_merged_one_does_at_a_fraction_of_the_bytes(make_run: MakeRun) -> None:
    """Two stages, the second on the base that the first one's adapter is merged into. W x + s B (A x) and (W + s B A) x differ in
    the last bits of float32: the same tokens are drawn, and their log-probs, losses and gradients differ in as little."""
    stages = [make_stage(name, staleness=0, steps=4, lr=1e-2) for name in ("one", "two")]
    lora = LoraSpec(rank=4, alpha=8.0)
    merged, beside = (
        make_run(stages, lora=lora, serve_adapter=serve_adapter, log_groups=3).start()
        for serve_adapter in (False, True)
    )
    texts = [[row["response"] for row in run.tracker.of("rollout")] for run in (merged, beside)]
    assert texts[0] == texts[1] and len(texts[0]) == 2 * 4 * 3 * 4
    for ours, theirs in zip(beside.losses(), merged.losses(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    ours, theirs = beside.learner.weights(), merged.learner.weights()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)
    cost, whole = (
        {row["publish/version"]: row["publish/bytes"] for row in run.tracker.of("step")} for run in (beside, merged)
    )
    assert cost.keys() == whole.keys() and {2, 3, 4, 5, 6, 7} <= cost.keys()
    assert all((cost[version] < whole[version] / 5) == (version != 5) for version in range(2, 8))


def test_a_learning_rate_of_zero_costs_no_bytes(make_run: MakeRun) -> None:
    run = make_run([make_stage(staleness=0, steps=3, lr=0.0)]).start()
    rows = run.tracker.of("step")
    assert [row["publish/bytes"] for row in rows[1:]] == [0, 0]
    assert [row["publish/unchanged_fraction"] for row in rows[1:]] == [1.0, 1.0]


class Forgetful(Watched):
    """Says that it holds nothing when asked before its fourth update."""

    async def held(self) -> int | None:
        return None if len(self.sent) == 3 else await super().held()


def test_a_sampler_that_holds_another_version_is_sent_the_latest_whole(make_run: MakeRun) -> None:
    run, (sampler,) = watch(make_run, Forgetful)
    run.start()
    assert sampler.sent == [(None, 0), (0, 1), (1, 2), (None, 3), (3, 4), (4, 5)]
    assert not run.tracker.events("update_refused")


class Damaged(Watched):
    """One of its weights changes its sign by itself before the changes to version 2 arrive."""

    async def update(self, export: Any) -> int:
        if (export.base, export.version) == (1, 2):
            next(self.inner._service._engine._model.parameters()).data.view(-1)[7] *= -1
        return await super().update(export)


def test_a_weight_that_changed_inside_a_sampler_is_noticed_at_the_next_version_and_mended(make_run: MakeRun) -> None:
    run, (sampler,) = watch(make_run, Damaged)
    run.start()
    assert sampler.sent == [(None, 0), (0, 1), (1, 2), (None, 2), (2, 3), (3, 4), (4, 5)]
    (event,) = run.tracker.events("update_refused")
    assert (event["worker"], event["version"]) == ("sampler-0", 2) and "was published" in event["detail"]


class Stubborn(Watched):
    async def update(self, export: Any) -> int:
        if export.version == 2:
            raise UpdateRefused("model.norm.weight is not as published")
        return await super().update(export)


def test_a_sampler_that_refuses_a_complete_version_ends_the_run_by_name(make_run: MakeRun) -> None:
    run, _ = watch(make_run, Stubborn)
    with pytest.raises(RuntimeError, match=r"sampler-0 refuses the complete version 2: model.norm.weight"):
        run.start()
    assert len(run.tracker.events("update_refused")) == 2


class Mortal(Watched):
    """Dies at random, in the middle of sampling or of an update, before or after it was applied."""

    rng = random.Random(0)
    dies = 0.35

    def _perhaps_die(self, phase: str) -> None:
        if self.rng.random() < self.dies:
            raise WorkerLost(self.name, phase, "killed by the test")

    async def sample(self, request: Any) -> Any:
        self._perhaps_die("sampling")
        return await super().sample(request)

    async def update(self, export: Any) -> int:
        self._perhaps_die("update")
        held = await super().update(export)
        self._perhaps_die("update, after it")
        return held


def test_samplers_that_die_at_any_moment_change_nothing_that_is_learned(make_run: MakeRun, tiny_model: Any) -> None:
    """Synchronous, so that who died can make no difference at all: not a bit of the policy."""
    stage = make_stage(staleness=0, steps=40, prompts=3, group_size=2, max_tokens=3)
    undisturbed = make_run([stage]).start()
    num_restarts = 0

    async def restart(dead: Any) -> Mortal:
        nonlocal num_restarts
        num_restarts += 1
        return Mortal(LocalSampler(dead.name, PlainSampler(tiny_model)))

    limits = Limits(max_restarts=10_000)
    run = make_run([stage], num_samplers=3, wrap_sampler=Mortal, restart=restart, limits=limits).start()
    assert num_restarts >= 200 and len(run.tracker.events("sampler_restarted")) >= 100  # some die again at once
    assert run.digest == undisturbed.digest and run.losses() == undisturbed.losses()


def test_an_archive_holds_every_version_whatever_is_published(make_run: MakeRun, tmp_path: Path) -> None:
    """Anchors every third version, complete ones or changes published, and a run that goes on from the middle."""
    stage = make_stage(staleness=1, steps=8)
    digests: dict[int, dict[str, str]] = {}

    def watch_versions(run: Run) -> Run:
        learner = run.controller.workers.learner
        export = learner.export

        async def watched(version: int) -> Any:
            digests[version] = run.digest
            return await export(version)

        learner.export = watched  # type: ignore[method-assign]
        return run

    for name, changes in (("changes", True), ("complete", False)):
        archive = VersionArchive(tmp_path / name, anchor_every=3)
        first = watch_versions(make_run([stage], archive=archive, publish_changes=changes, checkpoint_every=5)).start()
        assert archive.versions == list(range(9))
        anchors = sorted(int(file.name[:8]) for file in (tmp_path / name).glob("*-complete.patch"))
        assert anchors == ([0, 3, 6] if changes else list(range(9)))
        archive.forget_after(5 - 1)
        start, load_from = first.checkpoints.written[0], first.checkpoints.path(5)
        assert start.step == 5
        watch_versions(make_run([stage], archive=archive, start=start, load_from=load_from)).start()
        assert archive.versions == list(range(9))
        for version, digest in digests.items():
            rebuilt = archive.rebuild(version)
            assert {name: checksum(tensor) for name, tensor in rebuilt.tensors.items()} == digest


@pytest.mark.parametrize(
    ("budget", "dtype", "adapter"),
    [
        (1e9, None, {}),
        (1e9, torch.bfloat16, {}),
        (0.0, None, {}),
        (1e9, None, {"lora": LoraSpec(rank=4, alpha=8.0, targets=("q_proj",)), "serve_adapter": True}),
    ],
)
def test_an_observer_measures_what_was_published_and_changes_nothing(
    make_run: MakeRun,
    tiny_model: Path,
    tmp_path: Path,
    budget: float,
    dtype: torch.dtype | None,
    adapter: dict[str, Any],
) -> None:
    """Its figures are those of the versions in the archive, rounded as they are; without a budget it takes the end of the stage alone. Of an adapter
    beside its base they are of the weights that the two make."""
    stage = make_stage(staleness=0, steps=5)
    alone = make_run([stage], **adapter).start()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    rows: list[Any] = []
    observed = ObservedStage(name="rl", first=0, last=5, start=tiny_model)
    observer = VersionObserver(
        [observed],
        run_dir,
        lambda _, row: rows.append(row),
        lambda *_: None,
        spectra_every=9,
        dtype=dtype,
        budget=budget,
    )
    run = make_run([stage], archive=VersionArchive(run_dir / VERSIONS), observer=observer, **adapter).start()
    observer.close(60)
    assert run.digest == alone.digest and run.losses() == alone.losses()
    figures = {row["step"]: row for row in rows if "step" in row}
    assert 5 in figures and {v for row in figures.values() for v in [row["step"], *row["passed"]]} == set(range(1, 6))
    assert budget or list(figures) == [5]
    if adapter:
        moved = {name for name, weight in figures[5]["weights"].items() if weight["unchanged_since_start"] < 1}
        assert moved == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    for version, row in figures.items():
        (update,) = analyze(str(tiny_model), [f"{run_dir}@{version}"], dtype=dtype or torch.float32).updates
        assert row["unchanged_since_start"] == pytest.approx(pooled(r.sparsity for r in update.rows).unchanged)
        of_weight = {name: weight["unchanged_since_start"] for name, weight in row["weights"].items()}
        assert of_weight == {r.name: pytest.approx(r.sparsity.unchanged) for r in update.rows}
        if "unchanged" in row:
            (step,) = analyze(f"{run_dir}@{version - 1}", [f"{run_dir}@{version}"], dtype=dtype).updates
            assert row["unchanged"] == pytest.approx(pooled(r.sparsity for r in step.rows).unchanged)
    assert (run_dir / "analysis" / "rl.html").exists()


@pytest.mark.parametrize("beside", [True, False])
def test_weights_are_read_beside_the_next_gradient_and_before_the_next_step(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """Without `exports_beside` the learner does nothing else meanwhile."""
    run = make_run([make_stage(staleness=1, steps=5)])
    learner: Any = run.controller.workers.learner
    monkeypatch.setattr(type(learner), "exports_beside", beside)
    log: list[str] = []

    def logged(name: str, delay_s: float = 0.0) -> None:
        call = getattr(learner, name)

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            log.append(f"{name} begins")
            await asyncio.sleep(delay_s)
            result = await call(*args, **kwargs)
            log.append(f"{name} ends")
            return result

        setattr(learner, name, wrapped)

    logged("export", 0.1)
    logged("accumulate")
    logged("step")
    run.start()
    during: set[str] = set()
    for begin in [index for index, entry in enumerate(log) if entry == "export begins"]:
        during.update(log[begin + 1 : log.index("export ends", begin)])
    assert during == ({"accumulate begins", "accumulate ends"} if beside else set())


def test_a_run_with_an_archive_goes_on_after_a_supervised_stage(make_run: MakeRun, tmp_path: Path) -> None:
    """The stage's last version is published once more, whole; not twice."""
    stages = [make_stage("sft", steps=2, staleness=None), make_stage("rl", steps=2)]
    archive = VersionArchive(tmp_path / "versions", anchor_every=10)
    first = make_run(stages, archive=archive).start()
    assert archive.versions == [0, 2, 3, 4]
    archive.forget_after(2 - 1)
    start = next(position for position in first.checkpoints.written if position.step == 2)
    again = make_run(stages, archive=archive, start=start, load_from=first.checkpoints.path(2)).start()
    assert archive.versions == [0, 2, 3, 4]
    rebuilt = archive.rebuild(4)
    assert {name: checksum(tensor) for name, tensor in rebuilt.tensors.items()} == again.digest


def test_a_sampler_lost_during_an_evaluation_comes_back_with_the_version_that_is_evaluated(
    make_run: MakeRun, tiny_model: Path
) -> None:
    """The only one, and late enough for the learner to have made the next version meanwhile."""
    evaluated_on: list[int | None] = []
    deaths = 0

    class DiesInEvaluation(Watched):
        async def sample(self, request: Any) -> Any:
            nonlocal deaths
            if request.max_tokens == 4 and run.controller.buffer.step >= 2:
                await asyncio.sleep(0.3)
                if not deaths:
                    deaths += 1
                    raise WorkerLost(self.name, "sampling", "killed by the test")
                evaluated_on.append(await self.held())
            return await super().sample(request)

    async def restart(dead: Any) -> DiesInEvaluation:
        return DiesInEvaluation(LocalSampler(dead.name, PlainSampler(tiny_model)))

    eval_set = EvalSet(name="held-out", prompts=PROMPTS[:2], num_samples=1, temperature=1.0, max_tokens=4)
    stages = [make_stage("one", steps=2), make_stage("two", steps=3)]
    run = make_run(stages, wrap_sampler=DiesInEvaluation, restart=restart, eval_sets=[eval_set])
    asyncio.run(asyncio.wait_for(run.controller.run(), 60))
    assert deaths == 1 and evaluated_on == [2, 2, 5, 5]
    assert [row["step"] for row in run.tracker.of("eval")] == [0, 2, 5]
