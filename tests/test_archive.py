"""A patched model directory and a rebuilt version are the published ones, byte for byte, or are not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlpost import cli, exit_codes
from rlpost.archive import VersionArchive, diff_directories, patch_directory, read_patch
from rlpost.core.patch import diff
from rlpost.core.weights import bits, checksum
from rlpost.engines.pretrained import SAFETENSORS_DTYPES, stream_tensors
from rlpost.types import WeightImage

Shards = Mapping[str, Mapping[str, Tensor]]


def write_model(path: Path, shards: Shards) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    for file, tensors in shards.items():
        save_file(dict(tensors), path / file, {"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, tensors in shards.items() for name in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def read_model(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def before_and_after() -> tuple[Shards, Shards]:
    """Two files; of four tensors two change, and a fifth is new."""
    generator = torch.Generator().manual_seed(0)
    before = {
        "model-1.safetensors": {
            "embed": torch.randn(50, 8, generator=generator).bfloat16(),
            "empty": torch.empty(0, 3),
        },
        "model-2.safetensors": {"norm": torch.ones(8), "scale": torch.tensor(-0.0, dtype=torch.float16)},
    }
    after = {file: dict(tensors) for file, tensors in before.items()}
    changed = before["model-1.safetensors"]["embed"].clone()
    bits(changed)[7] += 1
    after["model-1.safetensors"]["embed"] = changed
    after["model-2.safetensors"]["scale"] = torch.tensor(0.0, dtype=torch.float16)
    after["model-1.safetensors"]["added"] = torch.arange(5)
    return before, after


def same_bytes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(checksum(one[name]) == checksum(other[name]) for name in one)


def test_a_patched_directory_has_the_weights_of_the_second_and_the_files_of_the_first(tmp_path: Path) -> None:
    before, after = before_and_after()
    a, b = write_model(tmp_path / "a", before), write_model(tmp_path / "b", after)
    patch = diff_directories(a, b, tmp_path / "p")
    assert patch.num_changed == 8 + 1 + 5
    patch_directory(a, tmp_path / "p", tmp_path / "out")

    out = tmp_path / "out"
    assert same_bytes(read_model(out), read_model(b))
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in a.iterdir())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as tensors:
            assert name in tensors.keys()  # noqa: SIM118 (not a mapping)
    assert index["weight_map"].keys() == read_model(b).keys()
    assert index["metadata"]["total_size"] == 50 * 8 * 2 + 8 * 4 + 2 + 5 * 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out", "p"]


def test_a_patched_directory_is_one_that_transformers_loads(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_model, tmp_path / "b")
    tensors = load_file(tiny_model / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    diff_directories(tiny_model, tmp_path / "b", tmp_path / "p")
    patch_directory(tiny_model, tmp_path / "p", tmp_path / "out")
    assert same_bytes(read_model(tmp_path / "out"), tensors)
    loaded, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / which).state_dict() for which in ("out", "b"))
    assert same_bytes(loaded, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: bits(t["norm"]).add_(1),
            "^norm, patched to version 1: the patch applies to entries 0 to 8 with checksum",
        ),
        (
            lambda t: t.update(norm=torch.ones(4, 2)),
            r"^norm, patched .* shape \(8,\), and torch.float32 of \(4, 2\) is held",
        ),
        (lambda t: t.pop("norm"), r"^norm, patched .* and none is held"),
        (lambda t: t.update(more=torch.ones(1)), "^more would be gone"),
    ],
)
def test_a_directory_that_the_patch_is_not_for_is_refused_by_tensor_and_nothing_is_left(
    change: object, message: str, tmp_path: Path
) -> None:
    before, after = before_and_after()
    diff_directories(write_model(tmp_path / "a", before), write_model(tmp_path / "b", after), tmp_path / "p")
    change(before["model-2.safetensors"])  # type: ignore[operator]
    other = write_model(tmp_path / "other", before)
    with pytest.raises(ValueError, match=message):
        patch_directory(other, tmp_path / "p", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "other", "p"]


def test_what_is_missing_damaged_or_in_the_way_is_named(tmp_path: Path) -> None:
    before, after = before_and_after()
    a, b = write_model(tmp_path / "a", before), write_model(tmp_path / "b", after)
    patch = tmp_path / "p"
    with pytest.raises(ValueError, match=r"none has no \*.safetensors"):
        diff_directories(a, tmp_path / "none", patch)
    with pytest.raises(ValueError, match="added would be gone"):
        diff_directories(b, a, patch)
    assert not patch.exists() and not patch.with_name("p.partial").exists()
    diff_directories(a, b, patch)
    with pytest.raises(ValueError, match="p is there already"):
        diff_directories(a, b, patch)
    with pytest.raises(ValueError, match="b is there already"):
        patch_directory(a, patch, b)
    assert same_bytes(read_model(b), {**after["model-1.safetensors"], **after["model-2.safetensors"]})
    patch.write_bytes(patch.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"p: the patch of .* bytes is damaged or cut short"):
        patch_directory(a, patch, tmp_path / "out")
    patch.write_bytes(b"")
    with pytest.raises(ValueError, match="p: the patch of 0 bytes is damaged or cut short"):
        read_patch(patch)


def test_what_a_killed_write_left_is_no_obstacle(tmp_path: Path) -> None:
    before, after = before_and_after()
    a, b = write_model(tmp_path / "a", before), write_model(tmp_path / "b", after)
    (tmp_path / "p.partial").write_bytes(b"half")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale.json").write_text("{}")
    diff_directories(a, b, tmp_path / "p")
    patch_directory(a, tmp_path / "p", tmp_path / "out")
    assert same_bytes(read_model(tmp_path / "out"), read_model(b))
    assert not (tmp_path / "out" / "stale.json").exists()


def test_the_commands_say_what_they_did_and_what_the_patch_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = before_and_after()
    a, b, patch, out = (str(tmp_path / name) for name in ("a", "b", "p", "out"))
    write_model(tmp_path / "a", before)
    write_model(tmp_path / "b", after)
    (tmp_path / "b" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "b" / "extra.json").write_text("{}")
    assert cli.main(["diff", a, b, "-o", patch]) == 0
    said = capsys.readouterr().out
    assert "14 entries changed, in 3 of 5 tensors: " in said and "weights only: config.json, extra.json\n" in said
    assert cli.main(["patch", a, patch, "-o", out]) == 0
    assert same_bytes(read_model(tmp_path / "out"), read_model(tmp_path / "b"))
    assert cli.main(["patch", b, patch, "-o", out + "2"]) == exit_codes.USAGE
    assert "rlpost: embed, patched to version 1: the patch applies to" in capsys.readouterr().err
    assert cli.main(["patch", a, patch + "2", "-o", out + "2"]) == exit_codes.USAGE
    assert f"rlpost: {patch}2 is no file" in capsys.readouterr().err
    assert cli.main(["diff", a, str(tmp_path / "none"), "-o", patch + "2"]) == exit_codes.USAGE


def test_a_streamed_file_is_read_by_safetensors_in_every_dtype(tmp_path: Path) -> None:
    """Widths in the worst order, so that alignment is for the writer to see to."""
    random = np.random.default_rng(0)
    tensors = {"0": torch.tensor([True, False, True]), "1": torch.empty(0, 2)}
    for number, dtype in enumerate(reversed(SAFETENSORS_DTYPES)):
        if dtype != torch.bool:
            tensors[f"t{number}"] = torch.from_numpy(random.integers(0, 127, 3 * dtype.itemsize, np.uint8)).view(dtype)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensors(layout, tensors.__getitem__, tmp_path / "t.safetensors")
    assert same_bytes(load_file(tmp_path / "t.safetensors"), tensors)


def versions(count: int) -> list[WeightImage]:
    random = np.random.default_rng(0)
    tensors = {"a": torch.from_numpy(random.normal(0, 0.02, 400)).bfloat16(), "b": torch.ones(3)}
    found = []
    for number in range(count):
        if number:
            moved = torch.from_numpy((random.random(400) < 0.05).astype(np.int16))
            tensors = {"a": (bits(tensors["a"]) + moved).view(torch.bfloat16), "b": tensors["b"] + 1}
        found.append(WeightImage(version=number, tensors=tensors))
    return found


def archived(path: Path, published: list[WeightImage]) -> VersionArchive:
    """Complete at 0 and 5, changes in between."""
    archive = VersionArchive(path)
    for number, image in enumerate(published):
        archive.append(diff(None if number % 5 == 0 else published[number - 1], image))
    return archive


def test_any_version_of_an_archive_is_rebuilt_exactly(tmp_path: Path) -> None:
    published = versions(8)
    archive = archived(tmp_path / "v", published)
    assert archive.versions == list(range(8))
    for image in published:
        rebuilt = archive.rebuild(image.version)
        assert rebuilt.version == image.version
        assert same_bytes(rebuilt.tensors, image.tensors)


def test_a_gap_a_damaged_file_and_a_wrong_name_are_named_and_harm_only_what_needs_them(tmp_path: Path) -> None:
    published = versions(8)
    archive = archived(tmp_path / "v", published)
    file = tmp_path / "v" / "00000002-from-00000001.patch"
    whole = file.read_bytes()

    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    for version in (2, 3, 4):
        with pytest.raises(ValueError, match=r"00000002-from-00000001.patch: the patch of .* is damaged"):
            archive.rebuild(version)
    shutil.copy(tmp_path / "v" / "00000003-from-00000002.patch", file)
    with pytest.raises(ValueError, match=r"00000002-from-00000001.patch holds version 3 as a change of 2"):
        archive.rebuild(4)
    file.unlink()
    with pytest.raises(ValueError, match="v does not hold version 2: it holds 0 to 1, 3 to 7"):
        archive.rebuild(4)
    for version in (0, 1, 5, 6, 7):
        assert same_bytes(archive.rebuild(version).tensors, published[version].tensors)
    with pytest.raises(ValueError, match="does not hold version 9"):
        archive.rebuild(9)
    with pytest.raises(ValueError, match="does not hold version 0: it is empty"):
        VersionArchive(tmp_path / "none").rebuild(0)


def test_an_archive_takes_new_versions_that_it_can_rebuild(tmp_path: Path) -> None:
    published = versions(8)
    archive = archived(tmp_path / "v", published[:4])
    with pytest.raises(ValueError, match="v holds versions up to 3, so version 3 is not a new one"):
        archive.append(diff(None, published[3]))
    with pytest.raises(
        ValueError, match=r"version 6 applies to version 5, which .*v does not hold: append it complete"
    ):
        archive.append(diff(published[5], published[6]))
    archive.append(diff(published[2], published[6]))
    assert archive.versions == [0, 1, 2, 3, 6]
    assert same_bytes(archive.rebuild(6).tensors, published[6].tensors)


def test_a_resumed_run_makes_later_versions_again(tmp_path: Path) -> None:
    published = versions(8)
    archive = archived(tmp_path / "v", published[:5])
    archive.forget_after(2)
    assert archive.versions == [0, 1, 2]
    again = WeightImage(version=3, tensors=published[7].tensors)
    archive.append(diff(published[2], again))
    assert same_bytes(archive.rebuild(3).tensors, published[7].tensors)


def test_checkout_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    command = ["checkout", str(run_dir), "--version", "9", "-o", str(out)]
    assert cli.main(command) == exit_codes.USAGE
    assert "has no archive: a run keeps its versions with publish.archive={}" in capsys.readouterr().err
    archived(run_dir / "versions", versions(3))
    model = tmp_path / "model"
    (run_dir / "events.jsonl").write_text(json.dumps({"event": "ready", "model": str(model)}) + "\n")
    assert cli.main(command) == exit_codes.USAGE
    assert f"{model}, whose config and tokenizer the run in" in capsys.readouterr().err
    (run_dir / "events.jsonl").open("a").write('{"event": "cut sh')  # by a kill
    (run_dir / "model").mkdir()  # which a run that was moved brings with it
    assert cli.main(command) == exit_codes.USAGE
    assert "does not hold version 9: it holds 0 to 2" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    assert cli.main(command) == exit_codes.USAGE
    assert "is there already" in capsys.readouterr().err
