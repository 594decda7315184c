"""The subnetwork that an update is, or a control of its size, as a file that a stage can train on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlpost.analysis.stored import Versions, open_versions
from rlpost.archive import beside
from rlpost.core.subnetwork import (
    Control,
    Coverage,
    low_magnitude_mask,
    principal_mask,
    updated_mask,
    with_control,
)
from rlpost.core.weights import dtype_name, weight_layer
from rlpost.engines.mask_file import write_masks


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which entries of each weight.

    Example:
        Selection(select="principal", rank=64, density=0.05, control="complement", seed=1)
    """

    select: Literal["update", "principal", "low_magnitude"] = "update"
    """Those that the update changed; of the matrices of layers, the largest of an approximation of low rank (LIFT), and
    nothing else; or the smallest magnitudes. The latter two are of the weights before, as stored."""
    rank: int | None = None
    """Of the approximation."""
    density: float | None = None
    """Share of each weight; None: the share of it that the update changed."""
    control: Control | None = None
    seed: int = 0
    """Of the control."""
    dtype: torch.dtype = torch.bfloat16
    """The update changed what differs once rounded to it."""

    def __post_init__(self) -> None:
        if (self.select == "principal") != (self.rank is not None) or (self.rank is not None and self.rank < 1):
            raise ValueError(
                f"rank = {self.rank} with select = {self.select!r}: principal entries are of a rank from 1 on"
            )
        if self.density is not None and not (self.select != "update" and 0 < self.density <= 1):
            raise ValueError(
                f"density = {self.density} with select = {self.select!r}: give a share in (0, 1] of principal or"
                " low-magnitude entries; an update has its own"
            )


def write_mask(before: str, after: str, output: Path, selection: Selection = Selection()) -> Coverage:
    """Write the mask of every weight, one in memory at a time; returns how many entries of each it has.

    The same arguments give the same bytes.

    Args:
        before, after: as `open_version` takes them.

    Raises:
        ValueError: as `open_versions`; when vocabularies differ, so that no mask would fit; when no entry is selected; or
            `output` is there already.
    """
    versions = open_versions([before, after], dtype=selection.dtype)
    if versions.resized:
        raise ValueError(f"{versions.resized[0]} has rows in one of {before} and {after} alone: a mask fits one model")
    chosen: dict[str, tuple[int, int]] = {}

    def mask_of(name: str) -> Tensor:
        mask = with_control(_selected(versions, name, selection), selection.control, seed=selection.seed, name=name)
        chosen[name] = (int(mask.sum()), mask.numel())
        return mask

    settings = asdict(selection) | {"dtype": dtype_name(selection.dtype)}
    with beside(output) as partial:
        shapes = {name: versions.shape(name) for name in versions.names}
        write_masks(shapes, mask_of, partial, provenance={"before": before, "after": after, **settings})
        if not any(count for count, _ in chosen.values()):
            raise ValueError(
                f"no entry is selected: {before} and {after} are the same in {settings['dtype']}, or the density is too low"
            )
    return chosen


def _selected(versions: Versions, name: str, selection: Selection) -> Tensor:
    density = selection.density
    if density is None:
        old, new = versions.tensors(name)
        changed = updated_mask(old, new, dtype=selection.dtype)
        if selection.select == "update":
            return changed
        density = float(changed.float().mean()) if changed.numel() else 0.0
    weight = versions.stored(name)
    if selection.select == "low_magnitude":
        return low_magnitude_mask(weight, density=density)
    if weight.ndim != 2 or weight_layer(name) is None:
        return torch.zeros(weight.shape, dtype=torch.bool)
    assert selection.rank is not None
    return principal_mask(weight, rank=selection.rank, density=density)
