"""Where figures go: five JSONL files that are the truth, their mirror in wandb, and lines on the terminal.

    log(kind, row) -> file, at once, in the caller's thread      one file of each kind (`FILES`)
                   -> terminal, thinned out (`rlpost.progress`)
                   -> a queue -> one background thread -> wandb  (may be late, fail or be absent: the run goes on)

Every row gets "time", seconds since the epoch. All keys are described in docs/metrics.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import netrc
import os
import queue
import secrets
import sys
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

FILES = {
    "step": "metrics.jsonl",
    "eval": "eval.jsonl",
    "analysis": "analysis.jsonl",
    "rollout": "rollouts.jsonl",
    "event": "events.jsonl",
}
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
MAX_QUEUED_ROWS = 10_000
MIRRORED = {"step": "train/step", "eval": "eval/step", "analysis": "analysis/step", "picture": "analysis/step"}
"""Kinds of rows that wandb gets, and its axis for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbOptions:
    """How runs are mirrored."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: WANDB_MODE if set, else online when somebody is logged in, else offline."""
    project: str = "rlpost"
    entity: str | None = None


class RunTracker:
    """Implements `pipeline.controller.Tracker`. `log` may be called from any thread.

    Args:
        config: the resolved recipe, shown in wandb.
        resume_at_step: the step of the checkpoint a run continues from; later rows of the files are cut off. None: a
            new run, whose directory must not hold the figures of another.
        stages: name and number of steps of each stage, for the progress lines.

    Raises:
        ValueError: when a new run finds figures of an earlier one in `run_dir`, or a file to resume from is damaged.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        name: str,
        config: Mapping[str, Any],
        wandb: WandbOptions | None = None,
        resume_at_step: int | None = None,
        stages: Sequence[tuple[str, int]] = (),
        console: Console | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        num_cut = _prepare_files(run_dir, resume_at_step)
        self._lock = threading.Lock()
        self._progress = Progress(stages, console)
        self._closed = False
        self._mirror: WandbMirror | None = None
        self._event("run_start", run=name, resumed_at=resume_at_step, rows_cut=num_cut, run_dir=str(run_dir))
        options = wandb or WandbOptions()
        mode = resolve_mode(options.mode)
        if mode != "disabled":
            self._mirror = WandbMirror(run_dir, name, config, options, mode, self._event)

    def log(self, kind: str, row: Mapping[str, Any]) -> None:
        """Append `row` to the file of its kind (a key of `FILES`); it is there for others to read on return."""
        row = {**row, "time": time.time()}
        with self._lock:
            with (self.run_dir / FILES[kind]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row), allow_nan=False) + "\n")
            self._progress.show(kind, row)
        if self._mirror is not None and kind in MIRRORED:
            self._mirror.put(kind, row)

    def show(self, name: str, step: int, png: bytes) -> None:
        """A picture for wandb, beside the rows of kind "analysis"."""
        if self._mirror is not None:
            self._mirror.put("picture", {"name": name, "step": step, "png": png})

    def close(self, error: str | None = None, *, deadline_s: float = 10.0) -> None:
        """End the run: give wandb `deadline_s` to take what is still queued. A second call does nothing.

        A run that ends by an error may have no disk left to say so on.
        """
        if self._closed:
            return
        self._closed = True
        if self._mirror is not None:
            self._mirror.close(deadline_s)
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


def run_ended(run_dir: Path) -> bool:
    """Whether the last thing that happened in `run_dir` is the regular end of its run, every evaluation included."""
    last = deque(read_rows(run_dir / FILES["event"]), maxlen=1)
    return bool(last) and last[0]["event"] == "run_end" and last[0]["error"] is None


def cut_rows(path: Path, step: int) -> int:
    """Keep the rows of `path` up to `step`, and those of no step, in one atomic replacement; returns how many went."""
    num_cut, fresh = 0, path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        for row in read_rows(path):
            if row.get("step") is None or row["step"] <= step:
                file.write(json.dumps(row) + "\n")
            else:
                num_cut += 1
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    return num_cut


def _prepare_files(run_dir: Path, resume_at_step: int | None) -> dict[str, int]:
    paths = [run_dir / file for file in FILES.values()]
    if resume_at_step is not None:
        return {path.name: num_cut for path in paths if (num_cut := cut_rows(path, resume_at_step))}
    if any(path.exists() and path.stat().st_size for path in paths):
        raise ValueError(
            f"{run_dir} holds the figures of an earlier run: continue it with --resume, or choose another run directory"
        )
    return {}


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


class WandbMirror:
    """The only writer to wandb: a thread of its own, so that nothing wandb does or fails to do reaches the run."""

    def __init__(
        self,
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        options: WandbOptions,
        mode: str,
        on_event: Callable[..., None],
    ) -> None:
        self._run_dir, self._name, self._config = run_dir, name, plain(config)
        self._options, self._mode, self._on_event = options, mode, on_event
        self._rows: queue.Queue[tuple[str, Mapping[str, Any]] | None] = queue.Queue(MAX_QUEUED_ROWS)
        self._failure = threading.Lock()  # taken once, by whoever reports the failure
        self._families: set[str] = set()
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def put(self, kind: str, row: Mapping[str, Any]) -> None:
        """Queue a row; never waits."""
        if not self._failure.locked():
            self._put((kind, row))

    def close(self, deadline_s: float) -> None:
        """Wait at most `deadline_s` for the queued rows to arrive and the wandb run to end."""
        self._put(None)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._fail(f"it did not finish within {deadline_s:g} s (is the network down?)")
            _end_service()

    def _put(self, item: tuple[str, Mapping[str, Any]] | None) -> None:
        try:
            self._rows.put_nowait(item)
        except queue.Full:
            self._fail(f"{MAX_QUEUED_ROWS} rows wait for it")

    def _fail(self, detail: str) -> None:
        if self._failure.acquire(blocking=False):
            self._on_event("wandb_failed", detail=detail)

    def _serve(self) -> None:
        try:
            run = self._start()
            while (item := self._rows.get()) is not None:
                if self._failure.locked():
                    return
                run.log(self._figures(run, *item))
            run.finish()
        except BaseException as error:  # noqa: BLE001 - a mirror must not end a run, whatever breaks in it; reported once
            self._fail(f"{type(error).__name__}: {error}")

    def _start(self) -> Any:
        if self._mode == "online" and wandb_login() is None:
            # wandb would ask for a key on the terminal, from this thread.
            raise RuntimeError("nobody is logged in: run `wandb login`, or choose mode = 'offline'")
        import wandb

        id_path = self._run_dir / "wandb_id"
        if not id_path.exists():
            id_path.write_text(secrets.token_hex(4), encoding="utf-8")
        run = wandb.init(
            project=self._options.project,
            entity=self._options.entity,
            name=self._name,
            id=id_path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(self._run_dir),
            mode=self._mode,  # type: ignore[arg-type]
            config=self._config,
            settings=wandb.Settings(console="off", silent=True, login_timeout=1.0, finish_timeout=8.0),
        )
        where = (
            f"offline; `wandb sync {self._run_dir}/wandb/offline-run-*` uploads it"
            if self._mode == "offline"
            else run.url
        )
        self._on_event("wandb_started", mode=self._mode, id=run.id, where=where)
        return run

    def _figures(self, run: Any, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of a row under wandb's names, each family on an axis of its own, not on wandb's step counter."""
        axis = MIRRORED[kind]
        if kind == "picture":
            figures: dict[str, Any] = {f"analysis/{row['name']}_picture": _wandb_image(row["png"])}
        else:
            prefix = {"step": "", "eval": f"eval/{row.get('eval')}/", "analysis": "analysis/"}[kind]
            # Of an analysis what is pooled; its rows for single weights stay in the file.
            shown = {key: value for key, value in row.items() if key not in ("step", "time", "weights", "ranks")}
            figures = {prefix + key: value for key, value in _numbers(shown).items()}
        for family in sorted({key.split("/")[0] for key in figures} - self._families):
            run.define_metric(axis)
            run.define_metric(f"{family}/*", step_metric=axis)
            self._families.add(family)
        return {**figures, axis: row["step"]}


def _wandb_image(png: bytes) -> Any:
    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(png)))


def _end_service() -> None:
    """Kill wandb's helper process: its exit hook would otherwise hold ours up for as long as the network is silent."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("wandb-core"):
                child.kill()

    def remove_exit_hook() -> None:
        with contextlib.suppress(Exception):  # it complains that the helper is gone
            sys.modules["wandb"].teardown()

    thread = threading.Thread(target=remove_exit_hook, daemon=True)
    thread.start()
    thread.join(1.0)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of a row, those of a mapping in it by their path; text and lists stay in the files."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            numbers |= {f"{key}/{inner}": number for inner, number in _numbers(value).items()}
        elif isinstance(value, int | float):
            numbers[key] = value
        elif isinstance(scalar := plain(value), int | float):
            numbers[key] = scalar
    return numbers
