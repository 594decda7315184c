"""Two model directories compared: what was planted is found, and what cannot be compared is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlpost import cli, exit_codes
from rlpost.analysis.measure import WeightRow, analyze, by_kind
from rlpost.archive import VERSIONS, VersionArchive
from rlpost.core.patch import diff
from rlpost.types import WeightImage

Q, NORM, UP = "model.layers.3.self_attn.q_proj.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def rows_of(before: object, after: object, **options: Any) -> tuple[WeightRow, ...]:
    """Of one update."""
    (update,) = analyze(str(before), [str(after)], **options).updates
    return update.rows


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {Q: torch.randn(20, 10).bfloat16(), UP: torch.randn(30, 20).bfloat16(), NORM: torch.ones(20).bfloat16()}


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """Row 4 of q changes, by a multiple of one direction; two entries of up; the norm stays."""
    before = weights()
    after = {name: tensor.clone() for name, tensor in before.items()}
    after[Q][4] = before[Q][4] * 2
    after[UP][0, :2] += 1
    return save(tmp_path / "before", before), save(tmp_path / "after", after)


def test_a_planted_update_is_found_where_it_is(planted: tuple[Path, Path]) -> None:
    rows = {row.name: row for row in rows_of(*planted, spectra=True)}
    assert [(rows[n].kind, rows[n].layer) for n in (Q, UP, NORM)] == [("q", 3), ("up", 0), ("norm", None)]
    assert [rows[n].sparsity.bit_equal for n in (Q, UP, NORM)] == [190, 598, 20]
    assert (rows[Q].untouched_rows, rows[Q].untouched_columns) == (19, 0)
    assert (rows[UP].untouched_rows, rows[UP].untouched_columns) == (29, 18)
    spectra = {name: row.spectrum for name, row in rows.items()}
    assert spectra[NORM] is None
    for name in (Q, UP):
        spectrum = spectra[name]
        assert spectrum is not None and spectrum.ranks.numerical == spectrum.ranks.energy_99 == 1
        assert spectrum.intruders == 0 and 0 < spectrum.shift < 1
    pooled = by_kind(list(rows.values()))
    assert list(pooled) == ["q", "up", "norm", "all"] and len(pooled["all"]) == 3


def test_the_command_prints_a_line_per_kind_and_writes_every_figure(
    planted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = map(str, planted)
    out = tmp_path / "figures.json"
    assert cli.main(["analyze", before, after, "--spectra", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if " -> " not in line) <= 80
    (all_line, *_) = [line for line in text.splitlines() if line.startswith("all")]
    assert all_line.split()[:4] == ["all", "3", "820", "98.54"]
    content = json.loads(out.read_text())["updates"][after]
    assert content["kinds"]["q"]["bit_equal"] == 190 and content["kinds"]["all"]["within"]["1e-05"] == 808
    assert len(content["weights"]) == 3 and len(content["weights"][0]["spectrum"]["singular_values"]) == 20


def test_identical_directories_are_unchanged_everywhere(planted: tuple[Path, Path]) -> None:
    for row in rows_of(planted[0], planted[0], spectra=True):
        assert row.sparsity.unchanged == row.sparsity.share(row.sparsity.predicted) == 1.0
        assert row.spectrum is None or (row.spectrum.ranks.numerical, row.spectrum.shift) == (0, 0.0)


def test_what_cannot_be_compared_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = save(tmp_path / "before", weights())
    cases = {
        "dtype": (weights() | {Q: weights()[Q].float()}, rf"{Q} is .*\(--dtype\)"),
        "shape": (weights() | {UP: torch.zeros(31, 20).bfloat16()}, rf"{UP} is \(30, 20\) in .*\(31, 20\)"),
        "lonely": (weights() | {"extra": torch.zeros(2)}, r"extra is only in .*lonely \(1 such"),
        "nan": (weights() | {NORM: torch.full((20,), torch.nan).bfloat16()}, rf"{NORM}: .*not finite"),
    }
    for name, (tensors, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            rows_of(before, save(tmp_path / name, tensors))
    assert all(row.dtype == "float32" for row in rows_of(before, tmp_path / "dtype", dtype=torch.float32))
    (tmp_path / "empty").mkdir()
    assert cli.main(["analyze", str(before), str(tmp_path / "empty")]) == exit_codes.USAGE
    assert "has no *.safetensors" in capsys.readouterr().err


def test_several_updates_are_compared_with_each_other(
    planted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second changes half of what the first does of q, and nothing of up."""
    before, first = planted
    tensors = weights()
    tensors[Q][4, :5] += 1
    second = save(tmp_path / "second", tensors)
    (comparison,) = analyze(str(before), [str(first), str(second)]).comparisons
    found = comparison.kinds
    assert list(found) == ["q", "up", "norm", "all"]
    assert (found["q"].first, found["q"].second, found["q"].both, found["q"].uniform) == (10, 5, 5, 10 * 5 / 200)
    assert (found["all"].first, found["all"].both) == (12, 5)
    out = tmp_path / "figures.json"
    assert cli.main(["analyze", *map(str, (before, first, second)), "-o", str(out)]) == 0
    assert "50.0 %" in next(
        line for line in capsys.readouterr().out.split("changed, of")[1].splitlines() if line[:1] == "q"
    )
    content = json.loads(out.read_text())
    assert list(content["updates"]) == [str(first), str(second)]
    assert content["overlaps"][0]["kinds"]["q"]["both"] == 5


def test_a_version_of_a_runs_archive_stands_for_a_directory(planted: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    archive = VersionArchive(run / VERSIONS)
    images = [WeightImage(version=n, tensors=load_file(p / "model.safetensors")) for n, p in enumerate(planted)]
    archive.append(diff(None, images[0]))
    archive.append(diff(images[0], images[1]))
    expected = rows_of(*planted)
    assert rows_of(f"{run}@0", f"{run}@1") == rows_of(planted[0], f"{run}@1") == expected
    assert cli.main(["analyze", f"{run}@0", f"{run}@2"]) == exit_codes.USAGE
    assert cli.main(["analyze", f"{run}@0", f"{tmp_path}/nowhere@1"]) == exit_codes.USAGE
