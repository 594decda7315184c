"""A run watched while it trains: each published version against the last one and against the start of its stage."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlpost.analysis.figures import heat_map
from rlpost.analysis.measure import Analysis, measure
from rlpost.analysis.report import write_report
from rlpost.analysis.stored import HeldVersion, Versions, open_version
from rlpost.core.moved import Moved, MovedEntries, pooled_moved
from rlpost.core.patch import WeightPatch, patched
from rlpost.core.weights import bits, in_model_order, merged, weight_kind
from rlpost.tracking import FILES, read_rows
from rlpost.types import WeightImage

NICENESS = 19
REPORTS = "analysis"
"""Where the directory of a run has the reports."""
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


class VersionObserver:
    """Receives versions as samplers do, proves them, and measures them in a thread of its own, at the lowest priority.

    It spends at most `budget` of the run's time: while it is behind, or is still at work, it lets versions pass, and says
    which. The last version of a stage it always takes; that one and its report are beside the budget.
    """

    def __init__(
        self,
        stages: Sequence[ObservedStage],
        run_dir: Path,
        log: Callable[[str, Mapping[str, Any]], None],
        show: Callable[[str, int, bytes], None],
        *,
        spectra_every: int,
        dtype: torch.dtype | None = None,
        budget: float = 0.02,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            run_dir: its analysis/<stage>.html is the report of a stage, written when it ends.
            log: takes rows of kind "analysis", and events.
            show: takes a picture's name, its step and its PNG.
            spectra_every: versions from one whose update is decomposed to the next, counted from the start of a stage.
            dtype: what versions are rounded to before they are compared; None: compared as served.
            budget: share of one core's time.
        """
        self._stages, self._run_dir, self._log, self._show = tuple(stages), run_dir, log, show
        self._spectra_every, self._dtype = spectra_every, dtype
        self._budget, self._clock, self._started, self._spent_s = budget, clock, clock(), 0.0
        self._given: int | None = None
        self._passed: list[int] = []
        self._failed = threading.Event()
        self._work: queue.Queue[tuple[WeightPatch, list[int]] | None] = queue.Queue()
        self._image: WeightImage | None = None
        self._plain: WeightImage | None = None
        """The same with an adapter that was published beside the weights merged into them, rounded."""
        self._since = 0
        """The version that the run began or went on with."""
        self._stage: ObservedStage | None = None
        self._start: dict[str, Tensor] = {}
        self._entries: dict[str, MovedEntries] = {}
        self._counts: dict[str, _Counts] = {}
        self._thread = threading.Thread(target=self._serve, name="observer", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int | None:
        """The version it was given last."""
        return self._given

    def end_early(self, stage: str, last: int) -> None:
        """The stage's last version, which was not seen yet, is this one; later stages begin that much earlier."""
        moved, shift = [], 0
        for observed in self._stages:
            ends = last if observed.name == stage else observed.last - shift
            moved.append(replace(observed, first=observed.first - shift, last=ends))
            shift = observed.last - ends
        self._stages = tuple(moved)

    def wants(self, version: int) -> bool:
        """Whether it takes this version; one that it does not is noted in the next row."""
        if self._failed.is_set():
            return False
        behind = self._work.unfinished_tasks or self._spent_s > self._budget * (self._clock() - self._started)
        if behind and not self._ends_stage(version) and self._given is not None:
            self.let_pass(version)
            return False
        return True

    def let_pass(self, version: int) -> None:
        """Note that this version is not to be had any more."""
        self._passed.append(version)

    def see(self, patch: WeightPatch) -> None:
        """Take a version, complete or as changes of the one `held`; returns at once."""
        self._given = patch.version
        self._work.put((patch, self._passed))
        self._passed = []

    def close(self, limit_s: float) -> None:
        """Wait until everything taken is measured."""
        self._work.put(None)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._give_up(f"the last versions took longer than {limit_s:g} s")

    def _ends_stage(self, version: int) -> bool:
        return any(version == stage.last for stage in self._stages)

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
                    if not self._ends_stage(item[0].version):
                        self._spent_s += time.thread_time() - began
                    self._work.task_done()
        except Exception as error:  # noqa: BLE001 - who watches a run must not end it; said once, and it stops watching
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, detail: str) -> None:
        self._failed.set()
        self._log("event", {"event": "observer_failed", "detail": detail})

    def _measure(self, patch: WeightPatch, passed: list[int]) -> None:
        before = self._plain
        self._image = patched(self._image if patch.base is not None else None, patch)
        rounded = {name: tensor.to(self._dtype or tensor.dtype) for name, tensor in merged(self._image.tensors).items()}
        self._plain = WeightImage(version=patch.version, tensors=rounded)
        version = patch.version
        if before is None:
            self._since = version
        stage = next((stage for stage in self._stages if stage.first < version <= stage.last), None)
        if before is None or stage is None:
            return  # what a run begins or goes on with is no update of it
        if stage is not self._stage:
            self._begin(stage)
        self._count(before, self._plain)
        row: dict[str, Any] = {"step": version, "stage": stage.name, "passed": passed}
        row |= {"moved_since": max(self._since, stage.first), **self._figures()}
        analysis = None
        if version == stage.last or (version - stage.first) % self._spectra_every == 0:
            analysis = self._analysis(stage, version)
            found = {r.name: asdict(r.spectrum.ranks) for r in analysis.updates[0].rows if r.spectrum is not None}
            row["ranks"] = found
            self._show("unchanged", version, heat_map(analysis))
        self._log("analysis", row)
        if version == stage.last and analysis is not None:
            self._report(stage, analysis)

    def _begin(self, stage: ObservedStage) -> None:
        assert self._plain is not None
        stored, served = open_version(str(stage.start)), self._plain.tensors
        self._stage = stage
        self._start = {name: stored.tensor(name).to(tensor.dtype) for name, tensor in served.items()}
        self._entries = {name: MovedEntries(start) for name, start in self._start.items()}
        self._counts = {}

    def _count(self, before: WeightImage, present: WeightImage) -> None:
        follows = before.version == present.version - 1
        for name, tensor in present.tensors.items():
            last = before.tensors[name]
            known = self._counts.get(name)
            changed = 0 if last is tensor else int((bits(last) != bits(tensor)).sum())
            moved = known.moved if known and not changed else self._entries[name].update(tensor)
            self._counts[name] = _Counts(changed if follows else None, moved)

    def _analysis(self, stage: ObservedStage, version: int) -> Analysis:
        assert self._plain is not None
        versions = [HeldVersion(self._start), HeldVersion(self._plain.tensors)]
        return measure(Versions([str(stage.start), f"version {version}"], versions), spectra=True, largest=LARGEST)

    def _report(self, stage: ObservedStage, analysis: Analysis) -> None:
        """With what was logged of the stage, before a resume too."""
        rows = read_rows(self._run_dir / FILES["analysis"])
        path = self._run_dir / REPORTS / f"{stage.name}.html"
        path.parent.mkdir(exist_ok=True)
        write_report(path, analysis, history=[row for row in rows if row["stage"] == stage.name])
        self._log("event", {"event": "report", "stage": stage.name, "path": str(path)})

    def _figures(self) -> dict[str, Any]:
        of_kind: dict[str, list[_Counts]] = {}
        for name, counts in self._counts.items():
            of_kind.setdefault(weight_kind(name), []).append(counts)
        return {
            **_shares(self._counts.values()),
            "kinds": {kind: _shares(of_kind[kind]) for kind in in_model_order(of_kind)},
            "weights": {name: _shares([counts]) for name, counts in self._counts.items()},
        }


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of one weight at one version."""

    changed: int | None
    """Entries that differ from the version before; None where that one was not seen."""
    moved: Moved


def _shares(parts: Iterable[_Counts]) -> dict[str, float]:
    """Of all entries; `returned` of those that ever moved."""
    every = list(parts)
    moved = pooled_moved(part.moved for part in every)
    changed = [part.changed for part in every if part.changed is not None]
    return {
        **({"unchanged": 1 - sum(changed) / moved.numel} if len(changed) == len(every) else {}),
        "unchanged_since_start": 1 - moved.now / moved.numel,
        "ever_moved": moved.ever / moved.numel,
        "returned": moved.returned / moved.ever if moved.ever else 0.0,
    }
