"""The run directory before and when a run begins: free, claimed or to be continued, and the model it starts from.

run_dir/  recipe.json  run.json  model/  metrics.jsonl  eval.jsonl  eval_samples.jsonl  analysis.jsonl  rollouts.jsonl
          events.jsonl  logs/  checkpoints/  exports/<stage>/  versions/  analysis/<stage>.html  pictures/  summary.json
          wandb.jsonl  wandb/
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from rlpost.checkpoint import Checkpoint, latest_checkpoint
from rlpost.config import FileEntries, Recipe, RecipeError, UpdatedEntries
from rlpost.engines.mask_file import MaskFile
from rlpost.engines.pretrained import StoredTensors, check_model_directory, downloaded
from rlpost.pipeline.seeds import derive_seed
from rlpost.tracking import run_ended

RECIPE = "recipe.json"
RESUMABLE = {
    "sampler",
    "verifier",
    "publish",
    "tracking",
    "deadlines",
    "checkpoint_every",
    "max_failed_share",
    "run_dir",
    "ray_address",
}
"""Keys that may change on a resume: they decide how fast a run learns, not what."""


def open_run_directory(recipe: Recipe, run_dir: Path, *, resume: bool, console: Console) -> Checkpoint | None:
    """Make a fresh directory, or find the checkpoint to continue from."""
    stored = run_dir / RECIPE
    if not resume:
        if is_claimed(run_dir):
            raise RecipeError(
                f"{run_dir} already holds a run: continue it with --resume, choose another run_dir, or delete it"
            )
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir).close()
        except OSError as error:
            raise RecipeError(f"run_dir = {run_dir} cannot be written ({error.strerror}): choose another") from error
        return None
    if not is_claimed(run_dir):
        raise RecipeError(f"nothing to resume: {run_dir} holds no run. Start it without --resume")
    if changed := changed_keys(recipe, run_dir):
        raise RecipeError(
            f"the recipe differs from the one this run began with in {changed}. Resume with the recipe as it was"
            f" ({stored}); only {sorted(RESUMABLE)} may change"
        )

    def report(path: Path, files: list[str]) -> None:
        console.print(f"passing over {path}: {', '.join(files)} not as written", markup=False)

    try:
        checkpoint = latest_checkpoint(run_dir, report)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if checkpoint is None:
        console.print("no checkpoint was written before the run stopped: starting from the beginning")
    elif run_ended(run_dir):
        raise RecipeError(f"nothing to resume: the run in {run_dir} is complete (step {checkpoint.position.step})")
    return checkpoint


def is_claimed(run_dir: Path) -> bool:
    return (run_dir / RECIPE).exists()


def changed_keys(recipe: Recipe, run_dir: Path) -> list[str]:
    """What the run in the directory began with otherwise, of what decides its result."""
    stored = run_dir / RECIPE
    try:
        before: Mapping[str, Any] = json.loads(stored.read_text())["recipe"]
    except (ValueError, KeyError) as error:
        raise RecipeError(f"{stored} is damaged ({error}): bring it back, or choose another run_dir") from error
    now = recipe.model_dump(mode="json")
    return sorted(key for key in now if key not in RESUMABLE and now[key] != before.get(key))


def claim(run_dir: Path, recipe: Recipe) -> None:
    """From here on the directory holds a run, to be continued or left alone."""
    content = {"recipe": recipe.model_dump(mode="json")}
    (run_dir / RECIPE).write_text(json.dumps(content, indent=2))


def model_directory(recipe: Recipe, run_dir: Path, *, resume: bool) -> Path:
    """The policy to start from, as a local directory: built here, given, or from the hub."""
    build, name = recipe.model.build, recipe.model.path
    if build is not None:
        from rlpost.engines.scratch import build_model

        path = run_dir / "model"
        if not resume:  # whatever an attempt with other sizes left there
            try:
                build_model(path, **build.model_dump(), seed=derive_seed(recipe.seed, "model") % 2**31)
            except ValueError as error:
                raise RecipeError(f"model.build: {error}") from error
            except SafetensorError as error:
                raise OSError(f"the model could not be written to {path}: {error}") from error
        return path
    assert name is not None
    path = Path(name)
    if not path.is_dir():
        try:
            path = downloaded(name, ignore=["*.pt", "*.bin", "*.gguf"])
        except ValueError as error:
            raise RecipeError(f"model.path = {name!r} is no directory, and {error}") from error
    try:
        check_model_directory(path)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return path.resolve()


def check_subnetworks(recipe: Recipe, model_path: Path) -> None:
    """Raises RecipeError unless all that a stage's subnetwork is read from is of the model in `model_path`."""
    for stage in recipe.stage:
        choice = stage.subnetwork
        keys = ("before", "after") if isinstance(choice, UpdatedEntries) else ("path",)
        for key in keys if isinstance(choice, UpdatedEntries | FileEntries) else ():
            path = Path(getattr(choice, key))
            try:
                if isinstance(choice, FileEntries):
                    MaskFile(path).check_masks(StoredTensors(model_path))
                else:
                    StoredTensors(path).check_same_model(StoredTensors(model_path))
            except (ValueError, OSError, SafetensorError) as error:
                raise RecipeError(f"stage {stage.name!r}: subnetwork.{key}: {error}") from error
