"""A run watched while it trains: what the observer counts, what it lets pass, and what it costs a run that breaks it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlpost.analysis import live
from rlpost.analysis.live import ObservedStage, VersionObserver
from rlpost.core.patch import diff
from rlpost.types import WeightImage

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


class Log:
    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.events: list[Mapping[str, Any]] = []
        self.pictures: list[tuple[str, int]] = []

    def __call__(self, kind: str, row: Mapping[str, Any]) -> None:
        {"analysis": self.rows, "event": self.events}[kind].append(row)

    def show(self, name: str, step: int, png: bytes) -> None:
        assert png.startswith(b"\x89PNG")
        self.pictures.append((name, step))


def image(version: int, q: list[float], norm: list[float]) -> WeightImage:
    return WeightImage(
        version=version, tensors={Q: torch.tensor(q).view(2, -1).bfloat16(), NORM: torch.tensor(norm).float()}
    )


@pytest.fixture
def versions(tmp_path: Path) -> list[WeightImage]:
    """Of two stages: entry 0 of q moves and comes back, entry 1 moves for good, the norm moves in the second stage."""
    images = [
        image(0, [1, 1, 1, 1], [1, 1]),
        image(1, [2, 1, 1, 1], [1, 1]),
        image(2, [1, 3, 1, 1], [1, 1]),
        image(3, [1, 4, 1, 1], [1, 1]),
        image(4, [1, 4, 1, 1], [1, 2]),
    ]
    for stage, start in (("one", 0), ("two", 3)):
        (tmp_path / stage).mkdir()
        save_file(dict(images[start].tensors), tmp_path / stage / "model.safetensors")
    return images


def observer(tmp_path: Path, log: Log, **options: Any) -> VersionObserver:
    stages = [
        ObservedStage(name="one", first=0, last=3, start=tmp_path / "one"),
        ObservedStage(name="two", first=3, last=4, start=tmp_path / "two"),
    ]
    return VersionObserver(stages, tmp_path, log, log.show, **{"spectra_every": 2, "budget": 1e9} | options)


def watch(observer: VersionObserver, versions: list[WeightImage]) -> None:
    base: WeightImage | None = None
    for version in versions:
        observer._work.join()
        if observer.wants(version.version):
            held = base if base is not None and observer.held == base.version else None
            observer.see(diff(held, version))
        base = version
    observer.close(20)


def test_entries_are_counted_against_the_last_version_and_the_start_of_the_stage(
    versions: list[WeightImage], tmp_path: Path
) -> None:
    log = Log()
    watch(observer(tmp_path, log), versions)
    assert [(row["step"], row["stage"]) for row in log.rows] == [(1, "one"), (2, "one"), (3, "one"), (4, "two")]
    assert [row["moved_since"] for row in log.rows] == [0, 0, 0, 3]
    keys = ("unchanged", "unchanged_since_start", "ever_moved", "returned")
    assert [pytest.approx(tuple(row[key] for key in keys)) for row in log.rows] == [
        (5 / 6, 5 / 6, 1 / 6, 0.0),
        (4 / 6, 5 / 6, 2 / 6, 1 / 2),
        (5 / 6, 5 / 6, 2 / 6, 1 / 2),
        (5 / 6, 5 / 6, 1 / 6, 0.0),
    ]
    assert [row["kinds"]["q"]["unchanged"] for row in log.rows] == [3 / 4, 2 / 4, 3 / 4, 1.0]
    assert log.rows[3]["weights"][NORM]["unchanged_since_start"] == 1 / 2
    # q at version 2 and 3 differs from its start in one entry: rank 1. Version 4 is the end of a stage.
    ranks = [
        {name: rank["numerical"] for name, rank in row["ranks"].items()} if "ranks" in row else None for row in log.rows
    ]
    assert ranks == [None, {Q: 1}, {Q: 1}, {Q: 0}]
    assert log.pictures == [("unchanged", 2), ("unchanged", 3), ("unchanged", 4)]
    assert [(event["event"], event["stage"]) for event in log.events] == [("report", "one"), ("report", "two")]
    assert "83.33" in (tmp_path / "analysis" / "one.html").read_text()


def test_while_it_is_behind_it_lets_versions_pass_and_says_which(versions: list[WeightImage], tmp_path: Path) -> None:
    """Without any budget only the first version and the ends of stages are taken, whole where one before was not."""
    log = Log()
    watch(observer(tmp_path, log, budget=0.0), versions)
    assert [(row["step"], row["passed"]) for row in log.rows] == [(3, [1, 2]), (4, [])]
    assert (
        "unchanged" not in log.rows[0]
        and log.rows[1]["unchanged"] == 5 / 6
        and log.rows[0]["unchanged_since_start"] == 5 / 6
    )
    assert log.rows[0]["ever_moved"] == 1 / 6  # what came back before it looked is not known


def test_a_stage_that_ends_early_gets_its_report_then_and_later_ones_move_up(
    versions: list[WeightImage], tmp_path: Path
) -> None:
    """Stage one of nine steps ends with version 3: the next one is version 4 alone, as in the other tests."""
    stages = [
        ObservedStage(name="one", first=0, last=9, start=tmp_path / "one"),
        ObservedStage(name="two", first=9, last=10, start=tmp_path / "two"),
    ]
    log = Log()
    watching = VersionObserver(stages, tmp_path, log, log.show, spectra_every=99, budget=0.0)
    watching.see(diff(None, versions[0]))
    watching.end_early("one", 3)
    watch(watching, versions[1:])
    assert [(row["step"], row["stage"], row["passed"]) for row in log.rows] == [(3, "one", [1, 2]), (4, "two", [])]
    assert [(event["event"], event["stage"]) for event in log.events] == [("report", "one"), ("report", "two")]


@pytest.mark.parametrize(("budget", "wanted"), [(0.35, True), (0.25, False)])
def test_the_report_of_a_stage_is_beside_the_budget(
    versions: list[WeightImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float, wanted: bool
) -> None:
    """Of ten seconds each version takes one: three count, and the last of the stage does not."""
    spent, now = iter(range(100)), iter([0.0, *([10.0] * 100)])
    monkeypatch.setattr(live.time, "thread_time", lambda: float(next(spent)))
    watching = observer(tmp_path, Log(), budget=budget, clock=lambda: next(now))
    for version in versions[:4]:
        watching.see(diff(None, version))
        watching._work.join()
    assert watching.wants(14) == wanted
    watching.close(20)


def test_what_it_was_given_is_not_waited_for(
    versions: list[WeightImage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, release = Log(), threading.Event()
    monkeypatch.setattr(VersionObserver, "_measure", lambda self, patch, passed: release.wait(10))
    watching = observer(tmp_path, log)
    watching.see(diff(None, versions[0]))
    assert not watching.wants(1)  # it is at work
    assert watching.wants(3)  # the end of a stage
    release.set()
    watching.close(20)


def test_a_wrong_version_ends_the_watching_and_not_the_run(versions: list[WeightImage], tmp_path: Path) -> None:
    log = Log()
    watching = observer(tmp_path, log)
    watching.see(diff(None, versions[0]))
    watching.see(diff(versions[1], versions[2]))
    watching.close(20)
    assert not watching.wants(3) and not log.rows
    (event,) = log.events
    assert event["event"] == "observer_failed" and "applies to version 1, and version 0 is held" in event["detail"]


def test_a_run_that_goes_on_counts_from_where_it_does(versions: list[WeightImage], tmp_path: Path) -> None:
    """Its first version is no update; the start of the stage is read from its directory. Entry 0 had moved before."""
    log = Log()
    watch(observer(tmp_path, log), versions[2:4])
    (row,) = log.rows
    assert (row["step"], row["unchanged"], row["unchanged_since_start"]) == (3, 5 / 6, 5 / 6)
    assert (row["moved_since"], row["ever_moved"]) == (2, 1 / 6)


def test_an_entry_has_moved_when_its_rounded_value_has(tmp_path: Path) -> None:
    """1 + 2^-9 is 1 in bfloat16, and 1 + 2^-7 is not: of four float32 entries that move, one does, and comes back."""
    (tmp_path / "one").mkdir()
    values = [[1.0] * 4, [1 + 2**-9] * 3 + [1 + 2**-7], [1 + 2**-8 - 2**-12] * 4]
    versions = [WeightImage(version=n, tensors={NORM: torch.tensor(value)}) for n, value in enumerate(values)]
    save_file(dict(versions[0].tensors), tmp_path / "one" / "model.safetensors")
    for dtype, expected in (
        (torch.bfloat16, [(3 / 4, 3 / 4, 1 / 4, 0.0), (3 / 4, 1.0, 1 / 4, 1.0)]),
        (None, [(0.0, 0.0, 1.0, 0.0)] * 2),
    ):
        log = Log()
        watch(observer(tmp_path, log, dtype=dtype, spectra_every=9), versions)
        keys = ("unchanged", "unchanged_since_start", "ever_moved", "returned")
        assert [tuple(row[key] for key in keys) for row in log.rows] == expected
