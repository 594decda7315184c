"""What a study found: figures of each arm over its seeds, from the runs' own files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rlpost.analysis.measure import Analysis, analyze, pool
from rlpost.analysis.stored import open_versions
from rlpost.core.agreement import agreement, pooled_agreement
from rlpost.study.plan import PlannedRun, Study
from rlpost.tracking import FILES, read_rows


@dataclass(frozen=True, slots=True)
class Over:
    """One figure, of each seed.

    Example:
        Over((0.92, 0.94, 0.93))
    """

    seeds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seeds)

    @property
    def spread(self) -> float:
        """Standard deviation; nan of one seed."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreeing:
    """Share of entries that two models have in common bit for bit, the first of an arm at each seed."""

    tuned: Over
    """With the arm it is of, at the same seed."""
    other_seed: Over | None
    """Of that arm with itself, at the next seed; None with one seed."""
    untouched: Over
    """Of that arm with the model all began with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    name: str
    accuracy: Mapping[str, tuple[float, Over]]
    """By eval set: before, and after."""
    unchanged: Over
    """Shares of entries: the same bits in the study's dtype."""
    predicted: Over
    """By `core.sparsity.absorption_null`."""
    within: Over
    """|difference| at most 1e-5."""
    unchanged_as_stored: Over
    """The same bits in the dtype of the learner's weights."""
    rms_update: Over
    rank: Over
    """Shares of full rank, means over matrices."""
    entropy_rank: Over
    intruders: Over
    """Intruder dimensions among the leading directions, all matrices together."""
    shared: Over | None
    """Of what one seed changed, the share that another changed too, every two seeds; then what chance among weights of like
    magnitude would give. None with one seed."""
    shared_by_chance: Over | None
    agreement: Agreeing | None
    """Where the arm is of another."""


def arm_analysis(study: Study, arm: str) -> Analysis:
    """The updates of all its seeds, with spectra, compared with each other."""
    models = [str(run.model) for run in study.of_arm(arm)]
    return analyze(str(study.start.model), models, dtype=_dtype(study), spectra=True)


def arm_result(study: Study, arm: str, analyses: Mapping[str, Analysis]) -> ArmResult:
    """
    Args:
        analyses: by arm, of this one and of the one it is of.
    """
    runs, analysis = study.of_arm(arm), analyses[arm]
    found = [pool(update.rows) for update in analysis.updates]
    overlaps = [comparison.overlaps["all"] for comparison in analysis.comparisons]
    spectra = [update.spectrum for update in found if update.spectrum is not None]
    assert len(spectra) == len(found), "spectra were asked for"
    of = next(entry.of for entry in study.config.arm if entry.name == arm)
    return ArmResult(
        name=arm,
        accuracy=accuracies(runs),
        unchanged=_over(update.sparsity.unchanged for update in found),
        predicted=_over(update.sparsity.share(update.sparsity.predicted) for update in found),
        within=_over(update.sparsity.share(update.sparsity.within[1e-5]) for update in found),
        unchanged_as_stored=_over(_unchanged_as_stored(study, run) for run in runs),
        rms_update=_over(update.sparsity.rms_update for update in found),
        rank=_over(update.rank for update in found if update.rank is not None),
        entropy_rank=_over(spectrum.entropy for spectrum in spectra),
        intruders=_over(float(spectrum.intruders) for spectrum in spectra),
        shared=_over(o.of_first(o.both) for o in overlaps) if overlaps else None,
        shared_by_chance=_over(o.of_first(o.matched) for o in overlaps) if overlaps else None,
        agreement=None if of is None else _agreement(study, runs, analyses[of]),
    )


def _agreement(study: Study, runs: Sequence[PlannedRun], full: Analysis) -> Agreeing:
    models = [update.after for update in full.updates]
    compared = {frozenset((found.first, found.second)): found.agreements["all"] for found in full.comparisons}
    nexts = [
        compared[frozenset(pair)] for pair in zip(models, [*models[1:], models[0]], strict=True) if len({*pair}) > 1
    ]
    return Agreeing(
        tuned=_over(_agreeing(study, model, str(run.model)) for model, run in zip(models, runs, strict=True)),
        other_seed=_over(found.difference.unchanged for found in nexts) if nexts else None,
        untouched=_over(pool(update.rows).sparsity.unchanged for update in full.updates),
    )


def _agreeing(study: Study, first: str, second: str) -> float:
    versions = open_versions([str(study.start.model), first, second], dtype=_dtype(study))
    parts = (agreement(*versions.tensors(name)) for name in versions.names)
    return pooled_agreement(parts).difference.unchanged


def _unchanged_as_stored(study: Study, run: PlannedRun) -> float:
    (update,) = analyze(str(study.start.model), [str(run.model)]).updates
    return pool(update.rows).sparsity.unchanged


def accuracies(runs: Sequence[PlannedRun]) -> dict[str, tuple[float, Over]]:
    """The first and the last row of each eval set."""
    rows = [list(read_rows(run.directory / FILES["eval"])) for run in runs]
    names = dict.fromkeys(row["eval"] for row in rows[0])
    found: dict[str, tuple[float, Over]] = {}
    for name in names:
        of_set = [[row["accuracy"] for row in of_run if row["eval"] == name] for of_run in rows]
        found[name] = (statistics.fmean(values[0] for values in of_set), _over(values[-1] for values in of_set))
    return found


def _over(values: Iterable[float]) -> Over:
    return Over(tuple(values))


def _dtype(study: Study) -> torch.dtype:
    return getattr(torch, study.config.dtype)
