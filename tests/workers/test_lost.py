"""What the driver makes of a worker that dies while another needs what it held."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OwnerDiedError, RayTaskError

from rlpost.pipeline.ports import Export
from rlpost.workers.ray_workers import RaySampler


def test_a_learner_that_dies_before_its_weights_are_loaded_is_the_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "learner-0.log").write_text("out of memory\n")

    async def update(handle: Any) -> int:
        raise RayTaskError("update", "traceback", OwnerDiedError("00", b"", ""))

    sampler = RaySampler(
        "sampler-0", SimpleNamespace(update=SimpleNamespace(remote=update)), tmp_path / "sampler-0.log"
    )
    export = Export(version=4, base=3, handles=(None,), num_bytes=0, full_bytes=2, num_changed=0, num_values=1)
    with pytest.raises(
        RuntimeError, match=r"learner-0 was lost during the update to version 4 of sampler-0.*\nout of mem"
    ):
        asyncio.run(sampler.update(export))
