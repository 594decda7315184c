"""Drives one rank of a learner engine: groups in, versions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rlpost.core.metrics import StepReport
from rlpost.core.objective import StageSpec
from rlpost.core.subnetwork import Coverage
from rlpost.core.weights import checksum, unchanged_fraction
from rlpost.engines.base import LearnerEngine
from rlpost.pipeline.ledger import Ledger
from rlpost.pipeline.ports import Seconds
from rlpost.pipeline.step_metrics import WAIT
from rlpost.types import RolloutGroup, WeightUpdate


class LearnerService:
    """One engine, its place in time, and the image of the version it published last."""

    def __init__(self, engine: LearnerEngine) -> None:
        self._engine = engine
        self._ledger = Ledger(WAIT)
        self._published: Mapping[str, Tensor] | None = None

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

    def export(self, version: int) -> tuple[WeightUpdate, float | None]:
        """The present policy as a complete update, and the share of it unchanged since the last one (rank 0 publishes).

        Raises:
            RuntimeError: when a weight is not finite. Such a policy must not reach a sampler.
        """
        with self._ledger.state("export"):
            tensors = self._engine.weights()
            broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
            if broken:
                raise RuntimeError(
                    f"version {version} has non-finite values in {broken[0]} ({len(broken)} tensors in all): the run has"
                    " diverged, and would again from its last checkpoint. Begin in another run_dir with a lower lr or a"
                    " smaller max_grad_norm"
                )
            unchanged = None if self._published is None else unchanged_fraction(self._published, tensors)
            self._published = tensors
            checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
            return WeightUpdate(version=version, tensors=tensors, checksums=checksums), unchanged

    def save(self, path: Path) -> None:
        with self._ledger.state("checkpoint"):
            self._engine.save(path)

    def load(self, path: Path) -> None:
        with self._ledger.state("checkpoint"):
            self._engine.load(path)

    def seconds(self) -> Seconds:
        return self._ledger.collect()
