"""What the driver makes of a worker that dies while another needs what it held."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OwnerDiedError, RayTaskError

from rlpost.pipeline.ports import Export
from rlpost.workers import ray_workers
from rlpost.workers.placement import Node
from rlpost.workers.ray_workers import RaySampler, RayWorkers


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


def test_a_sampler_is_started_again_on_its_node_or_where_ray_finds_room_once_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [Node(id=name, name=name, cores=1, gpus=0) for name in "ab"]
    chosen: list[tuple[Node | None, bool]] = []

    def start(name: str, *args: Any, node: Node | None, for_training: bool, **options: Any) -> Any:
        chosen.append((node, for_training))
        return SimpleNamespace(name=name, actor=f"process {len(chosen)}")

    monkeypatch.setattr(ray_workers, "start_sampler", start)
    killed: list[Any] = []
    monkeypatch.setattr(ray_workers.ray, "kill", lambda actor, no_restart: killed.append(actor))
    monkeypatch.setattr(ray_workers, "cluster_nodes", lambda: nodes[:1])
    workers: Any = object.__new__(RayWorkers)
    vars(workers).update(
        _running={},
        _sampler_nodes={"sampler-0": nodes[0], "sampler-1": nodes[1], "evaluator-0": nodes[0]},
        _model_path=None,
        _sampler_config=None,
        _max_model_len=0,
        _log_dir=None,
        _adapter=None,
    )
    first = [workers._start_sampler(name) for name in ("sampler-0", "sampler-1", "evaluator-0")]
    assert chosen == [(nodes[0], True), (None, True), (nodes[0], False)]
    again = asyncio.run(workers.restart(first[2]))
    assert (again.name, chosen[3], killed) == ("evaluator-0", (nodes[0], False), ["process 3"])
    workers.verifier, workers.learner = SimpleNamespace(actor="verifier"), SimpleNamespace(ranks=[])
    workers.close()
    assert killed[1:] == ["process 1", "process 2", "process 4", "verifier"]
