"""The runs of a study, one after another, each in a process of its own; what is whole already is not made again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from rlpost.config import RecipeError
from rlpost.exit_codes import INTERRUPTED
from rlpost.recipe import load_recipe
from rlpost.run_directory import changed_keys, is_claimed
from rlpost.study.plan import PlannedRun, PlannedSamples, Study
from rlpost.tracking import run_ended

TAIL_LINES = 15


class RunFailed(Exception):
    """A run of the study ended before its end: names it and shows the end of its output."""


def make_runs(study: Study, say: Callable[[str], None]) -> None:
    """Begin, continue or skip each run.

    Raises:
        RecipeError: before any of them, when a directory holds a run with other settings.
        RunFailed: at the first that fails; a study that is started again goes on with it.
        KeyboardInterrupt: when it was interrupted, once the present run has written its checkpoint.
    """
    for run in (study.start, *study.runs):
        _check_unchanged(study, run)
    total = 1 + len(study.samples) + len(study.runs)
    for number, planned in enumerate((study.start, *study.samples, *study.runs), start=1):
        name = f"{number}/{total} {planned.arm if isinstance(planned, PlannedRun) else 'samples'}, seed {planned.seed}"
        if isinstance(planned, PlannedRun) and run_ended(planned.directory):
            say(f"{name}: done before")
            continue
        began = time.monotonic()
        if isinstance(planned, PlannedRun):
            _make(study, planned)
        else:
            _draw(study, planned)
        say(f"{name}: {time.monotonic() - began:.0f} s")


def _check_unchanged(study: Study, run: PlannedRun) -> None:
    if is_claimed(run.directory) and (changed := changed_keys(load_recipe(study.recipe, run.overrides), run.directory)):
        raise RecipeError(
            f"{run.directory} holds a run of arm {run.arm!r} that began with other settings of {changed}: delete it, or"
            " choose another directory for this study"
        )


def _make(study: Study, run: PlannedRun) -> None:
    command = [sys.executable, "-m", "rlpost.cli", "train", str(study.recipe), *run.overrides]
    if is_claimed(run.directory):
        command.append("--resume")
    _call(command, f"{run.arm}, seed {run.seed}")


def _draw(study: Study, samples: PlannedSamples) -> None:
    """Also where they are there already: it is `rlpost eval` that knows, and it draws none twice."""
    command = [sys.executable, "-m", "rlpost.cli", "eval", str(study.recipe), str(study.start.model)]
    _call([*command, *samples.overrides, "-o", str(samples.directory)], f"samples, seed {samples.seed}")


def _call(command: list[str], name: str) -> None:
    # In a session of its own, so that a Ctrl-C reaches it once, through us.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        output, _ = process.communicate()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if process.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if process.returncode:
        tail = "\n".join(output.splitlines()[-TAIL_LINES:])
        raise RunFailed(f"{name}, ended with code {process.returncode}:\n{tail}")
