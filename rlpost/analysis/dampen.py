"""A model whose intruder dimensions are scaled down, as a directory like the tuned one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rlpost.analysis.stored import open_versions
from rlpost.archive import rewrite_directory
from rlpost.core.intruders import dampened
from rlpost.core.weights import weight_layer
from rlpost.engines.pretrained import StoredTensors, check_weights


def dampen(before: str, after: Path, output: Path, *, scale: float, k: int, epsilon: float) -> dict[str, int]:
    """Write `after` with the intruders of each matrix of its layers scaled; returns how many each has. One weight of each
    model is in memory at a time.

    Args:
        before: as `open_version` takes it.

    Raises:
        ValueError: when `scale` or `epsilon` is out of range, `output` is there already, or as `open_versions`.
    """
    if not 0 <= scale < 1:
        raise ValueError(f"scale = {scale:g}: intruders become smaller for a scale from 0 to below 1")
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon = {epsilon:g} bounds a cosine: give one above 0 and up to 1")
    check_weights(after)
    versions, stored = open_versions([before, str(after)]), StoredTensors(after)
    comparable = set(versions.names)
    found: dict[str, int] = {}

    def tensor(name: str) -> Tensor:
        if name not in comparable or weight_layer(name) is None or len(stored.shape(name)) != 2:
            return stored.tensor(name)
        old, new = versions.tensors(name)
        smaller, found[name] = dampened(old, new, scale, k=k, epsilon=epsilon)
        return smaller

    layout = {name: (stored.dtype(name), stored.shape(name)) for name in stored.names}
    rewrite_directory(after, output, stored.files(), layout, tensor)
    return found
