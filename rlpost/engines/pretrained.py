"""Plain Hugging Face directories: check one at the door, write one that loads anywhere."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlpost.core.sparsity import CHUNK
from rlpost.core.weights import adapter_names, bits, dtype_name

ADAPTER_DIRECTORY = "adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""As peft names them."""
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".index.json")
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftAdapter:
    """A LoRA adapter as peft stores one.

    Example:
        PeftAdapter(config={"peft_type": "LORA", "r": 8, ...}, tensors={"base_model.model...q_proj.lora_A.weight": ...})
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def check_model_directory(path: Path) -> None:
    """Refuse a directory that could not be trained and served.

    Raises:
        ValueError: naming what is missing or damaged and how to get it.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"model.path = {str(path)!r} has no config.json: give a Hugging Face model directory")
    if "model_type" not in read_json(path / "config.json"):
        raise ValueError(f"{path / 'config.json'} names no model_type: save the model with save_pretrained")
    check_weights(path)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(
            f"model.path = {str(path)!r} has no tokenizer (tokenizer.json): save it there with"
            " AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    for file in path.glob("tokenizer*.json"):
        read_json(file)


def check_weights(path: Path) -> None:
    """Raises ValueError unless every file of weights is there, as long as its header says, and has what an index says."""
    files = _weight_files(path)
    if not files:
        raise ValueError(f"{path} has no *.safetensors: save the model with save_pretrained")
    for file, listed in files.items():
        try:
            with safe_open(file, "pt") as tensors:
                missing = set(listed) - set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is missing or damaged ({error}): copy or download it again") from error
        if missing:
            raise ValueError(f"{file} lacks {min(missing)}, which the index lists: copy or download both again")


def _weight_files(path: Path) -> dict[Path, list[str]]:
    """The files that hold a model's weights, each with the tensors that an index says it has.

    Of a directory with an index, those it lists: another copy of the weights may lie beside them.
    """
    if path.suffix == ".safetensors":
        return {path: []}
    index = path if path.name.endswith(".index.json") else path / INDEX
    if not index.is_file():
        return {file: [] for file in sorted(path.glob("*.safetensors"))}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} has no weight_map: give an index of safetensors, or their directory")
    return {
        index.with_name(file): [name for name, place in places.items() if place == file]
        for file in sorted(set(places.values()))
    }


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    dtype: torch.dtype
    shape: torch.Size


class StoredTensors:
    """The tensors of a model directory, of a shard index or of one safetensors file, read one at a time.

    They are views of the file, mapped into memory: none outlives the last use of its tensor.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, _Place] = {}
        for file in _weight_files(path):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    found = tensors.get_slice(name)
                    self._places[name] = _Place(file, _DTYPES[found.get_dtype()], torch.Size(found.get_shape()))

    @property
    def names(self) -> list[str]:
        return sorted(self._places)

    def files(self) -> dict[Path, list[str]]:
        """Each file's tensors."""
        files = sorted({place.file for place in self._places.values()})
        return {file: [n for n, place in self._places.items() if place.file == file] for file in files}

    def tensor(self, name: str) -> Tensor:
        with safe_open(self._places[name].file, "pt") as tensors:
            return tensors.get_tensor(name)

    def pieces(self, name: str, numel: int) -> Iterator[Tensor]:
        """Its first `numel` entries, as `core.sparsity.in_pieces` has them; each is mapped anew, so that no more of the file than
        one stays in memory."""
        for low in range(0, numel, CHUNK):
            yield self.tensor(name).view(-1)[low : min(low + CHUNK, numel)]

    def shape(self, name: str) -> torch.Size:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def check_same_model(self, other: StoredTensors) -> None:
        """Raises ValueError unless the two share weights, all of the same shapes."""
        shared = self._places.keys() & other._places.keys()
        if not shared:
            raise ValueError(f"{self._path} holds no weights of the model in {other._path}")
        for name in sorted(shared):
            self._check_shape(name, other.shape(name))

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """Raises ValueError when the directory has no such tensor of this shape."""
        if name not in self._places:
            raise ValueError(f"{self._path} holds no weight {name!r}: give a directory of the model that is trained")
        self._check_shape(name, shape)
        return self.tensor(name)

    def _check_shape(self, name: str, shape: torch.Size) -> None:
        if self.shape(name) != shape:
            raise ValueError(
                f"{name} is of shape {tuple(self.shape(name))} in {self._path}, and of {tuple(shape)} in the policy: give"
                " a directory of the model that is trained"
            )


def read_json(file: Path) -> Mapping[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): copy or download it again") from error


def downloaded(name: str, *, revision: str | None = None, ignore: list[str], only: list[str] | None = None) -> Path:
    """The files of a model on the Hugging Face hub, in this machine's cache.

    Raises:
        ValueError: when there is no such model, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=only, ignore_patterns=ignore))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"it could not be downloaded ({type(error).__name__}: {reason}). Check the name and the network; an interrupted"
            " download continues when you run the command again"
        ) from error


def other_files(path: Path) -> list[Path]:
    """What a model directory holds besides weights: config, tokenizer."""
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES))


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises OSError naming the file when the disk does not take it."""
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} could not be written: {error}") from error


def stream_tensors(
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor: Callable[[str], Tensor],
    file: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of the stated dtypes and shapes, asking for one tensor at a time.

    The format (https://github.com/huggingface/safetensors#format): the header's length, a JSON header, then all bytes. Wide
    dtypes come first and the header is padded, so that every tensor is aligned.
    """
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        dtype, shape = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            written = tensor(name)
            assert (written.dtype, tuple(written.shape)) == (layout[name][0], tuple(layout[name][1]))
            stream.write(bits(written).numpy().data)


def save_pretrained(
    tensors: Mapping[str, Tensor], source: Path, path: Path, adapter: PeftAdapter | None = None
) -> None:
    """Write `tensors` as a model directory at `path`, everything else (config, tokenizer) as in `source`.

    `adapter`, which `tensors` contain already, goes into a folder of its own for peft. All is written beside and renamed, so
    that `path` is never half there.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in other_files(source):
        shutil.copy(file, partial / file.name)
    write_tensors(tensors, partial / "model.safetensors")
    dtypes = {dtype_name(t.dtype) for t in tensors.values()}
    config = json.loads((partial / "config.json").read_text())
    if len(dtypes) == 1:
        config["dtype"] = dtypes.pop()
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if adapter is not None:
        write_adapter(adapter, partial / ADAPTER_DIRECTORY)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def peft_names(weight: str) -> tuple[str, str]:
    """Those of a weight's A and B in peft's files.

    Example: base_model.model.lm_head.lora_A.weight, ...lora_B.weight, of lm_head.weight
    """
    return adapter_names(f"base_model.model.{weight}")


def write_adapter(adapter: PeftAdapter, path: Path) -> None:
    """Make the directory `path` for peft, and for whoever reads its format."""
    path.mkdir()
    (path / ADAPTER_CONFIG).write_text(json.dumps(adapter.config, indent=2) + "\n")
    write_tensors(adapter.tensors, path / ADAPTER_WEIGHTS)
