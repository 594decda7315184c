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
from rlpost.analysis.measure import WeightRow, analyze, by_kind, measure, pool
from rlpost.analysis.stored import HeldVersion, Versions
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
        assert spectrum.intruders == 0 and spectrum.shift is not None and 0 < spectrum.shift < 1
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


def test_changed_entries_are_held_against_the_principal_and_the_smallest(tmp_path: Path) -> None:
    """Row 0 is 8 and carries the leading direction, the diagonal below is 1, the rest 0: of 10 principal entries all are of
    row 0, the 10 smallest are row 1 but (1, 1), and (2, 0). The first update changes 5 entries of row 0, (1, 0), (1, 2) and
    three elsewhere; the second all of row 0. The 10 largest entries are the three last bins of magnitude, all principal, so
    that matched chance finds as many there as changed."""
    before = {f"model.layers.{layer}.mlp.up_proj.weight": torch.zeros(20, 10) for layer in range(2)}
    for weight in before.values():
        weight[0] = 8.0
        weight[1:10].fill_diagonal_(0.0)
        weight[torch.arange(1, 10), torch.arange(1, 10)] = 1.0
    after = {name: weight.clone() for name, weight in before.items()}
    first, second = after.values()
    first[0, :5] += 0.25
    first[1, [0, 2]] += 0.25
    first[15, :3] += 0.25
    second[0] += 0.25
    rows = rows_of(save(tmp_path / "before", before), save(tmp_path / "after", after), spectra=True)
    spectra = [row.spectrum for row in rows if row.spectrum is not None]
    assert [(s.principal.first, s.principal.second, s.principal.both) for s in spectra] == [(10, 10, 5), (10, 10, 10)]
    assert [(s.low_magnitude.second, s.low_magnitude.both) for s in spectra] == [(10, 2), (10, 0)]
    found = pool(by_kind(rows)["up"]).spectrum
    assert found is not None
    assert (found.principal.both, found.principal.uniform, found.principal.matched) == (15, 2 * 10 * 10 / 200, 15.0)
    assert (found.low_magnitude.first, found.low_magnitude.both) == (20, 2)


def test_principal_entries_are_those_of_a_tenth_of_the_directions(tmp_path: Path) -> None:
    """Of one direction the largest entries are row 0; of two, the 12 outside it would displace one of them."""
    before = torch.zeros(20, 10)
    before[0], before[9, 9] = 8.0, 12.0
    after = before.clone()
    after[0] += 0.25
    (row,) = rows_of(save(tmp_path / "before", {UP: before}), save(tmp_path / "after", {UP: after}), spectra=True)
    assert row.spectrum is not None and row.spectrum.principal.both == row.spectrum.principal.first == 10


def test_a_rank_is_shown_beside_what_rounding_alone_comes_to(tmp_path: Path) -> None:
    """In steps of 2^-7, one bfloat16 above 1, the updates are (1 1; 1 2), of singular values 2.618 and 0.382, and diag(8, 2).
    Of both the first direction has 90 % of the energy. The first one's alone, (0.72 1.17; 1.17 1.89), is stored as the whole:
    of rank 2. The second's is stored as diag(8, 0): of rank 1."""
    step, names = 2.0**-7, [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    before = dict(zip(names, (torch.ones(2, 2).bfloat16(), torch.eye(2).bfloat16()), strict=True))
    updates = torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.diag(torch.tensor([8.0, 2.0]))
    after = {
        name: (before[name].float() + step * update).bfloat16() for name, update in zip(names, updates, strict=True)
    }
    rows = rows_of(save(tmp_path / "before", before), save(tmp_path / "after", after), spectra=True)
    nulls = [row.spectrum.null_ranks for row in rows if row.spectrum is not None]
    assert [row.rank for row in rows] == [2, 2] and [null.numerical for null in nulls] == [2, 1]
    p, q = 2.618034 / 3, 0.381966 / 3
    entropy = p**-p * q**-q
    assert [null.entropy for null in nulls] == pytest.approx([entropy, 1.0], abs=1e-3)
    found = pool(rows)
    assert found.spectrum is not None and (found.rank, found.spectrum.null_numerical) == (1.0, (2 / 2 + 1 / 2) / 2)
    assert found.spectrum.null_entropy == pytest.approx((entropy / 2 + 1 / 2) / 2, abs=1e-3)


def test_the_rank_alone_is_the_one_of_the_spectrum(
    planted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """q [20, 10] and up [30, 20] are changed in a row each: 1 of 10 and 1 of 20 directions."""
    expected = [row.rank for row in rows_of(*planted, spectra=True)]
    monkeypatch.delattr("rlpost.analysis.measure.decompose")
    rows = rows_of(*planted, rank=True)
    assert sorted((row.kind, row.rank) for row in rows) == [("norm", None), ("q", 1), ("up", 1)]
    assert [row.rank for row in rows] == expected and all(row.spectrum is None for row in rows)
    assert all(row.rank is None for row in rows_of(*planted))
    assert cli.main(["analyze", *map(str, planted), "--rank"]) == 0
    lines = capsys.readouterr().out.split("by direction")[1].split("update, by layer")[0].splitlines()
    found = [line.split() for line in lines if line[:1].isalpha()]
    assert found == [["q", "10.0", "%"], ["up", "5.0", "%"], ["all", "7.5", "%"]]


@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_counts_do_not_depend_on_the_pieces_that_weights_are_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Pieces that end within a row, with one, and after it; steps are powers of 2, so that sums are exact. Of the vocabulary only
    the first 30 rows are in both."""
    embedding = "model.embed_tokens.weight"
    torch.manual_seed(1)
    before = weights() | {embedding: torch.randn(31, 8).bfloat16()}
    after = {name: tensor + (torch.rand(tensor.shape) < 0.1).bfloat16() * 0.5 for name, tensor in before.items()}
    after[embedding] = after[embedding][:30]
    held = [before | {embedding: before[embedding][:30]}, after]
    whole = measure(Versions(["before", "after"], [HeldVersion(tensors) for tensors in held])).updates[0]
    for module in ("core.sparsity", "engines.pretrained"):
        monkeypatch.setattr(f"rlpost.{module}.CHUNK", chunk)
    monkeypatch.delattr(Versions, "tensors")
    places = [str(save(tmp_path / name, tensors)) for name, tensors in (("before", before), ("after", after))]
    (found,) = analyze(places[0], places[1:]).updates
    assert found.rows == whole.rows and found.pictures.keys() == whole.pictures.keys() == {Q}
    assert torch.equal(found.pictures[Q], whole.pictures[Q])
    for row in found.rows:
        changed = held[0][row.name] != after[row.name]
        assert row.sparsity.bit_equal == int((~changed).sum())
        if row.untouched_rows is not None:
            untouched = [int((~changed.any(axis)).sum()) for axis in (1, 0)]
            assert [row.untouched_rows, row.untouched_columns] == untouched


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
    found = comparison.overlaps
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
    assert content["comparisons"][0]["overlaps"]["q"]["both"] == 5


def test_two_tuned_models_agree_no_more_than_they_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """(1 1 1 1) becomes (2 2 1 1) and (1 2 2 1 + 5e-6): of four entries one is the same, two within 1e-5; the cosine of
    (1 1 0 0) and (0 1 1 5e-6) is 1/2. The first left two as they were; the second one, and two within 1e-5."""
    values = {"before": [1.0, 1, 1, 1], "first": [2.0, 2, 1, 1], "second": [1.0, 2, 2, 1 + 5e-6]}
    places = [str(save(tmp_path / name, {NORM: torch.tensor(value)})) for name, value in values.items()]
    out = tmp_path / "figures.json"
    assert cli.main(["analyze", *places, "-o", str(out)]) == 0
    shares = "25.0 % 50.0 % 50.0 % 50.0 % 25.0 % 50.0 % 0.500"
    lines = capsys.readouterr().out.split("entries equal in")[1].splitlines()
    assert [" ".join(line.split()) for line in lines[2:]] == [f"norm {shares}", f"all {shares}"]
    assert max(map(len, lines[1:])) <= 80
    found = json.loads(out.read_text())["comparisons"][0]["agreements"]["norm"]
    assert (found["difference"]["bit_equal"], found["difference"]["within"]["1e-05"]) == (1, 2)
    assert (found["dot"], found["cosine"]) == (1.0, pytest.approx(0.5, abs=1e-6))


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
