"""Versions of a model that are compared, read one weight at a time wherever they lie."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlpost.analysis.adapter import MergedAdapter
from rlpost.archive import VERSIONS, VersionArchive, last_export, last_masters
from rlpost.core.patch import check_chain, rebuilt_tensor
from rlpost.core.sparsity import in_pieces
from rlpost.core.weights import adapter_names, dtype_name, is_of_adapter, merged
from rlpost.engines.pretrained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, StoredTensors, check_weights, downloaded
from rlpost.tracking import FILES

EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
HEAD = "lm_head.weight"
MASTERS = "masters"
VOCABULARY = (*EMBEDDINGS, HEAD, "lm_head.bias")
"""Ends of the names of weights with a row per token."""
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


class StoredVersion(Protocol):
    """One version of a model, under checkpoint names."""

    @property
    def names(self) -> list[str]:
        """In a fixed order."""
        ...

    def shape(self, name: str) -> torch.Size: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> Tensor: ...

    def pieces(self, name: str, numel: int) -> Iterator[Tensor]:
        """Its first `numel` entries, in pieces as `core.sparsity.in_pieces` makes them."""
        return in_pieces(self.tensor(name).flatten()[:numel])


class HeldVersion(StoredVersion):
    """A version whole in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> torch.Size:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class ArchivedVersion(StoredVersion):
    """A version of a run's archive; each weight is rebuilt when it is asked for, and proved by its checksum. An adapter that was
    published beside the weights is merged into them."""

    def __init__(self, archive: VersionArchive, version: int) -> None:
        """Raises ValueError naming the version that is missing or the file that is damaged."""
        self._chain = archive.chain(version)
        check_chain(self._chain)
        self._tensors = self._chain[-1].tensors

    @property
    def names(self) -> list[str]:
        return sorted(name for name in self._tensors if not is_of_adapter(name))

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        of_layer = (name, *adapter_names(name))
        rebuilt = {part: rebuilt_tensor(self._chain, part) for part in of_layer if part in self._tensors}
        return merged(rebuilt)[name]


def open_version(where: str, *, base: StoredVersion | None = None, dtype: torch.dtype | None = None) -> StoredVersion:
    """
    Args:
        where: a model directory, a safetensors file, a shard index, a LoRA adapter of peft, a run's directory (the model
            it exported last), RUN@N (version N of its archive), RUN@masters (the float32 weights of its last checkpoint,
            whole in memory; it is unpickled, so only of a run that you trust), or a name on the Hugging Face hub, org/name or
            org/name@revision. What is on this disk is never looked for on the hub.
        base: what an adapter changes.
        dtype: what an adapted weight is rounded to; None: the base's.

    Raises:
        ValueError: when there are no whole weights, naming place and remedy.
    """
    path = Path(where)
    if path.name == ADAPTER_WEIGHTS and path.is_file():
        path = path.parent
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            return _adapter(path, base, dtype)
        if (path / FILES["event"]).is_file():
            exported = last_export(path)
            if exported is None:
                raise ValueError(f"{path} has not exported a model yet: give a version of its archive as {path}@N")
            path = exported
        check_weights(path)
        return StoredTensors(path)
    if path.exists():
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"{where} is no *.safetensors, and no index of them: save the model with save_pretrained")
        check_weights(path)
        return StoredTensors(path)
    run, at, version = where.rpartition("@")
    if at and version.isdecimal() and Path(run).is_dir():
        return ArchivedVersion(VersionArchive(Path(run) / VERSIONS), int(version))
    if at and version == MASTERS and Path(run).is_dir():
        return HeldVersion(last_masters(Path(run)))
    found = _HUB_NAME.fullmatch(where)
    if found is None:
        raise ValueError(
            f"{where} is not there: give a model directory, a *.safetensors file or index, an adapter's directory, a run's"
            " directory, RUN@N for a version of its archive, or a name on the hub (org/name)"
        )
    try:
        local = downloaded(
            found[1], revision=found[2], only=["*.safetensors", "*.json"], ignore=["*/*", "consolidated*"]
        )
    except ValueError as error:
        raise ValueError(f"{where} is not on this machine, and as a name on the hub {error}") from error
    return open_version(str(local), base=base, dtype=dtype)


def open_versions(places: Sequence[str], *, dtype: torch.dtype | None = None) -> Versions:
    """
    Args:
        places: as `open_version` takes them; an adapter changes the first.
        dtype: what all weights are rounded to; None: they are compared as stored.

    Raises:
        ValueError: as `open_version` and `Versions`.
    """
    first = open_version(places[0], dtype=dtype)
    rest = [open_version(where, base=first, dtype=dtype) for where in places[1:]]
    return Versions(places, [first, *rest], dtype=dtype)


class Versions:
    """Versions of one model: the weights that all have, read together, one of each at a time.

    A version that stores no output layer has its embedding there. An output layer that is the embedding in all of them is
    left out, as one weight counts once. Of embeddings with different numbers of rows the first rows that all have are
    compared, and of weights that are integers everywhere none. The notes say so.
    """

    def __init__(
        self, places: Sequence[str], stored: Sequence[StoredVersion], *, dtype: torch.dtype | None = None
    ) -> None:
        """
        Args:
            places: what errors call them.
            dtype: what all weights are rounded to; None: they are compared as stored.

        Raises:
            ValueError: naming the weight that not all have, in one shape and one dtype.
        """
        self.places, self._stored, self._dtype = places, stored, dtype
        self.notes: list[list[str]] = [[] for _ in places]
        """Of each version: where it is not compared with the first as it stands."""
        self._rows: dict[str, int] = {}
        named = [set(stored.names) for stored in self._stored]
        integers = self._integers(named)
        self._tied = self._tie(named)
        self.names = sorted(set.union(*named) - integers)
        """In a fixed order."""
        self._check_names([names - integers for names in named])
        for name in self.names:
            self._check_dtypes(name)
            self._check_shapes(name)

    @property
    def resized(self) -> Sequence[str]:
        """The weights of which not all rows are compared."""
        return sorted(self._rows)

    def shape(self, name: str) -> torch.Size:
        """As it is read."""
        shape = self._shapes(name)[0]
        return torch.Size((self._rows[name], *shape[1:])) if name in self._rows else shape

    def dtype(self, name: str) -> torch.dtype:
        """As it is read."""
        return self._dtype or self._stored[0].dtype(self._tied[0].get(name, name))

    def tensors(self, name: str) -> list[Tensor]:
        """That weight of every version, in the order of the places."""
        return [self._rounded(self.stored(name, index)) for index in range(len(self._stored))]

    def pieces(self, name: str) -> Iterator[list[Tensor]]:
        """The same, a piece at a time as `core.sparsity.in_pieces` makes them: no file's weight is whole in memory."""
        numel = self.shape(name).numel()
        parts = (s.pieces(tied.get(name, name), numel) for s, tied in zip(self._stored, self._tied, strict=True))
        return ([self._rounded(part_N) for part_N in parts_N] for parts_N in zip(*parts, strict=True))

    def stored(self, name: str, index: int = 0) -> Tensor:
        """That weight of one version, not rounded."""
        tensor = self._stored[index].tensor(self._tied[index].get(name, name))
        return tensor[: self._rows[name]] if name in self._rows else tensor

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def _integers(self, named: Sequence[set[str]]) -> set[str]:
        """Buffers such as positions, which need not be in every version."""
        integers = set.union(*named)
        for stored, names in zip(self._stored, named, strict=True):
            integers -= {name for name in names if stored.dtype(name).is_floating_point}
        for index, names in enumerate(named):
            if index and (skipped := sorted(integers & (names | named[0]))):
                more = f" and {len(skipped) - 1} more" if skipped[1:] else ""
                self.notes[index].append(f"not compared, as they hold integers: {skipped[0]}{more}")
        return integers

    def _tie(self, named: Sequence[set[str]]) -> list[dict[str, str]]:
        """Of each version, the output layer it does not store to the embedding that it is; `named` is made to say so."""
        tied: list[dict[str, str]] = [{} for _ in named]
        if not any(HEAD in names for names in named):
            return tied
        for index, names in enumerate(named):
            embedding = _embedding(names)
            if HEAD not in names and embedding is not None:
                tied[index][HEAD] = embedding
        if not any(tied):
            return tied
        is_embedding = [bool(alias) or self._stores_embedding_twice(index) for index, alias in enumerate(tied)]
        for index, (alias, names) in enumerate(zip(tied, named, strict=True)):
            if all(is_embedding):
                names.discard(HEAD)
                note = f"{HEAD} is the embedding in all of them, and counts once"
            else:
                names.update(alias)
                note = f"{HEAD} is stored only in one of the two; in the other it is the embedding, which it is compared with"
                if alias and tied[0]:
                    note = f"{HEAD} is the embedding in both, and counts twice, as another version has one of its own"
            if index and (all(is_embedding) or alias or tied[0]):
                self.notes[index].append(note)
        return tied

    def _stores_embedding_twice(self, index: int) -> bool:
        stored = self._stored[index]
        embedding = _embedding(stored.names)
        if embedding is None or stored.dtype(HEAD) != stored.dtype(embedding):
            return False
        if stored.shape(HEAD) != stored.shape(embedding):
            return False
        numel = stored.shape(HEAD).numel()
        return all(map(torch.equal, stored.pieces(HEAD, numel), stored.pieces(embedding, numel)))

    def _check_names(self, named: Sequence[set[str]]) -> None:
        for index, names in enumerate(named):
            if not (lonely := sorted(names ^ named[0])):
                continue
            name = lonely[0]
            here, there = (0, index) if name in named[0] else (index, 0)
            near = difflib.get_close_matches(name, sorted(named[there]), n=1)
            raise ValueError(
                f"{name} is only in {self.places[here]} ({len(lonely)} such weights): compare two versions of one model"
                + (f". The nearest in {self.places[there]} is {near[0]}" if near else "")
            )

    def _check_dtypes(self, name: str) -> None:
        dtypes = [s.dtype(tied.get(name, name)) for s, tied in zip(self._stored, self._tied, strict=True)]
        for where, dtype in zip(self.places, dtypes, strict=True):
            if not dtype.is_floating_point or dtype.itemsize == 1:
                raise ValueError(
                    f"{name} is {dtype_name(dtype)} in {where}: quantized weights are not compared, give them dequantized"
                )
            if self._dtype is None and dtype != dtypes[0]:
                raise ValueError(
                    f"{name} is {dtype_name(dtypes[0])} in {self.places[0]} and {dtype_name(dtype)} in {where}: give the dtype to"
                    " compare them in (--dtype)"
                )

    def _check_shapes(self, name: str) -> None:
        shapes = self._shapes(name)
        if all(shape == shapes[0] for shape in shapes):
            return
        for where, shape in zip(self.places, shapes, strict=True):
            if shape[1:] != shapes[0][1:] or (shape != shapes[0] and not name.endswith(VOCABULARY)):
                raise ValueError(
                    f"{name} is {tuple(shapes[0])} in {self.places[0]} and {tuple(shape)} in {where}: compare two versions"
                    " of one model"
                )
        rows = self._rows[name] = min(shape[0] for shape in shapes)
        for note in self.notes[1:]:
            counts = ", ".join(str(shape[0]) for shape in shapes)
            note.append(f"{name}: only the first {rows} rows are compared, as the versions have {counts}")

    def _shapes(self, name: str) -> list[torch.Size]:
        return [s.shape(tied.get(name, name)) for s, tied in zip(self._stored, self._tied, strict=True)]


def _embedding(names: Iterable[str]) -> str | None:
    return next((name for name in sorted(names) if name.endswith(EMBEDDINGS)), None)


def _adapter(path: Path, base: StoredVersion | None, dtype: torch.dtype | None) -> StoredVersion:
    if base is None:
        raise ValueError(
            f"{path} is a LoRA adapter, an update and no model: give the model it was trained on first, and it after that"
        )
    return MergedAdapter(path, base, dtype)
