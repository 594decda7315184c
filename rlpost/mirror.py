"""A run's figures in wandb: the files of its directory, shown again, and what is added to them.

    rows of the files, on a resume ->
                                     one thread -> figures, tables, pictures, summary, artifacts -> wandb
    rows as they are logged        ->

Every row is shown once. What wandb holds is known from the list in wandb.jsonl and, online, from the service's own count
of rows: a killed process takes with it what wandb had not sent yet, up to a minute's worth. An offline run is written
anew from the files by each process that continues it, and takes the place of the one before.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import queue
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from rlpost.tracking import FILES, PICTURES, SESSIONS, WandbOptions, picture_row, plain, read_rows, wandb_login

MIRRORED = "wandb.jsonl"
"""First the run's id and mode, then a line per row that was handed to wandb, in order."""
MAX_QUEUED_ROWS = 10_000
AXES = {
    "step": "train/step",
    "eval": "eval/step",
    "analysis": "analysis/step",
    "picture": "analysis/step",
    "table": "samples/step",
}
"""wandb's axis for each kind of row."""
SHOWN_EVENTS = ("ready", "export", "report", "stage_end")
COLUMNS = ("step", "stage", "prompt_id", "prompt", "response", "outcome", "reward", "advantage", "versions")
MAX_ADAPTER_BYTES = 100 << 20
"""A larger adapter stays where it is, as all models do; wandb gets its path."""
ADAPTER = "adapter"

Row = Mapping[str, Any]
Key = tuple[str, int, str]
"""Kind, step and name of what is shown."""


class WandbMirror:
    """The only writer to wandb: a thread of its own, so that nothing wandb does or fails to do reaches the run.

    Args:
        config: shown as the run's configuration.
        stored_before: rows of the files from before this time are shown first; None: there are none.
        summarize: gives the figures of `summary.collect`.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        options: WandbOptions,
        mode: str,
        on_event: Callable[..., None],
        *,
        stored_before: float | None = None,
        summarize: Callable[[Path], Mapping[str, Any]] | None = None,
    ) -> None:
        self._run_dir, self._name, self._config = run_dir, name, plain(config)
        self._options, self._mode, self._on_event = options, mode, on_event
        self._stored_before, self._summarize = stored_before, summarize
        self._rows: queue.Queue[tuple[str, Row] | None] = queue.Queue(MAX_QUEUED_ROWS)
        self._failure = threading.Lock()  # taken once, by whoever reports the failure
        self._families: set[str] = set()
        self._held: set[Key] = set()
        self._next_row = 0
        self._table: list[Row] = []
        self._complete = False
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def put(self, kind: str, row: Row) -> None:
        """Queue a row, or an event; never waits. Samples of evaluations, of which thousands come at once, stay in their file."""
        if kind != "eval_sample" and not self._failure.locked():
            self._put((kind, row))

    def close(self, deadline_s: float, *, complete: bool) -> None:
        """Wait at most `deadline_s` for the queued rows to arrive and the wandb run to end.

        Args:
            complete: the run has come to its end, and what is left for a table makes one.
        """
        self._complete = complete
        self._put(None)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._fail(f"it did not finish within {deadline_s:g} s (is the network down?)")
            _end_service()

    def _put(self, item: tuple[str, Row] | None) -> None:
        try:
            self._rows.put_nowait(item)
        except queue.Full:
            self._fail(f"{MAX_QUEUED_ROWS} rows wait for it")

    def _fail(self, detail: str) -> None:
        if self._failure.acquire(blocking=False):
            self._on_event("wandb_failed", detail=detail)

    # -- in its thread -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            run = self._start()
            for kind, row in chain(self._stored(), iter(self._rows.get, None)):
                if self._failure.locked():
                    return
                self._show(run, kind, row)
            if self._complete:
                self._show_table(run)
            self._update_summary(run)
            run.finish()
        except BaseException as error:  # noqa: BLE001 - a mirror must not end a run, whatever breaks in it; reported once
            self._fail(f"{type(error).__name__}: {error}")

    def _start(self) -> Any:
        if self._mode == "online" and wandb_login() is None:
            # wandb would ask for a key on the terminal, from this thread.
            raise RuntimeError("nobody is logged in: run `wandb login`, or choose mode = 'offline'")
        import wandb

        # Tables and artifacts of an offline run wait there for their upload.
        os.environ.setdefault("WANDB_DATA_DIR", str(self._run_dir / "wandb"))
        identity, handed_over = self._identity()
        run = wandb.init(
            project=self._options.project,
            entity=self._options.entity,
            name=self._name,
            id=identity["id"],
            resume="allow",
            dir=str(self._run_dir),
            mode=self._mode,  # type: ignore[arg-type]
            config=self._config,
            settings=wandb.Settings(console="off", silent=True, login_timeout=1.0, finish_timeout=8.0),
        )
        # Of what was handed over, the service's own count says how much it has.
        self._next_row = run.starting_step
        held = [line for line in handed_over if line["row"] < self._next_row]
        self._held = {(line["kind"], line["step"], line["name"]) for line in held}
        self._write_lines([identity, *held])
        where = (
            f"offline; `wandb sync {self._run_dir}/wandb/offline-run-*` uploads it"
            if self._mode == "offline"
            else run.url
        )
        self._on_event("wandb_started", mode=self._mode, id=run.id, where=where)
        return run

    def _identity(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The wandb run to continue, and what it was given; a fresh one where there is none that could be continued."""
        lines = list(read_rows(self._run_dir / MIRRORED))
        if lines and lines[0]["mode"] == self._mode:
            earlier = list((self._run_dir / "wandb").glob(f"offline-run-*-{lines[0]['id']}"))
            # wandb appends what is synced: after an upload the rows before it would be there twice.
            if not any(list(path.glob("*.synced")) for path in earlier):
                for path in earlier:
                    shutil.rmtree(path)
                return lines[0], lines[1:]
        identity = {"id": secrets.token_hex(4), "mode": self._mode}
        self._write_lines([identity])
        return identity, []

    def _write_lines(self, lines: list[dict[str, Any]]) -> None:
        path = self._run_dir / MIRRORED
        fresh = path.with_name(path.name + ".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        fresh.replace(path)

    def _stored(self) -> Iterator[tuple[str, Row]]:
        """What the files hold from before this process, in order of time."""
        if self._stored_before is None:
            return
        limit = self._stored_before

        def rows(kind: str) -> Iterator[tuple[str, Row]]:
            return (
                (kind, row)
                for row in takewhile(lambda row: row["time"] < limit, read_rows(self._run_dir / FILES[kind]))
            )

        pictures = map(picture_row, (self._run_dir / PICTURES).glob("*.png"))
        streams = [
            *(rows(kind) for kind in ("step", "eval", "analysis", "rollout", "event")),
            sorted((("picture", row) for row in pictures), key=lambda item: item[1]["time"]),
        ]
        yield from heapq.merge(*streams, key=lambda item: item[1]["time"])

    def _show(self, run: Any, kind: str, row: Row) -> None:
        if kind in ("step", "eval", "analysis", "picture"):
            self._log(run, _key(kind, row), _figures(kind, row))
        elif kind == "rollout" and self._options.table_every:
            if self._table and self._block(row) != self._block(self._table[-1]):
                self._show_table(run)
            self._table.append(row)
        elif kind == "event" and row["event"] in SHOWN_EVENTS:
            self._show_event(run, row)

    def _block(self, row: Row) -> int:
        """The last step of those that share a table with this row's."""
        return -(-row["step"] // self._options.table_every) * self._options.table_every

    def _show_table(self, run: Any) -> None:
        if not self._table:
            return
        import wandb

        data: Any = [[_cell(row.get(column)) for column in COLUMNS] for row in self._table]
        step = self._block(self._table[-1])
        table = {"samples/rollouts": wandb.Table(columns=list(COLUMNS), data=data)}
        self._log(run, ("table", step, ""), table)
        self._table = []

    def _show_event(self, run: Any, row: Row) -> None:
        if row["event"] == "ready":
            self._log_artifact(run, "recipe", [self._run_dir / "recipe.json", self._run_dir / SESSIONS])
        elif row["event"] == "stage_end":
            self._update_summary(run)
        elif row["event"] == "report":
            self._log_artifact(run, "report", [Path(row["path"])], alias=row["stage"])
        else:
            export = Path(row["path"])
            adapter = export / ADAPTER
            size = sum(file.stat().st_size for file in adapter.glob("*"))
            self._log_artifact(run, "model", [adapter if 0 < size < MAX_ADAPTER_BYTES else export], alias=row["stage"])

    def _log_artifact(self, run: Any, kind: str, paths: list[Path], *, alias: str | None = None) -> None:
        """Files and an adapter's directory as they are, a model's by its path. What is gone is left out.

        wandb knows content it has, so that an artifact shown again on a resume stays one.
        """
        import wandb

        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        present = [path for path in paths if path.exists()]
        for path in present:
            if path.is_file():
                artifact.add_file(str(path), policy="immutable")
            elif path.name == ADAPTER:
                artifact.add_dir(str(path), policy="immutable")
            else:
                artifact.add_reference(f"file://{path}", checksum=False)
        if present:
            run.log_artifact(artifact, aliases=["latest", *([alias] if alias else [])])

    def _update_summary(self, run: Any) -> None:
        """The run as a whole and each of its stages, from the files."""
        if self._summarize is not None:
            run_figures = dict(self._summarize(self._run_dir))
            figures = {"stages": run_figures.pop("stages"), "run": run_figures}
            run.summary.update(_numbers(figures))

    def _log(self, run: Any, key: Key, figures: Mapping[str, Any]) -> None:
        """One row, each family of figures on an axis of its own, not on wandb's step counter."""
        if key in self._held:
            return
        kind, step, name = key
        axis = AXES[kind]
        for family in sorted({figure.split("/")[0] for figure in figures} - self._families):
            run.define_metric(axis)
            run.define_metric(f"{family}/*", step_metric=axis)
            self._families.add(family)
        # Written first: a line too many shows in the service's count, a missing one would be a row shown twice.
        with (self._run_dir / MIRRORED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": self._next_row, "kind": kind, "step": step, "name": name}) + "\n")
        run.log({**figures, axis: step})
        self._held.add(key)
        self._next_row += 1


def _key(kind: str, row: Row) -> Key:
    name = {"eval": f"{row.get('eval')}/{row.get('when')}", "picture": row.get("name")}.get(kind)
    return kind, row["step"], name or ""


def _figures(kind: str, row: Row) -> dict[str, Any]:
    """The numbers of a row under wandb's names."""
    if kind == "picture":
        import wandb

        return {f"analysis/{row['name']}_picture": wandb.Image(row["path"])}
    prefix = {"step": "", "eval": f"eval/{row.get('eval')}/", "analysis": "analysis/"}[kind]
    # Of an analysis what is pooled; its rows for single weights stay in the file.
    shown = {key: value for key, value in row.items() if key not in ("step", "time", "weights", "ranks")}
    return {prefix + key: value for key, value in _numbers(shown).items()}


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | Mapping) else value


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
        elif isinstance(value, str) and value in ("nan", "inf", "-inf"):  # as `plain` writes them
            numbers[key] = float(value)
        elif isinstance(scalar := plain(value), int | float):
            numbers[key] = scalar
    return numbers
