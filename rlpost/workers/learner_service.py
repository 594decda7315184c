"""Drives one rank of a learner engine: groups in, versions out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rlpost.core.metrics import StepReport
from rlpost.core.objective import StageSpec
from rlpost.core.patch import WeightPatch
from rlpost.core.subnetwork import Coverage
from rlpost.engines.base import LearnerEngine
from rlpost.pipeline.ledger import Ledger
from rlpost.pipeline.ports import Seconds
from rlpost.pipeline.step_metrics import WAIT
from rlpost.types import RolloutGroup
from rlpost.workers.publisher import Publisher


class LearnerService:
    """One engine, its place in time, and what it has published."""

    def __init__(self, engine: LearnerEngine, *, publish_changes: bool = True) -> None:
        self._engine = engine
        self._ledger = Ledger(WAIT)
        self._publisher = Publisher(changes=publish_changes)

    def begin_stage(self, spec: StageSpec) -> Coverage:
        with self._ledger.state("begin_stage"):
            return self._engine.begin_stage(spec)

    def accumulate(
        self,
        groups: Sequence[RolloutGroup],
        advantages: Sequence[Sequence[float]],
        *,
        learner_version: int,
        max_staleness: int | None,
    ) -> None:
        with self._ledger.state("accumulate"):
            self._engine.accumulate(
                [rollout for group in groups for rollout in group.rollouts],
                [advantage for advantages_G in advantages for advantage in advantages_G],
                learner_version=learner_version,
                max_staleness=max_staleness,
            )

    def step(self, *, denominator: float, lr: float) -> StepReport:
        with self._ledger.state("step"):
            return self._engine.step(denominator=denominator, lr=lr)

    @property
    def exports_beside(self) -> bool:
        """Whether `export` may run in a thread of its own, beside all that does not change the weights."""
        return self._engine.reads_alone

    def export(self, version: int) -> WeightPatch:
        """This rank's part of the present policy; see `Publisher.publish`."""
        # Beside another state it is no state of its own; its duration is publish/export_seconds.
        with nullcontext() if self.exports_beside else self._ledger.state("export"):
            return self._publisher.publish(version, self._engine.sections())

    def complete(self) -> WeightPatch:
        """This rank's part of the version exported last, whole. Not at the same time as `export`."""
        return self._publisher.complete()

    def save(self, path: Path) -> None:
        with self._ledger.state("checkpoint"):
            self._engine.save(path)

    def load(self, path: Path) -> None:
        with self._ledger.state("checkpoint"):
            self._engine.load(path)

    def seconds(self) -> Seconds:
        return self._ledger.collect()
