"""The Ray set: each engine in a worker process of its own, tokens and weights in Ray's object store.

The driver passes object references; a group's arrays go from the sampler to the verifier and the learner without it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import OwnerDiedError

from rlpost.config import LearnerConfig, LoraConfig, PublishConfig, SamplerConfig, VerifierConfig
from rlpost.core.metrics import StepReport, Tally
from rlpost.core.objective import StageSpec
from rlpost.core.optimizers import OPTIMIZERS
from rlpost.core.patch import WeightPatch, joined_patch
from rlpost.core.subnetwork import Coverage
from rlpost.pipeline.ledger import Ledger
from rlpost.pipeline.ports import Export, GradedGroup, GroupRequest, Handle, Seconds
from rlpost.pipeline.step_metrics import JUDGE, WAIT
from rlpost.types import GroupSummary, Judgement, RolloutGroup, summarize
from rlpost.workers.judging import shape_judgement
from rlpost.workers.placement import EVALUATOR, Node, Placement, cluster_nodes, on_node
from rlpost.workers.processes import answer, enter_worker, gather_first_error, log_tail, yield_to_samplers
from rlpost.workers.wire import PackedGroup, PackedPatch, pack_group, pack_patch, unpack_group, unpack_patch

T = TypeVar("T")
MAX_CONCURRENT_CALLS = 10_000
"""Groups one sampler or verifier may hold at once; the buffer's bound is far below."""

BESIDE = "beside"
"""Name of a learner's second thread, which publishes while the first one learns."""

CPU_KV_CACHE_MIB = 64
"""Unless the recipe says otherwise: allocating more takes seconds, and a laptop's model needs little."""
GPU_MEMORY_SHARE = 0.9
"""Of what a sampler has of its GPU: that much must be free when it starts, weights included."""


# -- inside the worker processes ---------------------------------------------------------------------------------------


class _SamplerProcess:
    def __init__(
        self,
        model_path: Path,
        config: SamplerConfig,
        max_model_len: int,
        adapter: LoraConfig | None,
        log_path: Path,
        for_training: bool,
    ) -> None:
        enter_worker(log_path)
        if not for_training:
            yield_to_samplers()
        from rlpost.engines.lora_layers import LoraSpec
        from rlpost.engines.vllm_sampler import VllmSampler
        from rlpost.workers.sampler_service import SamplerService

        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        cache_mib = config.kv_cache_mib or (None if config.gpus else CPU_KV_CACHE_MIB)
        build = lambda: VllmSampler(  # noqa: E731 - built in the thread that will own it
            model_path,
            dtype=config.dtype,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            kv_cache_bytes=None if cache_mib is None else cache_mib << 20,
            gpu_memory_utilization=GPU_MEMORY_SHARE * (config.gpus or 1),
            lora=None if adapter is None else LoraSpec(**adapter.model_dump()),
        )
        engine = self._thread.submit(build).result()
        self._service = SamplerService(engine, self._run)

    def _run(self, function: Callable[[], T], /) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def sample(self, request: GroupRequest) -> tuple[PackedGroup, GroupSummary]:
        group = await self._service.sample(request)
        return pack_group(group), summarize(group)

    async def held(self) -> int | None:
        return self._service.held

    async def update(self, *parts: PackedPatch) -> int:
        return await self._service.update(joined_patch([unpack_patch(part) for part in parts]))

    async def seconds(self) -> Seconds:
        return self._service.seconds()


class _VerifierProcess:
    def __init__(self, config: VerifierConfig, log_path: Path) -> None:
        enter_worker(log_path)
        yield_to_samplers()
        from reward import RewardPool

        self._pool = RewardPool.from_table(config.model_dump())
        self._ledger = Ledger(WAIT)
        self._num_judging = 0

    async def judge(self, packed: PackedGroup, shaping: Mapping[str, Any] | None) -> tuple[Judgement, ...]:
        prompt = packed.prompt
        self._num_judging += 1
        self._ledger.enter(JUDGE)
        try:
            submitted = [self._pool.submit(prompt.task, text, prompt.reference) for text in packed.texts_G]
            verdicts = await asyncio.gather(*map(asyncio.wrap_future, submitted))
        finally:
            self._num_judging -= 1
            if not self._num_judging:
                self._ledger.enter(WAIT)
        judged = [Judgement(**{**dataclasses.asdict(v), "outcome": v.outcome.value}) for v in verdicts]
        rollouts = zip(judged, packed.texts_G, packed.num_response_tokens_G, strict=True)
        return tuple(shape_judgement(judgement, text, length, shaping) for judgement, text, length in rollouts)

    async def seconds(self) -> Seconds:
        return self._ledger.collect()

    async def close(self) -> None:
        self._pool.close()


class _LearnerProcess:
    def __init__(
        self,
        model_path: Path,
        config: LearnerConfig,
        serve_dtype: str,
        publish: PublishConfig,
        rank: int,
        master: tuple[str, int],
        log_path: Path,
    ) -> None:
        enter_worker(log_path)
        yield_to_samplers()
        from rlpost.engines.deepspeed_learner import DeepSpeedLearner, init_distributed
        from rlpost.engines.lora_layers import LoraSpec
        from rlpost.workers.learner_service import LearnerService

        init_distributed(rank=rank, world_size=config.ranks, master_addr=master[0], master_port=master[1])
        self._rank, self._model_path = rank, model_path
        self._engine = DeepSpeedLearner(
            model_path,
            dtype=getattr(torch, config.dtype),
            zero_stage=config.zero_stage,
            micro_batch_tokens=config.micro_batch_tokens,
            serve_dtype=getattr(torch, serve_dtype),
            rank=rank,
            world_size=config.ranks,
            gradient_checkpointing=config.gradient_checkpointing,
            lora=None if config.lora is None else LoraSpec(**config.lora.model_dump()),
            serve_adapter=publish.policy == "adapter",
            optimizer=OPTIMIZERS[config.optimizer.name],
        )
        self._service = LearnerService(self._engine, publish_changes=publish.encoding == "delta")

    def begin_stage(self, spec: StageSpec) -> Coverage:
        return self._service.begin_stage(spec)

    def accumulate(self, groups: Sequence[GradedGroup], learner_version: int, max_staleness: int | None) -> None:
        whole: list[Any] = [g.handle for g in groups]
        if isinstance(whole[0], ray.ObjectRef):
            whole = [unpack_group(packed) for packed in ray.get(whole)]
        self._service.accumulate(
            [group.only(g.kept_G) for group, g in zip(whole, groups, strict=True)],
            [g.advantages_G for g in groups],
            learner_version=learner_version,
            max_staleness=max_staleness,
        )

    def step(self, denominator: float, lr: float) -> StepReport:
        return self._service.step(denominator=denominator, lr=lr)

    def export(self, version: int) -> Export:
        return _put(self._service.export(version))

    def complete(self) -> Export:
        return _put(self._service.complete())

    def save(self, path: Path) -> None:
        self._service.save(path)

    def load(self, path: Path) -> None:
        self._service.load(path)

    def save_pretrained(self, path: Path) -> None:
        from rlpost.engines.pretrained import save_pretrained

        weights, adapter = self._engine.weights(), self._engine.adapter()
        if self._rank == 0:
            save_pretrained(weights, self._model_path, path, adapter)

    def seconds(self) -> Seconds:
        return self._service.seconds()


def _put(patch: WeightPatch) -> Export:
    return Export.of(patch, ray.put(pack_patch(patch)))


# -- in the driver -----------------------------------------------------------------------------------------------------


class RaySampler:
    """Driver-side face of one sampler process."""

    def __init__(self, name: str, actor: Any, log_path: Path) -> None:
        self.name, self.actor, self.log_path = name, actor, log_path

    async def sample(self, request: GroupRequest) -> tuple[Handle, GroupSummary]:
        handle, summary = self.actor.sample.options(num_returns=2).remote(request)
        phase = f"sampling of {request.prompt.id}"
        return handle, await answer(summary, worker=self.name, phase=phase, log_path=self.log_path)

    async def held(self) -> int | None:
        return await answer(self.actor.held.remote(), worker=self.name, phase="held", log_path=self.log_path)

    async def update(self, export: Export) -> int:
        call = self.actor.update.remote(*export.handles)
        phase = f"update to version {export.version}"
        try:
            return await answer(call, worker=self.name, phase=phase, log_path=self.log_path)
        except OwnerDiedError as error:
            raise _learner_lost(f"{phase} of {self.name}", self.log_path.parent) from error

    async def seconds(self) -> Seconds:
        return await answer(self.actor.seconds.remote(), worker=self.name, phase="seconds", log_path=self.log_path)


def _learner_lost(phase: str, log_dir: Path) -> RuntimeError:
    """What it has exported is gone with the learner, until somebody has loaded it."""
    log_path = log_dir / "learner-0.log"
    return RuntimeError(
        f"learner-0 was lost during the {phase}: the process died. Its log, {log_path}, ends with:\n{log_tail(log_path)}"
    )


class RayVerifier:
    """Driver-side face of the verifier process, which has a pool of killable children of its own."""

    def __init__(self, name: str, actor: Any, log_path: Path) -> None:
        self.name, self.actor, self._log_path = name, actor, log_path

    async def judge(self, handle: Handle, shaping: Mapping[str, Any] | None = None) -> tuple[Judgement, ...]:
        call = self.actor.judge.remote(handle, shaping)
        return await answer(call, worker=self.name, phase="judging", log_path=self._log_path)

    async def seconds(self) -> Seconds:
        return await answer(self.actor.seconds.remote(), worker=self.name, phase="seconds", log_path=self._log_path)


class RayLearner:
    """Driver-side face of all learner ranks: every call goes to every rank, because every call may be collective."""

    name = "learner"

    def __init__(self, ranks: Sequence[Any], log_paths: Sequence[Path], *, exports_beside: bool) -> None:
        self.ranks, self._log_paths, self.exports_beside = ranks, log_paths, exports_beside
        self._exporting = asyncio.Lock()  # all ranks publish the same versions in the same order

    async def _all(self, method: str, *args: Any, beside: bool = False) -> list[Any]:
        options = {"concurrency_group": BESIDE} if beside else {}
        calls = (
            answer(
                getattr(actor, method).options(**options).remote(*args),
                worker=f"learner-{rank}",
                phase=method,
                log_path=log_path,
            )
            for rank, (actor, log_path) in enumerate(zip(self.ranks, self._log_paths, strict=True))
        )
        return await gather_first_error(*calls)

    async def begin_stage(self, spec: StageSpec) -> Coverage:
        return (await self._all("begin_stage", spec))[0]

    async def accumulate(
        self, groups: Sequence[GradedGroup], *, learner_version: int, max_staleness: int | None
    ) -> None:
        await self._all("accumulate", groups, learner_version, max_staleness)

    async def step(self, *, denominator: float, lr: float) -> StepReport:
        reports: list[StepReport] = await self._all("step", denominator, lr)
        return dataclasses.replace(reports[0], tally=Tally.merge(r.tally for r in reports))

    async def export(self, version: int) -> Export:
        async with self._exporting:
            return Export.joined(await self._all("export", version, beside=self.exports_beside))

    async def complete(self) -> Export:
        async with self._exporting:
            return Export.joined(await self._all("complete", beside=True))

    async def save(self, path: Path) -> None:
        await self._all("save", path)

    async def load(self, path: Path) -> None:
        await self._all("load", path)

    async def save_pretrained(self, path: Path) -> None:
        await self._all("save_pretrained", path)

    async def seconds(self) -> Seconds:
        return (await self._all("seconds"))[0]


def start_sampler(
    name: str,
    model_path: Path,
    config: SamplerConfig,
    *,
    max_model_len: int,
    log_dir: Path,
    adapter: LoraConfig | None = None,
    node: Node | None = None,
    for_training: bool = True,
) -> RaySampler:
    """A sampler process on the present Ray cluster; it answers its first call once its engine is up.

    Args:
        adapter: what versions have beside the weights; None: they are plain weights.
        node: where it runs; None: where Ray finds room.
        for_training: False: it gives way to samplers for which that is so.
    """
    from rlpost.engines.vllm_sampler import environment

    log_path = log_dir / f"{name}.log"
    process = ray.remote(_SamplerProcess).options(
        num_cpus=0,
        num_gpus=config.gpus,
        max_concurrency=MAX_CONCURRENT_CALLS,
        scheduling_strategy=None if node is None else on_node(node),
        runtime_env={"env_vars": environment("cuda" if config.gpus else "cpu", num_threads=config.threads)},
    )
    actor = process.remote(model_path, config, max_model_len, adapter, log_path, for_training)
    return RaySampler(name, actor, log_path)


class RayServing:
    """Sampler processes of a model as it lies on the disk, and a verifier: all that an evaluation needs."""

    def __init__(
        self,
        *,
        model_path: Path,
        sampler: SamplerConfig,
        verifier: VerifierConfig,
        max_model_len: int,
        log_dir: Path,
        adapter: LoraConfig | None = None,
        placement: Placement | None = None,
    ) -> None:
        """
        Args:
            placement: None: wherever Ray finds room.
        """
        self._model_path, self._sampler_config, self._max_model_len = model_path, sampler, max_model_len
        self._log_dir, self._adapter = log_dir, adapter
        nodes = [None] * sampler.workers if placement is None else placement.samplers
        self._sampler_nodes = {f"sampler-{i}": node for i, node in enumerate(nodes)}
        self._running: dict[str, RaySampler] = {}
        self.samplers = [self._start_sampler(name) for name in self._sampler_nodes]
        log_path = log_dir / "verifier.log"
        process = ray.remote(_VerifierProcess).options(
            num_cpus=0,
            max_concurrency=MAX_CONCURRENT_CALLS,
            scheduling_strategy=None if placement is None else on_node(placement.verifier),
        )
        self.verifier = RayVerifier("verifier", process.remote(verifier, log_path), log_path)

    async def fetch(self, handle: Handle) -> RolloutGroup:
        return unpack_group(await handle) if isinstance(handle, ray.ObjectRef) else handle

    def close(self) -> None:
        """End every worker process; safe to call when some are dead already."""
        for actor in (*(s.actor for s in self._running.values()), self.verifier.actor):
            ray.kill(actor, no_restart=True)

    async def restart(self, sampler: RaySampler) -> RaySampler:
        ray.kill(sampler.actor, no_restart=True)
        return self._start_sampler(sampler.name)

    def _start_sampler(self, name: str) -> RaySampler:
        """On its node, or once that is gone on one that Ray finds room on."""
        node = self._sampler_nodes[name]
        self._running[name] = start_sampler(
            name,
            self._model_path,
            self._sampler_config,
            max_model_len=self._max_model_len,
            log_dir=self._log_dir,
            adapter=self._adapter,
            node=node if node in cluster_nodes() else None,
            for_training=not name.startswith(EVALUATOR),
        )
        return self._running[name]


class RayWorkers(RayServing):
    """Starts, restarts and ends the worker processes of one run."""

    def __init__(
        self,
        *,
        model_path: Path,
        sampler: SamplerConfig,
        learner: LearnerConfig,
        verifier: VerifierConfig,
        publish: PublishConfig,
        max_model_len: int,
        log_dir: Path,
        placement: Placement,
    ) -> None:
        super().__init__(
            model_path=model_path,
            sampler=sampler,
            verifier=verifier,
            max_model_len=max_model_len,
            log_dir=log_dir,
            adapter=learner.lora if publish.policy == "adapter" else None,
            placement=placement,
        )
        evaluator_nodes = {f"{EVALUATOR}-{i}": node for i, node in enumerate(placement.evaluators)}
        self._sampler_nodes |= evaluator_nodes
        self.evaluators = [self._start_sampler(name) for name in evaluator_nodes]
        self.learner = self._start_learner(learner, publish, placement.ranks)

    def put(self, group: RolloutGroup) -> Handle:
        return group  # small and made by the driver: it travels with the call that uses it

    async def fetch_version(self, export: Export) -> WeightPatch:
        try:
            return joined_patch([unpack_patch(part) for part in await asyncio.gather(*export.handles)])
        except OwnerDiedError as error:
            raise _learner_lost(f"archiving of version {export.version}", self._log_dir) from error

    def close(self) -> None:
        super().close()
        for actor in self.learner.ranks:
            ray.kill(actor, no_restart=True)

    def _start_learner(self, config: LearnerConfig, publish: PublishConfig, nodes: Sequence[Node]) -> RayLearner:
        at_rank_0: Any = ray.remote(_meeting_place)
        master = at_rank_0.options(num_cpus=0, scheduling_strategy=on_node(nodes[0])).remote()
        serve_dtype = self._sampler_config.dtype
        actors, log_paths = [], []
        for rank, node in enumerate(nodes):
            log_paths.append(self._log_dir / f"learner-{rank}.log")
            two_threads: Any = ray.remote(concurrency_groups={BESIDE: 1})  # pyright: ignore[reportCallIssue]
            process = two_threads(_LearnerProcess).options(
                num_cpus=0,
                num_gpus=config.gpus_per_rank,
                scheduling_strategy=on_node(node),
                runtime_env={"env_vars": _learner_environment(config)},
            )
            actors.append(process.remote(self._model_path, config, serve_dtype, publish, rank, master, log_paths[-1]))
        merges = config.lora is not None and publish.policy == "merged"
        return RayLearner(actors, log_paths, exports_beside=not merges)


def _learner_environment(config: LearnerConfig) -> dict[str, str]:
    return {
        "DS_ACCELERATOR": "cuda" if config.gpus_per_rank else "cpu",
        "OMP_NUM_THREADS": str(config.threads),
        # Threads that spin while they wait bring a shared machine to a standstill.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _meeting_place() -> tuple[str, int]:
    """This node's address, and a port for the ranks to meet on: free now, which is as much as anyone can know."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]
