"""Plain Hugging Face directories: check one at the door, write one that loads anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".index.json")


def check_model_directory(path: Path) -> None:
    """Refuse a directory that could not be trained and served.

    Raises:
        ValueError: naming what is missing and how to get it.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"model.path = {str(path)!r} has no config.json: give a Hugging Face model directory")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"model.path = {str(path)!r} has no *.safetensors: save the model with save_pretrained")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(
            f"model.path = {str(path)!r} has no tokenizer (tokenizer.json): save it there with"
            " AutoTokenizer.from_pretrained(...).save_pretrained"
        )


def save_pretrained(tensors: Mapping[str, Tensor], source: Path, path: Path) -> None:
    """Write `tensors` as a model directory at `path`, everything else (config, tokenizer) as in `source`.

    Written beside and renamed, so that `path` is never half there.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copy(file, partial / file.name)
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial / "model.safetensors", {"format": "pt"})
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    config = json.loads((partial / "config.json").read_text())
    if len(dtypes) == 1:
        config["dtype"] = dtypes.pop()
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
