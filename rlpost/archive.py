"""Versions on a disk: what changed between two model directories, and every version of a run as one patch each."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rlpost.checkpoint import EXPORTS, latest_checkpoint, sync_directory
from rlpost.core.delta import encode
from rlpost.core.patch import PatchWriter, WeightPatch, from_bytes, patched_tensor, rebuilt, refuse_removed, write_patch
from rlpost.core.weights import merged
from rlpost.engines.pretrained import (
    INDEX,
    StoredTensors,
    check_weights,
    other_files,
    save_pretrained,
    stream_tensors,
)
from rlpost.tracking import FILES, read_rows
from rlpost.types import WeightImage


def diff_directories(before: Path, after: Path, output: Path) -> WeightPatch:
    """Write what leads from the weights of one model directory to those of another, and return it as read back.

    One tensor of each is in memory at a time. Files other than weights are no part of it (see `different_files`).

    Raises:
        ValueError: when a directory has no whole weights, `after` lacks a tensor of `before`, or `output` is there already.
    """
    check_weights(before)
    check_weights(after)
    base, target = StoredTensors(before), StoredTensors(after)
    refuse_removed(base.names, target.names)
    with beside(output) as partial, partial.open("wb") as stream:
        writer = PatchWriter(stream, version=1, base=0)
        for name in target.names:
            writer.add(name, encode(base.tensor(name) if name in base.names else None, target.tensor(name)))
        writer.finish()
    return read_patch(output)


def patch_directory(before: Path, patch_file: Path, output: Path) -> None:
    """Write the model directory that a patch makes of `before`: the same files, each with the new weights.

    One tensor is in memory at a time, each is proved by its checksum, and added ones go into the last file.

    Raises:
        ValueError: naming the tensor, when `before` is not what the patch applies to; or what else is wrong. `output` is not
            there then.
    """
    check_weights(before)
    base, patch = StoredTensors(before), read_patch(patch_file)
    refuse_removed(base.names, patch.tensors)
    files = base.files()
    files[max(files)] += sorted(patch.tensors.keys() - set(base.names))
    rewrite_directory(
        before,
        output,
        files,
        {name: (tensor.dtype, tensor.shape) for name, tensor in patch.tensors.items()},
        lambda name: patched_tensor(patch, name, base.tensor(name) if name in base.names else None),
    )


def rewrite_directory(
    source: Path,
    output: Path,
    files: Mapping[Path, Sequence[str]],
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor: Callable[[str], Tensor],
) -> None:
    """Write a model directory like `source` with other weights, asking for one at a time; `output` is there when it is whole.

    Args:
        files: of `source`, with the names that each is to hold.
        layout: dtype and shape of each.

    Raises:
        ValueError: when `output` is there already; and what `tensor` raises.
    """
    with beside(output) as partial:
        partial.mkdir(parents=True)
        for file in other_files(source):
            shutil.copy(file, partial / file.name)
        for file, names in files.items():
            stream_tensors({name: layout[name] for name in names}, tensor, partial / file.name)
        if (source / INDEX).is_file():
            total = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
            places = {name: file.name for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def different_files(before: Path, after: Path) -> list[str]:
    """Names of the files besides weights (config, tokenizer) that are not the same in both directories."""
    one, other = ({file.name: file.read_bytes() for file in other_files(path)} for path in (before, after))
    return sorted(name for name in one | other if one.get(name) != other.get(name))


def read_patch(file: Path) -> WeightPatch:
    """The patch in a file, checked; its payloads stay on the disk until they are used.

    Raises:
        ValueError: naming the file, when it is not as it was written.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    try:
        return from_bytes(data)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


VERSIONS = "versions"
"""The archive's directory in that of a run."""


class VersionArchive:
    """The versions of a run in one directory, a file each: complete, or what changed since another one there.

    Example:
        00000000-complete.patch  00000001-from-00000000.patch  00000002-from-00000001.patch
    """

    _NAME = re.compile(r"(\d{8})-(?:complete|from-(\d{8}))\.patch")

    def __init__(self, path: Path, *, anchor_every: int = 1) -> None:
        """
        Args:
            anchor_every: versions from one that is complete to the next, by which a reader's work is bounded.
        """
        self._path, self._anchor_every = path, anchor_every

    @property
    def needs_complete(self) -> bool:
        """Whether the next version should be complete."""
        bases = self._bases()
        return not bases or len(_chain(bases, max(bases))) >= self._anchor_every

    @property
    def versions(self) -> list[int]:
        return sorted(self._bases())

    def append(self, patch: WeightPatch) -> None:
        """Add a version, newer than all there.

        Raises:
            ValueError: when it is not, or applies to a version that is not there.
        """
        versions = self.versions
        if versions and patch.version <= versions[-1]:
            raise ValueError(
                f"{self._path} holds versions up to {versions[-1]}, so version {patch.version} is not a new one"
            )
        if patch.base is not None and patch.base not in versions:
            raise ValueError(
                f"version {patch.version} applies to version {patch.base}, which {self._path} does not hold: append it complete"
            )
        self._path.mkdir(parents=True, exist_ok=True)
        file = self._file(patch.version, patch.base)
        try:
            with beside(file) as partial, partial.open("wb") as stream:
                write_patch(patch, stream)
        except OSError as error:
            raise OSError(f"{file} could not be written: {error.strerror or error}") from error

    def forget_after(self, version: int) -> None:
        """Drop newer versions: a run that resumes makes them again, and not with the same bits.

        And what a write that was killed has left.
        """
        for partial in self._path.glob("*.partial"):
            partial.unlink()
        for newer, base in sorted(self._bases().items(), reverse=True):
            if newer > version:
                self._file(newer, base).unlink()

    def patch(self, version: int) -> WeightPatch:
        """Raises ValueError naming what is missing or damaged."""
        bases = self._bases()
        if version not in bases:
            raise ValueError(f"{self._path} does not hold version {version}: {_ranges(sorted(bases))}")
        file = self._file(version, bases[version])
        patch = read_patch(file)
        if (patch.version, patch.base) != (version, bases[version]):
            raise ValueError(
                f"{file} holds version {patch.version} as a change of {patch.base}: it has another file's name"
            )
        return patch

    def rebuild(self, version: int) -> WeightImage:
        """That version, exactly: in one image of the weights, proved by the checksum of every tensor.

        Raises:
            ValueError: naming the version that is missing or the file that is damaged on the way to it.
        """
        return rebuilt(self.chain(version))

    def chain(self, version: int) -> list[WeightPatch]:
        """From a complete version to that one, each applying to the one before it; their payloads stay on the disk.

        Raises:
            ValueError: naming the version that is missing or the file that is damaged.
        """
        return [self.patch(number) for number in reversed(_chain(self._bases(), version))]

    def _bases(self) -> dict[int, int | None]:
        """Version to the version its file applies to."""
        if not self._path.is_dir():
            return {}
        names = [match for file in self._path.iterdir() if (match := self._NAME.fullmatch(file.name))]
        return {int(name[1]): None if name[2] is None else int(name[2]) for name in names}

    def _file(self, version: int, base: int | None) -> Path:
        return self._path / f"{version:08d}-{'complete' if base is None else f'from-{base:08d}'}.patch"


def checkout(run_dir: Path, version: int, output: Path) -> None:
    """Write a version of the run's archive as a model directory; what is no weight is that of the model the run began with.

    An adapter that was published beside its base is merged into it.

    Raises:
        ValueError: when `output` is there already, the run has no such version, or its first model is gone.
    """
    if output.exists():
        raise ValueError(f"{output} is there already: remove it, or write to another place")
    archive = VersionArchive(run_dir / VERSIONS)
    if not archive.versions:
        raise ValueError(f"{run_dir} has no archive: a run keeps its versions with publish.archive={{}}")
    models = [Path(row["model"]) for row in read_rows(run_dir / FILES["event"]) if row["event"] == "ready"]
    # A model that the run has built moves with its directory.
    model_path = next((path for path in (*models[-1:], run_dir / "model") if path.is_dir()), None)
    if model_path is None:
        where = models[-1] if models else run_dir / "model"
        raise ValueError(f"{where}, whose config and tokenizer the run in {run_dir} uses, is gone: bring it back")
    save_pretrained(merged(archive.rebuild(version).tensors), model_path, output)


def last_export(run_dir: Path) -> Path | None:
    """The model that a run exported last, where the run's directory is now: it may have been moved. None before the first."""
    exports = [row["path"] for row in read_rows(run_dir / FILES["event"]) if row["event"] == "export"]
    return run_dir / EXPORTS / Path(exports[-1]).name if exports else None


def last_masters(run_dir: Path) -> dict[str, Tensor]:
    """float32 master weights of a run's last checkpoint, which is unpickled: only of a run that you trust.

    Raises:
        ValueError: when there is none, it is damaged, or an adapter was trained.
    """

    def refuse(path: Path, files: list[str]) -> None:
        raise ValueError(f"{path} is damaged ({', '.join(files)}): remove it, and the checkpoint before it is read")

    checkpoint = latest_checkpoint(run_dir, refuse)
    if checkpoint is None:
        raise ValueError(f"{run_dir} has no checkpoint, where master weights are: compare what it exported")
    from rlpost.engines.deepspeed_learner import stored_masters

    return stored_masters(checkpoint.learner_path)


def _chain(bases: Mapping[int, int | None], version: int) -> list[int]:
    """The version, the one it applies to, and so on back to a complete one."""
    chain = [version]
    while (base := bases.get(chain[-1])) is not None:
        chain.append(base)
    return chain


def _ranges(versions: list[int]) -> str:
    """For an error: which versions there are."""
    if not versions:
        return "it is empty"
    runs: list[list[int]] = []
    for version in versions:
        if runs and runs[-1][-1] == version - 1:
            runs[-1].append(version)
        else:
            runs.append([version])
    return "it holds " + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends well, and is gone when it does not."""
    if path.exists():
        raise ValueError(f"{path} is there already: remove it, or write to another place")
    partial = path.with_name(path.name + ".partial")
    _remove(partial)  # of a write that was killed
    try:
        yield partial
        for file in [partial, *partial.rglob("*")]:
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        partial.rename(path)
        sync_directory(path.parent)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
