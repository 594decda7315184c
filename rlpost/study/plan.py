"""A study's tables: one TOML file, many runs. Every run is a recipe with overrides, checked before the first one starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from rlpost.checkpoint import EXPORTS
from rlpost.config import Dtype, Recipe, RecipeError, Table
from rlpost.recipe import explain, load_recipe, read_tree

SLUG = re.compile(r"[^a-z0-9]+")
SAMPLES = "samples.jsonl"
"""As `rlpost.evaluate` names them."""


class StudyTable(BaseModel):
    """Apart from a recipe's tables, so that neither's keys are suggested for the other's."""

    model_config = Table.model_config


class StartConfig(StudyTable):
    """The run whose export all others begin with."""

    stage: str
    """Its stage that is exported for them."""
    set: tuple[str, ...] = ()


class GoalConfig(StudyTable):
    """An accuracy to be reached; an arm is asked for the response tokens that it takes."""

    eval: str
    accuracy: Annotated[float, Field(gt=0, le=1)]


class ArmConfig(StudyTable):
    """What one arm changes."""

    name: str
    set: tuple[str, ...] = ()
    """Overrides of the recipe. {start} stands for the directory of the model it begins with, {of} for the one that the arm `of`
    ends with at the same seed, {samples} for the file of the start's samples at that seed."""
    of: str | None = None
    """An earlier arm, whose models this one's are held against."""


class StudyConfig(StudyTable):
    recipe: str
    """Relative to the study's file."""
    directory: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    measure: Literal["updates", "learning"] = "updates"
    """What the arms are compared in: what became of the weights, or what was learned and at what cost."""
    goal: GoalConfig | None = None
    """Of learning."""
    dtype: Dtype = "bfloat16"
    """In which weights are compared."""
    set: tuple[str, ...] = ()
    """Overrides of every arm, which come before its own."""
    samples: tuple[str, ...] = ()
    """If any: overrides with which `rlpost eval` draws samples of the start's model at each seed, before the arms."""
    start: StartConfig
    arm: Annotated[tuple[ArmConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _arms_follow(self) -> StudyConfig:
        names: list[str] = []
        for arm in self.arm:
            if arm.name in names or arm.name == "start":
                raise ValueError(
                    f'two arms are named {arm.name!r} ("start" is the run that all begin with): rename one'
                )
            if arm.of is not None and arm.of not in names:
                raise ValueError(f"arm {arm.name!r} is of {arm.of!r}, which is no earlier arm; those are {names}")
            if arm.of is None and any("{of}" in override for override in arm.set):
                raise ValueError(f"arm {arm.name!r} uses {{of}} and is of no arm: name one in its key of")
            if not self.samples and any("{samples}" in override for override in arm.set):
                raise ValueError(f"arm {arm.name!r} uses {{samples}} and none are drawn: give the study's key samples")
            names.append(arm.name)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} name one twice")
        if self.goal is not None and self.measure != "learning":
            raise ValueError('goal is of what is learned: add measure = "learning", or leave it out')
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run of a study.

    Example:
        PlannedRun(arm="GRPO", seed=1, directory=Path("runs/subnetwork/grpo/1"), overrides=("seed=1", ...), model=...)
    """

    arm: str
    seed: int
    directory: Path
    overrides: tuple[str, ...]
    model: Path
    """What it exports last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSamples:
    """What is drawn of the start's model for one seed."""

    seed: int
    directory: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study with its runs, in the order in which they can be made."""

    config: StudyConfig
    recipe: Path
    start: PlannedRun
    samples: tuple[PlannedSamples, ...]
    runs: tuple[PlannedRun, ...]

    @property
    def directory(self) -> Path:
        return Path(self.config.directory)

    def of_arm(self, name: str) -> list[PlannedRun]:
        """One per seed."""
        return [run for run in self.runs if run.arm == name]


def load_study(path: Path) -> Study:
    """Read, validate, and check the recipe of every run.

    Raises:
        RecipeError: naming the key, or the run whose recipe is wrong.
    """
    try:
        config = StudyConfig.model_validate(read_tree(path, "study"))
    except ValidationError as error:
        raise RecipeError("\n".join(explain(problem, StudyTable) for problem in error.errors())) from None
    recipe, directory = path.parent / config.recipe, Path(config.directory)
    start = _planned(recipe, "start", 0, directory / "start", config.start.set, stage=config.start.stage)
    from_start = f"model={{path='{start.model}'}}"
    samples = _planned_samples(recipe, config, directory, from_start)
    runs: dict[tuple[str, int], PlannedRun] = {}
    for seed in config.seeds:
        for arm in config.arm:
            places = {"start": start.model, "samples": _samples_directory(directory, seed) / SAMPLES}
            places |= {} if arm.of is None else {"of": runs[arm.of, seed].model}
            overrides = (from_start, *config.set, *arm.set)
            for name, place in places.items():
                overrides = tuple(override.replace(f"{{{name}}}", str(place)) for override in overrides)
            where = directory / SLUG.sub("-", arm.name.lower()).strip("-") / str(seed)
            runs[arm.name, seed] = _planned(recipe, arm.name, seed, where, overrides)
            _check_goal(config.goal, recipe, runs[arm.name, seed])
    if len({run.directory for run in runs.values()}) != len(runs):
        raise RecipeError(f"{path}: arms whose names differ in punctuation alone share a directory: rename one")
    return Study(config=config, recipe=recipe, start=start, samples=samples, runs=tuple(runs.values()))


def _check_goal(goal: GoalConfig | None, recipe: Path, run: PlannedRun) -> None:
    evals = [entry.name for entry in load_recipe(recipe, run.overrides).eval]
    if goal is not None and goal.eval not in evals:
        raise RecipeError(f"goal.eval = {goal.eval!r} is no eval set of arm {run.arm!r}; those are {evals}")


def _samples_directory(directory: Path, seed: int) -> Path:
    return directory / "samples" / str(seed)


def _planned_samples(recipe: Path, config: StudyConfig, directory: Path, from_start: str) -> tuple[PlannedSamples, ...]:
    if not config.samples:
        return ()
    overrides = (from_start, *config.set, *config.samples)
    _load("samples", recipe, overrides)
    return tuple(
        PlannedSamples(seed=seed, directory=_samples_directory(directory, seed), overrides=(*overrides, f"seed={seed}"))
        for seed in config.seeds
    )


def _planned(
    recipe: Path, arm: str, seed: int, directory: Path, overrides: tuple[str, ...], *, stage: str | None = None
) -> PlannedRun:
    overrides = (*overrides, f"seed={seed}", f"run_dir={directory}")
    stages = [entry.name for entry in _load(f"arm {arm!r}", recipe, overrides).stage]
    last = stages[-1] if stage is None else stage
    if last not in stages:
        raise RecipeError(f"start.stage = {last!r} is no stage of its run; those are {stages}")
    return PlannedRun(arm=arm, seed=seed, directory=directory, overrides=overrides, model=directory / EXPORTS / last)


def _load(what: str, recipe: Path, overrides: tuple[str, ...]) -> Recipe:
    try:
        return load_recipe(recipe, overrides)
    except RecipeError as error:
        raise RecipeError(f"{what}: {error}") from error
