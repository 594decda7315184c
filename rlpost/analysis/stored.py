"""Versions of a model that are compared, read one weight at a time wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rlpost.archive import VERSIONS, VersionArchive
from rlpost.engines.pretrained import StoredTensors, check_weights


class StoredVersion(Protocol):
    """One version of a model, under checkpoint names."""

    @property
    def names(self) -> list[str]:
        """In a fixed order."""
        ...

    def tensor(self, name: str) -> Tensor: ...


class HeldVersion:
    """A version whole in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def open_version(where: str) -> StoredVersion:
    """
    Args:
        where: a model directory, or RUN@N: version N of the archive in a run's directory.

    Raises:
        ValueError: when there are no whole weights.
    """
    run, at, version = where.rpartition("@")
    if at and version.isdecimal() and not Path(where).exists():
        return HeldVersion(VersionArchive(Path(run) / VERSIONS).rebuild(int(version)).tensors)
    check_weights(Path(where))
    return StoredTensors(Path(where))


def open_versions(places: Sequence[str]) -> list[StoredVersion]:
    """Those of one model: they hold weights of the same names.

    Raises:
        ValueError: naming a weight that not all of them have; or as `open_version`.
    """
    opened = [open_version(where) for where in places]
    for where, stored in zip(places[1:], opened[1:], strict=True):
        if lonely := sorted(set(opened[0].names) ^ set(stored.names)):
            place = places[0] if lonely[0] in opened[0].names else where
            raise ValueError(
                f"{lonely[0]} is only in {place} ({len(lonely)} such weights): compare two versions of one model"
            )
    return opened
