"""Which node each worker of a run lives on, and whether every node has what a worker needs there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import rlpost
from rlpost.config import LearnerConfig, RecipeError, SamplerConfig

LOOK_LIMIT_S = 120.0
EVALUATOR = "evaluator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster, and what Ray may use of it.

    Example:
        Node(id="5f2c...", name="gpu-3 (10.0.0.7)", cores=32, gpus=8)
    """

    id: str
    name: str
    cores: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Each worker's node."""

    ranks: tuple[Node, ...]
    samplers: tuple[Node, ...]
    evaluators: tuple[Node, ...]
    verifier: Node

    def named(self) -> dict[str, str]:
        """The node's name by the worker's."""
        workers = {f"learner-{i}": node for i, node in enumerate(self.ranks)}
        workers |= {f"sampler-{i}": node for i, node in enumerate(self.samplers)}
        workers |= {f"{EVALUATOR}-{i}": node for i, node in enumerate(self.evaluators)} | {"verifier": self.verifier}
        return {worker: node.name for worker, node in workers.items()}


def cluster_nodes() -> list[Node]:
    """The live nodes of the present cluster."""
    return [
        Node(
            id=node["NodeID"],
            name=f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            cores=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in sorted(ray.nodes(), key=lambda node: (node["NodeManagerAddress"], node["NodeID"]))
        if node["Alive"]
    ]


def place(learner: LearnerConfig, sampler: SamplerConfig, nodes: Sequence[Node]) -> Placement:
    """Learner ranks together, for they exchange every gradient; samplers, evaluators and the verifier each where most is left.

    Cores are a preference, GPUs are not: that there are enough of them in all is `plan.check_resources`'s to say.
    """
    gpus: dict[Node, float] = {node: node.gpus for node in nodes}
    cores = {node: node.cores for node in nodes}

    def roomiest(num_gpus: float) -> Node:
        return max(nodes, key=lambda node: (gpus[node] if num_gpus else 0, cores[node]))

    def take(node: Node, num_gpus: float, num_cores: int) -> Node:
        gpus[node] -= num_gpus
        cores[node] -= num_cores
        return node

    def has_room(node: Node) -> bool:
        return gpus[node] >= learner.gpus_per_rank if learner.gpus_per_rank else cores[node] >= learner.threads

    ranks: list[Node] = []
    for _ in range(learner.ranks):
        node = ranks[-1] if ranks and has_room(ranks[-1]) else roomiest(learner.gpus_per_rank)
        ranks.append(take(node, learner.gpus_per_rank, learner.threads))
    num_samplers = sampler.workers + sampler.eval_workers
    samplers = [take(roomiest(sampler.gpus), sampler.gpus, sampler.threads) for _ in range(num_samplers)]
    return Placement(
        ranks=tuple(ranks),
        samplers=tuple(samplers[: sampler.workers]),
        evaluators=tuple(samplers[sampler.workers :]),
        verifier=roomiest(0),
    )


def on_node(node: Node) -> NodeAffinitySchedulingStrategy:
    """Ray's option for a process on `node`. Not soft: Ray 2.60 starts half of those that count no GPU elsewhere then."""
    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def check_nodes(nodes: Sequence[Node], *, run_dir: Path, model_path: Path) -> None:
    """Ask every node for the run directory, the model and this rlpost.

    Raises:
        RecipeError: naming every node that lacks one, and the remedy.
    """
    mark = run_dir / f".seen-{uuid4().hex}"
    mark.touch()
    try:
        look: Any = ray.remote(_fault)
        code = code_checksum()
        calls = [look.options(num_cpus=0, scheduling_strategy=on_node(n)).remote(mark, model_path, code) for n in nodes]
        faults = [f"{node.name} {fault}" for node, call in zip(nodes, calls, strict=True) if (fault := _answer(call))]
    finally:
        mark.unlink()
    if faults:
        raise RecipeError("not every node of the cluster can take part:\n" + "\n".join(faults))


def _answer(call: Any) -> str | None:
    try:
        return ray.get(call, timeout=LOOK_LIMIT_S)
    except GetTimeoutError:
        return f"does not start a process within {LOOK_LIMIT_S:.0f} s: see Ray's logs there"
    except RayError as error:
        return f"cannot run rlpost ({str(error).strip().splitlines()[-1]}): install there what is installed here"


def _fault(mark: Path, model_path: Path, code: str) -> str | None:
    """What keeps this node from taking part, None if nothing does."""
    if not mark.is_file():
        return f"does not see run_dir = {mark.parent}: choose one on a disk that all nodes mount at the same path"
    if not (model_path / "config.json").is_file():
        return f"does not see the model at {model_path}: give model.path on, or HF_HOME to, a disk that all nodes mount"
    if code_checksum() != code:
        return f"has another rlpost, at {Path(rlpost.__file__).parent}: install there what is installed here"
    return None


def code_checksum() -> str:
    """Of this rlpost's sources: two development versions have one version number."""
    root = Path(rlpost.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
