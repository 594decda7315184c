"""Everything in this process, without Ray: the pipeline's specification, for tests that run in seconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlpost.core.metrics import StepReport
from rlpost.core.objective import StageSpec
from rlpost.core.patch import WeightPatch, from_bytes, joined_patch, to_bytes
from rlpost.core.subnetwork import Coverage
from rlpost.engines.base import LearnerEngine, SamplerEngine
from rlpost.engines.pretrained import save_pretrained
from rlpost.pipeline.ledger import Ledger
from rlpost.pipeline.ports import Export, GradedGroup, GroupRequest, Learner, Sampler, Seconds, Verifier
from rlpost.pipeline.step_metrics import JUDGE, WAIT
from rlpost.types import GroupSummary, Judgement, Rollout, RolloutGroup, summarize
from rlpost.workers.judging import shape_judgement
from rlpost.workers.learner_service import LearnerService
from rlpost.workers.sampler_service import SamplerService

T = TypeVar("T")
Judge = Callable[[RolloutGroup, Rollout], Judgement]


async def _run_here(function: Callable[[], T], /) -> T:
    return function()


class LocalSampler:
    def __init__(self, name: str, engine: SamplerEngine) -> None:
        self.name = name
        self._service = SamplerService(engine, _run_here)

    async def sample(self, request: GroupRequest) -> tuple[RolloutGroup, GroupSummary]:
        group = await self._service.sample(request)
        return group, summarize(group)

    async def held(self) -> int | None:
        return self._service.held

    async def update(self, export: Export) -> int:
        return await self._service.update(_patch_of(export))

    async def seconds(self) -> Seconds:
        return self._service.seconds()


class LocalVerifier:
    name = "verifier-0"

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._ledger = Ledger(WAIT)

    async def judge(self, handle: RolloutGroup, shaping: Mapping[str, Any] | None = None) -> tuple[Judgement, ...]:
        with self._ledger.state(JUDGE):
            return tuple(
                shape_judgement(self._judge(handle, r), r.text, r.num_response_tokens, shaping) for r in handle.rollouts
            )

    async def seconds(self) -> Seconds:
        return self._ledger.collect()


class LocalLearner:
    name = "learner-0"

    def __init__(self, engine: LearnerEngine, model_path: Path, *, publish_changes: bool = True) -> None:
        self._engine, self._model_path = engine, model_path
        self._service = LearnerService(engine, publish_changes=publish_changes)

    async def begin_stage(self, spec: StageSpec) -> Coverage:
        return self._service.begin_stage(spec)

    async def accumulate(
        self, groups: Sequence[GradedGroup], *, learner_version: int, max_staleness: int | None
    ) -> None:
        self._service.accumulate(
            [group.handle.only(group.kept_G) for group in groups],
            [group.advantages_G for group in groups],
            learner_version=learner_version,
            max_staleness=max_staleness,
        )

    async def step(self, *, denominator: float, lr: float) -> StepReport:
        return self._service.step(denominator=denominator, lr=lr)

    @property
    def exports_beside(self) -> bool:
        return self._service.exports_beside

    async def export(self, version: int) -> Export:
        return _export_of(self._service.export(version))

    async def complete(self) -> Export:
        return _export_of(self._service.complete())

    async def save(self, path: Path) -> None:
        self._service.save(path)

    async def load(self, path: Path) -> None:
        self._service.load(path)

    async def save_pretrained(self, path: Path) -> None:
        save_pretrained(self._engine.weights(), self._model_path, path, self._engine.adapter())

    async def seconds(self) -> Seconds:
        return self._service.seconds()


class LocalWorkers:
    """Samplers, verifier and learner as plain objects; handles are the groups themselves."""

    def __init__(
        self,
        samplers: Sequence[Sampler],
        verifier: Verifier,
        learner: Learner,
        restart: Callable[[Sampler], Awaitable[Sampler]] | None = None,
        evaluators: Sequence[Sampler] = (),
    ) -> None:
        self.samplers, self.verifier, self.learner = samplers, verifier, learner
        self.evaluators, self._restart = evaluators, restart

    def put(self, group: RolloutGroup) -> RolloutGroup:
        return group

    async def fetch(self, handle: RolloutGroup) -> RolloutGroup:
        return handle

    async def fetch_version(self, export: Export) -> WeightPatch:
        return _patch_of(export)

    async def restart(self, sampler: Sampler) -> Sampler:
        assert self._restart is not None, "these samplers share the run's process and cannot be lost"
        return await self._restart(sampler)


def _export_of(patch: WeightPatch) -> Export:
    return Export.of(patch, to_bytes(patch))


def _patch_of(export: Export) -> WeightPatch:
    return joined_patch([from_bytes(data) for data in export.handles])
