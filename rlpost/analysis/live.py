"""A run watched while it trains: each published version against the last one and against the start of its stage."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlpost.analysis.measure import Analysis, measure
from rlpost.analysis.stored import HeldVersion, open_version
from rlpost.core.patch import WeightPatch, patched
from rlpost.core.weights import bits, in_model_order, weight_kind
from rlpost.types import WeightImage

NICENESS = 19
LARGEST = 1024
"""Matrices with more singular values are left to `rlpost analyze --spectra`: one of 4096 takes a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedStage:
    """Steps `first` + 1 to `last` of a run.

    Example:
        ObservedStage(name="math", first=400, last=500, start=Path("runs/a/exports/warmup"))
    """

    name: str
    first: int
    last: int
    start: Path
    """The model directory it begins with: there once its first step is published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """Counts of one weight's entries at one version; `of` adds those of several.

    Example:
        Movement(numel=100, changed=3, moved=20, ever_moved=25): 5 entries have moved and come back.
    """

    numel: int
    changed: int | None
    """Since the version before; None where that one was not seen."""
    moved: int
    """Now different from the start of the stage."""
    ever_moved: int
    """At any version seen of the stage."""

    @classmethod
    def of(cls, parts: Iterable[Movement]) -> Movement:
        every = list(parts)
        changed = [part.changed for part in every]
        return cls(
            numel=sum(part.numel for part in every),
            changed=None if None in changed else sum(filter(None, changed)),
            moved=sum(part.moved for part in every),
            ever_moved=sum(part.ever_moved for part in every),
        )

    def figures(self) -> dict[str, float]:
        """As shares: of all entries, `returned` of those that ever moved."""
        returned = self.ever_moved - self.moved
        return {
            **({} if self.changed is None else {"unchanged": 1 - self.changed / self.numel}),
            "unchanged_since_start": 1 - self.moved / self.numel,
            "ever_moved": self.ever_moved / self.numel,
            "returned": returned / self.ever_moved if self.ever_moved else 0.0,
        }


class VersionObserver:
    """Receives versions as samplers do, proves them, and measures them in a thread of its own, at the lowest priority.

    It spends at most `budget` of the run's time: while it is behind, or is still at work, it lets versions pass, and says
    which. The last version of a stage it always takes.
    """

    def __init__(
        self,
        stages: Sequence[ObservedStage],
        log: Callable[[str, Mapping[str, Any]], None],
        *,
        spectra_every: int,
        budget: float = 0.02,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            log: takes rows of kind "analysis", and events.
            spectra_every: versions from one whose update is decomposed to the next, counted from the start of a stage.
            budget: share of one core's time.
        """
        self._stages, self._log, self._spectra_every = stages, log, spectra_every
        self._budget, self._clock, self._started, self._spent_s = budget, clock, clock(), 0.0
        self._given: int | None = None
        self._passed: list[int] = []
        self._failed = threading.Event()
        self._work: queue.Queue[tuple[WeightPatch, list[int]] | None] = queue.Queue()
        self._image: WeightImage | None = None
        self._stage: ObservedStage | None = None
        self._start: dict[str, Tensor] = {}
        self._ever: dict[str, Tensor] = {}
        self._counts: dict[str, Movement] = {}
        self._thread = threading.Thread(target=self._serve, name="observer", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int | None:
        """The version it was given last."""
        return self._given

    def wants(self, version: int) -> bool:
        """Whether it takes this version; one that it does not is noted in the next row."""
        if self._failed.is_set():
            return False
        ends_stage = version in {stage.last for stage in self._stages}
        behind = self._work.unfinished_tasks or self._spent_s > self._budget * (self._clock() - self._started)
        if behind and not ends_stage and self._given is not None:
            self._passed.append(version)
            return False
        return True

    def see(self, patch: WeightPatch) -> None:
        """Take a version, complete or as changes of the one `held`; returns at once."""
        self._given = patch.version
        self._work.put((patch, self._passed))
        self._passed = []

    def close(self) -> None:
        """Wait until everything taken is measured."""
        self._work.put(None)
        self._thread.join()

    # -- in its thread -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        torch.set_num_threads(1)
        try:
            while (item := self._work.get()) is not None:
                began = time.thread_time()
                try:
                    self._measure(*item)
                finally:
                    self._spent_s += time.thread_time() - began
                    self._work.task_done()
        except Exception as error:  # noqa: BLE001 - who watches a run must not end it; said once, and it stops watching
            self._failed.set()
            self._log("event", {"event": "observer_failed", "detail": f"{type(error).__name__}: {error}"})

    def _measure(self, patch: WeightPatch, passed: list[int]) -> None:
        seen_before = self._image is not None
        self._image = patched(self._image if patch.base is not None else None, patch)
        version = patch.version
        stage = next((stage for stage in self._stages if stage.first < version <= stage.last), None)
        if not seen_before or stage is None:
            return  # what a run begins or goes on with is no update of it
        if stage is not self._stage:
            self._begin(stage)
        self._count(patch)
        row: dict[str, Any] = {"step": version, "stage": stage.name, "passed": passed, **self._figures()}
        if version == stage.last or (version - stage.first) % self._spectra_every == 0:
            analysis = self._analysis(stage, version)
            found = {r.name: asdict(r.spectrum.ranks) for r in analysis.updates[0].rows if r.spectrum is not None}
            row["ranks"] = found
        self._log("analysis", row)

    def _begin(self, stage: ObservedStage) -> None:
        assert self._image is not None
        stored, served = open_version(str(stage.start)), self._image.tensors
        self._stage = stage
        self._start = {name: stored.tensor(name).to(tensor.dtype) for name, tensor in served.items()}
        self._ever = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in served.items()}
        self._counts = {}

    def _count(self, patch: WeightPatch) -> None:
        assert self._image is not None
        for name, present in self._image.tensors.items():
            changed = patch.tensors[name].num_changed
            if changed or name not in self._counts:
                differs = bits(present) != bits(self._start[name])
                self._ever[name] |= differs
                moved, ever = int(differs.sum()), int(self._ever[name].sum())
            else:
                moved, ever = self._counts[name].moved, self._counts[name].ever_moved
            self._counts[name] = Movement(
                numel=present.numel(),
                changed=None if patch.base is None else changed,
                moved=moved,
                ever_moved=ever,
            )

    def _analysis(self, stage: ObservedStage, version: int) -> Analysis:
        assert self._image is not None
        labels = [str(stage.start), f"version {version}"]
        return measure(
            labels, [HeldVersion(self._start), HeldVersion(self._image.tensors)], spectra=True, largest=LARGEST
        )

    def _figures(self) -> dict[str, Any]:
        of_kind: dict[str, list[Movement]] = {}
        for name, counts in self._counts.items():
            of_kind.setdefault(weight_kind(name), []).append(counts)
        return {
            **Movement.of(self._counts.values()).figures(),
            "kinds": {kind: Movement.of(of_kind[kind]).figures() for kind in in_model_order(of_kind)},
            "weights": {name: counts.figures() for name, counts in self._counts.items()},
        }
