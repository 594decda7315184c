"""The learner on DeepSpeed: one rank of a ZeRO-sharded policy. The one file that imports deepspeed."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

# Without it DeepSpeed probes for every accelerator it knows, and warns that it found none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime import bf16_optimizer
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from rlpost.core.batching import collate, plan_micro_batches
from rlpost.core.critic import Values
from rlpost.core.metrics import StepReport, Tally
from rlpost.core.objective import StageSpec, critic_loss_and_tally, critic_of, loss_and_tally, trained_units
from rlpost.core.optimizers import AdamW, OptimizerSpec
from rlpost.core.subnetwork import Coverage, Subnetwork, coverage
from rlpost.engines.base import WeightSection
from rlpost.engines.forward import Scorer, copy_policy, load_policy
from rlpost.engines.lora import Adapter, checkpoint_weights, keep_trained, unmerged
from rlpost.engines.lora_layers import LoraSpec
from rlpost.engines.optimizers import TrainedEntries, apply_settings, make_optimizer
from rlpost.engines.plain_learner import check_finite
from rlpost.engines.pretrained import PeftAdapter, write_tensors
from rlpost.engines.reference import Reference
from rlpost.engines.subnetwork import Masks, check_trains_something, hold_gradients
from rlpost.engines.value_model import ValueModel
from rlpost.types import Rollout

MAX_BUCKET_ELEMENTS = 200_000_000
"""Gradients are reduced in buckets of at most this many elements."""
TAG, CRITIC_TAG = "deepspeed", "deepspeed-critic"
"""Names of DeepSpeed's own folders in a checkpoint."""
NO_ROLLOUT = torch.zeros(1, 2, dtype=torch.int64)
"""[1, 2] token ids for a backward pass without rollouts; nothing of it is on a loss mask."""


def init_distributed(
    *, rank: int, world_size: int, master_addr: str = "127.0.0.1", master_port: int, timeout_s: float = 600.0
) -> None:
    """Join the learner ranks of a run. Each process sees one device; collective.

    Raises:
        torch.distributed.DistStoreError: when not all ranks have joined after `timeout_s`.
    """
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch is renaming, in every ZeRO-3 step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # DeepSpeed would compile this extension on the spot, and a build killed half-way leaves a lock that hangs every
    # later process for ever. gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # BF16_Optimizer reports memory four times to stdout, each after a full garbage collection: most of its start-up.
    bf16_optimizer.see_memory_usage = _no_report
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",
        MASTER_ADDR=master_addr,
        MASTER_PORT=str(master_port),
    )
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )


class DeepSpeedLearner:
    """One rank; `init_distributed` comes first, and every method is collective, but for `sections` where `reads_alone`.

    Master weights, optimizer state and the accumulated gradient are float32 whatever `dtype` computes in. Losses are
    sums, and the step's denominator is known only when its last group has arrived: `backward` only accumulates
    (`managed_gradient_accumulation` off), and `step` divides once.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: torch.dtype,
        zero_stage: Literal[1, 2, 3],
        micro_batch_tokens: int,
        serve_dtype: torch.dtype,
        rank: int,
        world_size: int,
        gradient_checkpointing: bool = False,
        lora: LoraSpec | None = None,
        serve_adapter: bool = False,
        optimizer: type[OptimizerSpec] = AdamW,
    ) -> None:
        """
        Args:
            serve_adapter: samplers have the adapter beside the base; False: merged into it.
        """
        if zero_stage not in (1, 2, 3):
            # Stage 0 in bfloat16 starts Adam's step counter at 1: its first update is 0.74 of what it should be.
            raise ValueError(f"zero_stage = {zero_stage}: use 1 (one rank, or a model that fits on each), 2 or 3")
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype = {dtype}: the learner computes in bfloat16 or float32")
        self._model_path, self._dtype, self._serve_dtype = model_path, dtype, serve_dtype
        self._zero_stage, self._micro_batch_tokens = zero_stage, micro_batch_tokens
        self._rank, self._world_size = rank, world_size
        self._merges = lora is not None and not serve_adapter
        self._gradient_checkpointing = gradient_checkpointing
        policy = load_policy(model_path, dtype)
        self._adapter = None if lora is None else Adapter(policy, lora, self._whole)
        self._scorer = Scorer(self._checkpointing(policy)).train()
        if self._adapter is not None:
            self._scorer.register_state_dict_post_hook(keep_trained)
        self._optimizer_kind = optimizer
        self._engine, self._entries = self._initialize(self._scorer)
        self._spec: StageSpec | None = None
        self._reference: Reference | None = None
        self._critic: Any = None
        """An engine of its own, of a `ValueModel`, while the stage's objective has a critic."""
        self._tallies: list[Tally] = []
        self._masks: Mapping[str, Tensor] = {}
        self._held: Sequence[RemovableHandle] = ()
        self._num_backwards = 0

    def begin_stage(self, spec: StageSpec) -> Coverage:
        self._apply(spec)
        self._engine.optimizer.state.clear()
        if self._adapter is not None:
            self._adapter.renew(spec.adapter_seed)
            self._engine.optimizer.refresh_fp32_params()
        elif spec.objective.needs_reference:
            self._refer_to_copy({name: p.cpu() for name, p in self._gathered()}, spec)
        self._begin_critic(spec)
        return self._train_only({} if spec.subnetwork is None else self._masks_of(spec.subnetwork))

    def accumulate(
        self,
        rollouts: Sequence[Rollout],
        advantages: Sequence[float],
        *,
        learner_version: int,
        max_staleness: int | None,
    ) -> None:
        spec = self._spec
        assert spec is not None, "begin_stage comes first"
        units = trained_units(spec.objective, rollouts, advantages)
        micro_batches = plan_micro_batches(
            [sum(len(rollouts[row].token_ids) for row in unit) for unit in units],
            max_tokens=self._micro_batch_tokens,
            num_ranks=self._world_size,
        )
        for picked in micro_batches[self._rank :: self._world_size]:
            if not picked:
                self._backward_of_nothing()
                continue
            rows = [row for index in picked for row in units[index]]
            batch = collate(
                [rollouts[row] for row in rows],
                [advantages[row] for row in rows],
                aggregation=spec.objective.aggregation,
                learner_version=learner_version,
                max_staleness=max_staleness,
            )
            inputs = self._inputs(batch.token_ids_BT, batch.lengths_B, batch.loss_mask_BT)
            temperatures_B = self._on_device(batch.temperatures_B)
            reference_BT = None
            if self._reference is not None:
                reference_BT = self._reference(*inputs, temperatures_B)
            # The loss is a few thousand numbers: on the host, core's functions need no devices.
            logprobs_BT, entropies_BT = (x.cpu() for x in self._engine(*inputs, temperatures_B))
            values = None
            if self._critic is not None:
                values = Values(*(x.cpu() for x in self._critic(*inputs)))
                loss, tally = critic_loss_and_tally(spec.objective, batch, values, logprobs_BT, reference_BT)
                self._critic.backward(loss)
                self._tallies.append(tally)
            loss, tally = loss_and_tally(spec.objective, batch, logprobs_BT, entropies_BT, reference_BT, values)
            self._backward(loss)
            self._tallies.append(tally)

    def step(self, *, denominator: float, lr: float) -> StepReport:
        """See `LearnerEngine.step`; the tally is this rank's share.

        Raises:
            RuntimeError: when a gradient, the policy's or its critic's, is not finite; the weights it was for are then unchanged.
        """
        if not self._num_backwards:
            self._backward_of_nothing()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        with self._gradient_divided_by(denominator, self._engine.optimizer):
            self._engine.step()
        critic_norm = None
        if self._critic is not None:
            with self._gradient_divided_by(denominator, self._critic.optimizer):
                self._critic.step()
            critic_norm = float(self._critic.get_global_grad_norm())
        self._num_backwards = 0
        norm = float(self._engine.get_global_grad_norm())
        report = StepReport(grad_norm=norm, tally=Tally.merge(self._tallies), critic_grad_norm=critic_norm)
        self._tallies = []
        check_finite(norm, critic_norm)
        return report

    def sections(self) -> Iterator[WeightSection]:
        for name, shape, start, values_N in self._own_entries():
            # A weight without entries comes once all the same.
            if len(values_N) or (self._rank == 0 and not math.prod(shape)):
                yield WeightSection(name=name, shape=shape, start=start, values_N=values_N.to(self._serve_dtype))

    @property
    def reads_alone(self) -> bool:
        return not self._merges

    def weights(self) -> Mapping[str, Tensor]:
        return {name: p.to("cpu", self._serve_dtype, copy=True) for name, p in self._gathered()}

    def adapter(self) -> PeftAdapter | None:
        return None if self._adapter is None else self._adapter.export()

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(path), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        if self._adapter is not None:
            self._adapter.save_base(path, write=self._rank == 0)
        if self._critic is not None:
            self._critic.save_checkpoint(str(path), tag=CRITIC_TAG, save_latest=False)
        torch.save(_rng_state(), path / f"rng-{self._rank}.pt")
        if self._rank == 0:
            (path / "learner.json").write_text(json.dumps(self._layout()) + "\n")
            if self._reference is not None and isinstance(copy := self._reference.score, Scorer):
                write_tensors(dict(copy.policy.named_parameters()), path / "reference.safetensors")
            if self._masks:
                write_tensors(self._masks, path / "subnetwork.safetensors")
        dist.barrier()

    def load(self, path: Path) -> None:
        """See `LearnerEngine.load`.

        Raises:
            ValueError: when the checkpoint was written by a learner of another layout.
        """
        spec = self._spec
        assert spec is not None, "begin_stage comes first"
        saved, present = json.loads((path / "learner.json").read_text()), self._layout()
        for key, value in present.items():
            if saved.get(key) != value:
                raise ValueError(
                    f"{path} was saved with {key} = {saved.get(key)} and this learner has {key} = {value}: optimizer state"
                    f" is laid out that way, so resume with {key} = {saved.get(key)}"
                )
        for engine, tag in ((self._engine, TAG), (self._critic, CRITIC_TAG)):
            if engine is None:
                continue
            strict = self._adapter is None or tag == CRITIC_TAG  # an adapter's frozen weights are not in it
            with redirect_stdout(StringIO()):  # BF16_Optimizer prints a debugging line
                loaded, _ = engine.load_checkpoint(
                    str(path), tag=tag, load_module_strict=strict, load_lr_scheduler_states=False
                )
            if loaded is None:
                raise RuntimeError(f"{path / tag} holds no DeepSpeed checkpoint: resume from an earlier checkpoint")
        # The checkpoint's optimizer settings came with its state: this stage's own prevail.
        self._apply(spec)
        self._apply_critic(spec)
        if self._adapter is not None:
            self._adapter.load_base(path)
        elif spec.objective.needs_reference:
            self._refer_to_copy(load_file(path / "reference.safetensors"), spec)
        if spec.subnetwork is not None:  # chosen by the weights at the start of the stage, which are gone
            masks = load_file(path / "subnetwork.safetensors")
            self._train_only({name: self._on_device(mask) for name, mask in masks.items()})
        _set_rng_state(torch.load(path / f"rng-{self._rank}.pt", weights_only=True))

    def close(self) -> None:
        """Undo DeepSpeed's hooks; a process that makes another learner calls it first."""
        self._end_critic()
        self._engine.destroy()

    def _initialize(self, model: nn.Module) -> tuple[Any, TrainedEntries]:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, entries = make_optimizer(trained, self._optimizer_kind)
        engine: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_config(self._dtype, self._zero_stage, sum(p.numel() for p in trained)),
            dist_init_required=False,
        )[0]
        # Else it keeps views into the first stage's state, and so its memory, for good.
        engine.optimizer._hp_optimizer_states_linked = True
        return engine, entries

    def _checkpointing(self, policy: PreTrainedModel) -> PreTrainedModel:
        if self._gradient_checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return policy

    def _begin_critic(self, spec: StageSpec) -> None:
        """A fresh one from the present policy if the stage needs one, in place of the last stage's."""
        self._end_critic()
        if critic_of(spec.objective) is not None:
            weights = {name: p.cpu() for name, p in self._gathered()}
            policy = self._checkpointing(copy_policy(self._model_path, self._dtype, weights))
            self._critic, self._critic_entries = self._initialize(ValueModel(policy).train())
            self._apply_critic(spec)

    def _end_critic(self) -> None:
        if self._critic is not None:
            self._critic.destroy()
            self._critic = None

    def _apply_critic(self, spec: StageSpec) -> None:
        if critic := critic_of(spec.objective):
            apply_settings(spec.optimizer, self._critic.optimizer, self._critic_entries)
            self._critic.optimizer.clip_grad = spec.optimizer.max_grad_norm
            for group in self._critic.optimizer.param_groups:
                group["lr"] = critic.lr

    def _apply(self, spec: StageSpec) -> None:
        assert type(spec.optimizer) is self._optimizer_kind, "one kind of optimizer per learner"
        torch.set_num_threads(spec.num_threads)
        self._spec, self._reference = spec, None
        if self._adapter is not None and spec.objective.needs_reference:
            self._reference = Reference(
                self._score_without_adapter, remember=spec.responses_recur, collective=self._zero_stage == 3
            )
        apply_settings(spec.optimizer, self._engine.optimizer, self._entries)
        self._engine.optimizer.clip_grad = spec.optimizer.max_grad_norm

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        self._num_backwards += 1

    def _backward_of_nothing(self) -> None:
        """A zero gradient on every weight: reductions need each rank, and a step needs a gradient."""
        inputs = self._inputs(NO_ROLLOUT, torch.tensor([2]), NO_ROLLOUT.bool())
        temperatures_B = self._on_device(torch.ones(1))
        # In the order of a micro-batch with rollouts: another rank may have one.
        if self._reference is not None:
            self._reference(*inputs, temperatures_B)  # by the policy's own weights, ZeRO-3 gathers them on every rank
        logprobs_BT, _ = self._engine(*inputs, temperatures_B)
        if self._critic is not None:
            values_BT, _ = self._critic(*inputs)
            self._critic.backward(values_BT.sum())
        self._backward(logprobs_BT.sum())

    @contextmanager
    def _gradient_divided_by(self, denominator: float, optimizer: Any) -> Iterator[None]:
        """While it holds, DeepSpeed's step sees the accumulated gradient divided by `denominator`.

        The reduction averages over ranks, so dividing by denominator / world_size divides the sum by the denominator.
        """
        scale = denominator / self._world_size
        if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
            for gradient in optimizer.fp32_groups_gradients_flat:
                gradient.div_(scale)
            yield
            return
        # A loss scale is what the optimizer divides out before it measures, clips and applies the gradient.
        optimizer.loss_scale = scale
        try:
            yield
        finally:
            optimizer.loss_scale = 1.0

    def _masks_of(self, subnetwork: Subnetwork) -> dict[str, Tensor]:
        """The mask of each whole weight. The first rank makes them for all: two machines may round an SVD differently."""
        made = None if self._rank else Masks(subnetwork, self._scorer.policy, serve_dtype=self._serve_dtype)
        masks = {}
        for name, weight in self._gathered():
            mask = torch.empty_like(weight, dtype=torch.bool) if made is None else made.mask_of(name, weight)
            dist.broadcast(mask.view(torch.uint8), src=0)
            masks[name] = mask
        check_trains_something(masks, subnetwork)
        return masks

    def _train_only(self, masks: Mapping[str, Tensor]) -> Coverage:
        for handle in self._held:
            handle.remove()
        self._masks, self._held = masks, hold_gradients(dict(self._scorer.policy.named_parameters()), masks)
        self._entries.masks = self._partitioned(masks) if masks else {}
        return coverage(masks)

    @torch.no_grad()
    def _partitioned(self, masks: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """The masks as DeepSpeed lays out this rank's master weights: flat, cut anywhere, padded.

        They go the way of the masters, which come back afterwards: how it lays them out stays DeepSpeed's own affair.
        """
        optimizer = self._engine.optimizer
        if self._zero_stage == 3:
            partitions = list(optimizer.fp32_partitioned_groups_flat)
        else:
            partitions = [partition for group in optimizer.param_groups for partition in group["params"]]
        masters = [partition.to("cpu", copy=True) for partition in partitions]
        for partition in partitions:
            partition.zero_()
        named: Iterator[tuple[str, Any]] = self._scorer.policy.named_parameters()
        for name, parameter in named:
            value = masks[name].float()
            if self._zero_stage == 3:  # setting it whole fails where its size is no multiple of the ranks'
                numel = parameter.ds_tensor.numel()
                padded = torch.nn.functional.pad(value.flatten(), (0, numel * self._world_size - value.numel()))
                safe_set_local_fp32_param(parameter, padded[self._rank * numel :][:numel])
            else:
                safe_set_full_fp32_param(parameter, value)
        flat = {partition: partition != 0 for partition in partitions}
        for partition, master in zip(partitions, masters, strict=True):
            partition.copy_(master)
        return flat

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, whole weight) one at a time; with ZeRO-3 only until the next one."""
        for weight in checkpoint_weights(self._scorer.policy):
            with self._whole(weight.parameters, False):
                yield weight.name, weight.value().clone() if self._zero_stage == 3 else weight.value()

    def _own_entries(self) -> Iterator[tuple[str, tuple[int, ...], int, Tensor]]:
        """(checkpoint name, shape of the weight, place of the first entry, [N] entries) that this rank answers for."""
        if self._merges:
            for name, value in self._gathered():
                yield name, tuple(value.shape), *self._own_part(value)
            return
        for name, parameter, factor in unmerged(self._scorer.policy):
            whole: Any = parameter
            if self._zero_stage == 3:
                # DeepSpeed's own cut: a step writes these shards, and all else gathers from them. The last one is padded.
                shape, start = whole.ds_shape, min(self._rank * whole.ds_tensor.numel(), whole.ds_numel)
                entries_N = whole.ds_tensor[: whole.ds_numel - start]
            else:
                shape, (start, entries_N) = whole.shape, self._own_part(whole.detach())
            yield name, tuple(shape), start, entries_N if factor == 1 else factor * entries_N.float()

    def _own_part(self, value: Tensor) -> tuple[int, Tensor]:
        """Where this rank's equal part of a weight begins, and its entries."""
        start, stop = (value.numel() * rank // self._world_size for rank in (self._rank, self._rank + 1))
        return start, value.flatten()[start:stop]

    def _whole(self, parameters: Sequence[nn.Parameter], written: bool) -> AbstractContextManager[None]:
        """While it holds, every rank has these parameters whole; what it has `written` to them stays, with rank 0's."""
        if self._zero_stage != 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if written else None)

    def _score_without_adapter(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        assert self._adapter is not None
        with self._adapter.off():
            return self._engine(*inputs)

    def _refer_to_copy(self, tensors: Mapping[str, Tensor], spec: StageSpec) -> None:
        copy = Scorer(copy_policy(self._model_path, self._dtype, tensors)).requires_grad_(False)
        self._reference = Reference(copy.to(self._engine.device), remember=spec.responses_recur)

    def _inputs(self, token_ids_BT: Tensor, lengths_B: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._on_device(token_ids_BT), self._on_device(lengths_B), self._on_device(mask_BT)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._engine.device)

    def _layout(self) -> dict[str, Any]:
        return {
            "world_size": self._world_size,
            "zero_stage": self._zero_stage,
            "dtype": str(self._dtype),
            "lora": None if self._adapter is None else str(self._adapter.spec),
        }


def stored_masters(path: Path) -> dict[str, Tensor]:
    """float32 master weights of the policy, by checkpoint name, in what a learner of any number of ranks has saved.

    It is unpickled: only what you trust.

    Raises:
        ValueError: when an adapter was trained.
    """
    layout = json.loads((path / "learner.json").read_text())
    if layout["lora"]:
        raise ValueError(
            f"{path} has the masters of an adapter alone ({layout['lora']}): compare what the run exported"
        )
    if (layout["zero_stage"], layout["dtype"]) == (1, "torch.bfloat16"):
        found = _masters_of_bf16_optimizer(path / TAG, layout["world_size"])
    else:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # progress, without end
            found = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=TAG, exclude_frozen_parameters=True)
        assert found is not None
    prefix = "policy."  # as `Scorer` calls it
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def _masters_of_bf16_optimizer(path: Path, num_ranks: int) -> dict[str, Tensor]:
    """Those that DeepSpeed's own reader refuses: of each group of parameters, one rank's part after another."""
    model = torch.load(path / "mp_rank_00_model_states.pt", weights_only=False)
    files = [path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(num_ranks)]
    parts = [torch.load(file, mmap=True, weights_only=False)["optimizer_state_dict"] for file in files]
    masters = {}
    for group, shapes in enumerate(model["param_shapes"]):
        flat_N = torch.cat([part["single_partition_of_fp32_groups"][group] for part in parts])
        sizes = [shape.numel() for shape in shapes.values()]
        pieces = flat_N[: sum(sizes)].split(sizes)
        masters |= {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    return masters


def _config(dtype: torch.dtype, zero_stage: int, num_elements: int) -> dict[str, Any]:
    bucket = min(num_elements + num_elements % 2, MAX_BUCKET_ELEMENTS)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 1.0,
        # Ours are elementwise, so that they may see weights flattened and cut; tests hold them to the plain learner.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }


def _no_report(message: str, force: bool = False) -> None: ...


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
