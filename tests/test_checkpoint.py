"""Checkpoints are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from rlpost.checkpoint import RunCheckpoints, broken_files, latest_checkpoint
from rlpost.pipeline.buffer import Position
from rlpost.pipeline.ports import Learner

POSITION = Position(
    step=8,
    next_ordinals=(24, 3),
    pending=((), (1, 2)),
    sources=({"starts": [0, 5], "left": [[], [3]], "easy": [1]}, [{"starts": [0], "left": [[]], "easy": []}]),
    temperatures=(0.7, 1.0 / 3),
)


class FileLearner:
    """Writes two files; may die between them."""

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies

    async def save(self, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"w" * 1000)
        if self.dies:
            raise RuntimeError("killed while saving")
        (path / "optimizer").write_bytes(b"o" * 1000)


def checkpoints(run_dir: Path, **settings: Any) -> RunCheckpoints:
    return RunCheckpoints(run_dir, fingerprints=["a", "b"], on_event=lambda *a, **k: None, **settings)


def write(run_dir: Path, step: int, learner: Any = None, **settings: Any) -> None:
    asyncio.run(
        checkpoints(run_dir, **settings).write(replace(POSITION, step=step), cast(Learner, learner or FileLearner()))
    )


def no_report(path: Path, files: list[str]) -> None:
    raise AssertionError(f"{path} reported as broken: {files}")


def test_what_is_written_is_found_with_its_position_and_data(tmp_path: Path) -> None:
    write(tmp_path, 8)
    found = latest_checkpoint(tmp_path, no_report)
    assert found is not None and found.position == POSITION and found.fingerprints == ("a", "b")
    assert (found.learner_path / "weights").read_bytes() == b"w" * 1000


def test_a_death_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 8)
    with pytest.raises(OSError, match=r"checkpoint of step 9 could not be written .* MiB free: killed"):
        write(tmp_path, 9, FileLearner(dies=True))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000008"]
    found = latest_checkpoint(tmp_path, no_report)
    assert found is not None and found.position.step == 8
    write(tmp_path, 9)  # and the remains do not stand in the way of the next
    found = latest_checkpoint(tmp_path, no_report)
    assert found is not None and found.position.step == 9


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 8)
    write(tmp_path, 9)
    newest = tmp_path / "checkpoints" / "step-00000009"
    weights = newest / "learner" / "weights"
    match damage:
        case "truncate":
            weights.write_bytes(b"w" * 999)
        case "flip":
            weights.write_bytes(b"w" * 999 + b"v")
        case "delete":
            weights.unlink()
        case "manifest":
            (newest / "manifest.json").unlink()
        case "empty manifest":
            (newest / "manifest.json").write_bytes(b"")
    reports: list[tuple[Path, list[str]]] = []
    found = latest_checkpoint(tmp_path, lambda path, files: reports.append((path, files)))
    assert found is not None and found.position.step == 8
    assert reports == [(newest, ["manifest.json" if "manifest" in damage else "learner/weights"])]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_taken_for_one_without(tmp_path: Path) -> None:
    write(tmp_path, 8)
    (tmp_path / "checkpoints" / "step-00000008" / "learner" / "weights").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole \(step-00000008\)"):
        latest_checkpoint(tmp_path, lambda path, files: None)


def test_remains_of_any_killed_write_give_their_room_back(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000009.partial" / "learner").mkdir(parents=True)
    write(tmp_path, 11)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000011"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000010"]


def test_a_full_disk_is_found_out_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 8)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(OSError, match=r"no room for a checkpoint.*--resume"):
        write(tmp_path, 9)
    assert not broken_files(tmp_path / "checkpoints" / "step-00000008")


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, no_report) is None
