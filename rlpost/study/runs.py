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
from rlpost.study.plan import PlannedRun, Study
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
    planned = [study.start, *study.runs]
    for run in planned:
        _check_unchanged(study, run)
    for number, run in enumerate(planned, start=1):
        name = f"{number}/{len(planned)} {run.arm}, seed {run.seed}"
        if run_ended(run.directory):
            say(f"{name}: done before")
            continue
        began = time.monotonic()
        _make(study, run)
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
        raise RunFailed(f"{run.arm}, seed {run.seed}, ended with code {process.returncode}:\n{tail}")
