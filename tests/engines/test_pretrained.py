"""A model directory that could not be trained and served is refused at the door, by name and with the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlpost.engines.pretrained import check_model_directory, write_tensors


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def list_a_shard_that_is_not_there(directory: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: None, None),
        (lambda d: (d / "config.json").unlink(), "has no config.json: give"),
        (lambda d: (d / "config.json").write_text('{"architectures": ['), r"config.json is not valid JSON .* again"),
        (lambda d: (d / "config.json").write_text("{}"), "config.json names no model_type"),
        (lambda d: (d / "model.safetensors").unlink(), r"no \*.safetensors: save"),
        (lambda d: truncate(d / "model.safetensors"), r"model.safetensors is missing or damaged .* download it again"),
        (list_a_shard_that_is_not_there, r"model-00002.safetensors is missing or damaged"),
        (lambda d: (d / "tokenizer.json").unlink(), r"has no tokenizer \(tokenizer.json\): save"),
        (lambda d: (d / "tokenizer.json").write_text("{"), r"tokenizer.json is not valid JSON"),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    damage: Callable[[Path], None], message: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    if message is None:
        check_model_directory(tmp_path)
        return
    with pytest.raises(ValueError, match=message):
        check_model_directory(tmp_path)


def test_a_disk_that_takes_no_weights_is_named_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone/model.safetensors could not be written: .*No such file"):
        write_tensors({"a": torch.zeros(2)}, tmp_path / "gone" / "model.safetensors")
