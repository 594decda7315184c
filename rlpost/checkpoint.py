"""Checkpoints that are whole or absent: written beside, hashed, synced, renamed.

A checkpoint holds the learner's state (weights, optimizer, RNG), the run's `Position` (version, prompts trained, prompts
in flight) and the fingerprint of every stage's data. Rollouts in flight are not saved: their prompts are admitted again,
in the same order and with the same seeds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from rlpost.pipeline.buffer import Position
from rlpost.pipeline.ports import Learner

MANIFEST, STATE, LEARNER = "manifest.json", "state.json", "learner"
EXPORTS = "exports"
"""Where the directory of a run has a model directory per stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint found whole on disk."""

    path: Path
    position: Position
    fingerprints: tuple[str, ...]
    """Per stage, of its prompts and their order."""

    @property
    def learner_path(self) -> Path:
        return self.path / LEARNER


class RunCheckpoints:
    """Writes the checkpoints and exports of one run directory."""

    def __init__(
        self,
        run_dir: Path,
        *,
        fingerprints: Sequence[str],
        on_event: Callable[..., None],
        keep: int = 2,
    ) -> None:
        self._root, self._exports = run_dir / "checkpoints", run_dir / EXPORTS
        self._fingerprints, self._on_event, self._keep = tuple(fingerprints), on_event, keep
        self.last_step: int | None = None

    async def write(self, position: Position, learner: Learner) -> None:
        """Save the learner as it stands at `position`; older checkpoints beyond `keep` go once this one is whole.

        Raises:
            OSError: when it cannot be written, before anything is if the disk has less room than the previous checkpoint
                took; that one stays.
        """
        final = self._root / f"step-{position.step:08d}"
        partial = final.with_suffix(".partial")
        for remains in self._root.glob("*.partial"):  # of a write that was killed
            shutil.rmtree(remains)
        partial.mkdir(parents=True)
        self._check_room()
        try:
            await learner.save(partial / LEARNER)
            state = {"position": asdict(position), "fingerprints": self._fingerprints}
            (partial / STATE).write_text(json.dumps(state, indent=2))
            seal(partial)
        except (RuntimeError, OSError) as error:  # torch reports a full disk as the former, and not by that name
            free = shutil.disk_usage(self._root).free
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {position.step} could not be written to {self._root}, which had {free >> 20} MiB"
                f" free: {error}"
            ) from error
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_directory(self._root)
        self.last_step = position.step
        for old in _by_age(self._root)[: -self._keep]:
            shutil.rmtree(old)
        self._on_event("checkpoint", step=position.step, path=str(final))

    async def export(self, stage: str, learner: Learner) -> None:
        """A plain Hugging Face directory of the policy after `stage`."""
        path = self._exports / stage
        path.parent.mkdir(parents=True, exist_ok=True)
        await learner.save_pretrained(path)
        self._on_event("export", stage=stage, path=str(path))

    def _check_room(self) -> None:
        previous = _by_age(self._root)
        if not previous:
            return
        need = sum(file.stat().st_size for file in previous[-1].rglob("*") if file.is_file())
        free = shutil.disk_usage(self._root).free
        if free < need:
            raise OSError(
                f"no room for a checkpoint: {free >> 20} MiB free at {self._root}, the last one took {need >> 20} MiB."
                " Free some space and run again with --resume"
            )


def seal(directory: Path) -> None:
    """Write the manifest of every file's hash, and make sure all of it is on disk."""
    hashes = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        hashes[str(file.relative_to(directory))] = _hash(file)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    manifest = directory / MANIFEST
    with manifest.open("w") as stream:
        json.dump(hashes, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def broken_files(directory: Path) -> list[str]:
    """Files of a sealed directory that are missing or not as they were written; ["manifest.json"] if that is one."""
    try:
        hashes: Mapping[str, str] = json.loads((directory / MANIFEST).read_bytes())
    except (FileNotFoundError, ValueError):
        return [MANIFEST]
    return [
        name for name, digest in hashes.items() if not (directory / name).is_file() or _hash(directory / name) != digest
    ]


def latest_checkpoint(run_dir: Path, on_broken: Callable[[Path, list[str]], None]) -> Checkpoint | None:
    """The newest whole checkpoint; broken ones are reported and passed over. None when none was ever written.

    Raises:
        ValueError: when every one of them is broken: to begin again in their place would discard the run.
    """
    found = _by_age(run_dir / "checkpoints")
    for path in reversed(found):
        if broken := broken_files(path):
            on_broken(path, broken)
            continue
        state = json.loads((path / STATE).read_text())
        position = state["position"]
        return Checkpoint(
            path=path,
            position=Position(
                step=position["step"],
                next_ordinals=tuple(position["next_ordinals"]),
                pending=tuple(tuple(ordinals) for ordinals in position["pending"]),
                sources=tuple(position["sources"]),
                num_steps=tuple(position["num_steps"]),
                temperatures=tuple(position["temperatures"]),
            ),
            fingerprints=tuple(state["fingerprints"]),
        )
    if found:
        raise ValueError(
            f"no checkpoint of {run_dir} is whole ({', '.join(path.name for path in found)}): bring one back, or begin"
            " again with another run_dir"
        )
    return None


def sync_directory(directory: Path) -> None:
    """A rename is on disk only when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _by_age(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step-*") if p.suffix != ".partial") if root.is_dir() else []


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
