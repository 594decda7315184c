"""Where figures go: six JSONL files that are the truth, their mirror in wandb, and lines on the terminal.

    log(kind, row) -> file, at once, in the caller's thread      one file of each kind (`FILES`)
                   -> terminal, thinned out (`rlpost.progress`)
                   -> a queue -> one background thread -> wandb  (`rlpost.mirror`; may be late, fail or be absent)

Every row gets "time", seconds since the epoch. All keys are described in docs/metrics.md.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from rlpost.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from rlpost.mirror import WandbMirror

FILES = {
    "step": "metrics.jsonl",
    "eval": "eval.jsonl",
    "eval_sample": "eval_samples.jsonl",
    "analysis": "analysis.jsonl",
    "rollout": "rollouts.jsonl",
    "event": "events.jsonl",
}
PICTURES = "pictures"
"""Where the directory of a run has what `RunTracker.show` was given."""
SESSIONS = "run.json"
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbOptions:
    """How runs are mirrored."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: WANDB_MODE if set, else online when somebody is logged in, else offline."""
    project: str = "rlpost"
    entity: str | None = None
    table_every: int = 20
    """Steps whose rollouts, as far as they are written out, make a table; 0: none."""


class RunTracker:
    """Implements `pipeline.controller.Tracker`. `log` may be called from any thread.

    Args:
        config: the resolved recipe, shown in wandb.
        session: what this process is (`provenance`): added to the list in run.json, and shown in wandb under "run".
        resume_at_step: the step of the checkpoint a run continues from; later rows of the files are cut off. None: a
            new run, whose directory must not hold the figures of another.
        stages: name and number of steps of each stage, for the progress lines.
        summarize: gives the figures of `summary.collect` for wandb's summary, at the end of stages and of the run.

    Raises:
        ValueError: when a new run finds figures of an earlier one in `run_dir`, or a file to resume from is damaged.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        name: str,
        config: Mapping[str, Any],
        session: Mapping[str, Any] | None = None,
        wandb: WandbOptions | None = None,
        resume_at_step: int | None = None,
        stages: Sequence[tuple[str, int]] = (),
        summarize: Callable[[Path], Mapping[str, Any]] | None = None,
        console: Console | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        num_cut = _prepare_files(run_dir, resume_at_step)
        self._lock = threading.Lock()
        self._progress = Progress(stages, console)
        self._closed = False
        self._mirror: WandbMirror | None = None
        if session is not None:
            _add_session(run_dir / SESSIONS, plain(session))
            config = {**config, "run": session}
        options = wandb or WandbOptions()
        mode = resolve_mode(options.mode)
        began = time.time()
        self._event("run_start", run=name, resumed_at=resume_at_step, rows_cut=num_cut, run_dir=str(run_dir))
        if mode != "disabled":
            from rlpost.mirror import WandbMirror

            self._mirror = WandbMirror(
                run_dir,
                name,
                config,
                options,
                mode,
                self._event,
                stored_before=None if resume_at_step is None else began,
                summarize=summarize,
            )

    def log(self, kind: str, row: Mapping[str, Any]) -> None:
        """Append `row` to the file of its kind (a key of `FILES`); it is there for others to read on return."""
        row = {**row, "time": time.time()}
        with self._lock:
            with (self.run_dir / FILES[kind]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row), allow_nan=False) + "\n")
            self._progress.show(kind, row)
        if self._mirror is not None:
            self._mirror.put(kind, row)

    def show(self, name: str, step: int, png: bytes) -> None:
        """Keep a picture, beside the rows of kind "analysis"."""
        path = self.run_dir / PICTURES / f"{name}-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png)
        if self._mirror is not None:
            self._mirror.put("picture", picture_row(path))

    def close(self, error: str | None = None, *, deadline_s: float = 10.0) -> None:
        """End the run: give wandb `deadline_s` to take what is still queued. A second call does nothing.

        A run that ends by an error may have no disk left to say so on.
        """
        if self._closed:
            return
        self._closed = True
        if self._mirror is not None:
            self._mirror.close(deadline_s, complete=error is None)
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self._event("run_end", error=error)
        with self._lock:
            self._progress.flush()

    def __enter__(self) -> RunTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else f"{type(error).__name__}: {error}")

    def _event(self, name: str, **details: Any) -> None:
        self.log("event", {"event": name, **details})


# -- files -------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: scalars of tensor libraries become numbers, nan and inf the strings "nan", "inf".

    Example:
        plain({"loss": math.nan, "lr": numpy.float32(0.5)}) == {"loss": "nan", "lr": 0.5}; float("nan") reads it back.
    """
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one of the files, none if it does not exist; a last line that a kill cut short is left out.

    Raises:
        ValueError: when any other line is not JSON.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error.msg}): {line[:80]!r}. Was it edited? Remove that line"
                ) from error


def trained_on(row: Mapping[str, Any]) -> tuple[int, int]:
    """Rollouts of a step and tokens of their responses, counted back from the rates in its row of metrics.jsonl."""
    seconds = row["timing_s/step"]
    return round(row["perf/rollouts_per_s"] * seconds), round(row["perf/tokens_per_s"] * seconds)


def run_ended(run_dir: Path) -> bool:
    """Whether the last thing that happened in `run_dir` is the regular end of its run, every evaluation included."""
    last = deque(read_rows(run_dir / FILES["event"]), maxlen=1)
    return bool(last) and last[0]["event"] == "run_end" and last[0]["error"] is None


def cut_rows(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> int:
    """Leave the rows of `path` that `keep` is true of, in one atomic replacement; returns how many went."""
    num_cut, fresh = 0, path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        for row in read_rows(path):
            if keep(row):
                file.write(json.dumps(row) + "\n")
            else:
                num_cut += 1
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return num_cut


def picture_row(path: Path) -> dict[str, Any]:
    """A row of kind "picture", from the name that `RunTracker.show` gave the file."""
    name, _, step = path.stem.rpartition("-")
    return {"name": name, "step": int(step), "path": str(path), "time": path.stat().st_mtime}


def _add_session(path: Path, session: Mapping[str, Any]) -> None:
    sessions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(json.dumps([*sessions, session], indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)


def _prepare_files(run_dir: Path, resume_at_step: int | None) -> dict[str, int]:
    if resume_at_step is not None:
        for picture in (run_dir / PICTURES).glob("*.png"):
            if picture_row(picture)["step"] > resume_at_step:
                picture.unlink()
        cut = {file: cut_rows(run_dir / file, _stays(kind, run_dir, resume_at_step)) for kind, file in FILES.items()}
        return {file: num_rows for file, num_rows in cut.items() if num_rows}
    if any((run_dir / file).exists() and (run_dir / file).stat().st_size for file in FILES.values()):
        raise ValueError(
            f"{run_dir} holds the figures of an earlier run: continue it with --resume, or choose another run directory"
        )
    return {}


def _stays(kind: str, run_dir: Path, step: int) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a row outlives a resume from the checkpoint of `step`."""
    if kind == "eval":  # of the checkpoint's version, evaluations are made again, but for those due every few steps
        return lambda row: row["step"] < step or (row["step"] == step and row["when"] == "step")
    if kind == "eval_sample":  # that of an evaluation which has a row: `FILES` has them in this order

        def evaluation(row: Mapping[str, Any]) -> tuple[str, str, int]:
            return row["eval"], row["when"], row["step"]

        ended = set(map(evaluation, read_rows(run_dir / FILES["eval"])))
        return lambda row: evaluation(row) in ended
    return lambda row: row.get("step") is None or row["step"] <= step


# -- wandb -------------------------------------------------------------------------------------------------------------


def wandb_login() -> str | None:
    """Where wandb's credentials come from (never what they are), or None. Does not import wandb."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    base_url = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(base_url).netloc,) if base_url else WANDB_HOSTS
    try:
        accounts = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return None
    return str(path) if any(accounts.authenticators(host) for host in hosts) else None


def resolve_mode(mode: str) -> str:
    """online or offline (or disabled) for `mode`, by the rule of `WandbOptions.mode`."""
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if wandb_login() else "offline")
