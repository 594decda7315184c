"""A subnetwork in a file: one bit per weight, in safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlpost.core.subnetwork import packed, unpacked
from rlpost.core.weights import weight_kind
from rlpost.engines.pretrained import StoredTensors, stream_tensors


def write_masks(
    shapes: Mapping[str, torch.Size], mask_of: Callable[[str], Tensor], file: Path, *, provenance: Mapping[str, Any]
) -> None:
    """Asks for one mask at a time. Each is the bytes of `core.subnetwork.packed` under the name of its weight; the metadata
    has the shapes and `provenance`, as JSON."""
    stream_tensors(
        {name: (torch.uint8, [-(-shape.numel() // 8)]) for name, shape in shapes.items()},
        lambda name: packed(mask_of(name)),
        file,
        {"shapes": json.dumps(shapes), "provenance": json.dumps(provenance)},
    )


class MaskFile:
    """The masks of a file, read one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when it is not there, or no file of masks."""
        remedy = "`rlpost mask` writes such a file"
        if not path.is_file():
            raise ValueError(f"{path} is no file of masks: {remedy}")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): copy it again; {remedy}") from error
        if not {"shapes", "provenance"} <= metadata.keys():
            raise ValueError(f"{path} holds tensors but no masks: {remedy}")
        self._path = path
        self.provenance: Mapping[str, Any] = json.loads(metadata["provenance"])
        """What it was made of: versions, dtype, selection, control and seed."""
        self.shapes = {name: torch.Size(shape) for name, shape in json.loads(metadata["shapes"]).items()}

    def mask(self, name: str) -> Tensor:
        """bool, of the weight's shape."""
        with safe_open(self._path, "pt") as file:
            return unpacked(file.get_tensor(name), self.shapes[name])

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """Raises ValueError when there is no such mask of this shape."""
        self._check(name, shape)
        return self.mask(name)

    def check_masks(self, model: StoredTensors) -> None:
        """Raises ValueError unless every weight of the model has a mask, and one of them an entry."""
        for name in model.names:
            # An output layer that is the embedding may be stored all the same; integers are not trained.
            if model.dtype(name).is_floating_point and (name in self.shapes or weight_kind(name) != "head"):
                self._check(name, model.shape(name))
        if not any(self.mask(name).any() for name in self.shapes):
            raise ValueError(
                f"{self._path} selects no entry: no weight would be trained. Make one of an update that moved"
            )

    def _check(self, name: str, shape: torch.Size) -> None:
        found = self.shapes.get(name)
        if found != shape:
            what = "no mask" if found is None else f"a mask of shape {tuple(found)}"
            raise ValueError(
                f"{self._path} holds {what} of {name}, which is of {tuple(shape)} in the policy: make it of the model that"
                " is trained"
            )
