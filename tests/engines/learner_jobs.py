"""Runs learners for the contract tests: here, in a fresh process, or on several ranks."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import socket
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlpost.core.metrics import StepReport
from rlpost.core.objective import PolicyGradient, StageSpec
from rlpost.core.optimizers import AdamW
from rlpost.core.preference import Preference
from rlpost.engines.base import LearnerEngine, WeightSection
from rlpost.engines.lora import checkpoint_weights
from rlpost.engines.lora_layers import LoraSpec
from rlpost.engines.plain_learner import PlainLearner
from rlpost.types import Rollout, VersionSpan

CHILD_TIMEOUT_S = 240
LINEAR = AdamW(eps=1.0, max_grad_norm=1e9)
"""With so large an eps, AdamW's first update is almost lr x gradient: comparing weights compares gradients, and not
only their signs."""
NOISE = torch.tensor([-0.5, -0.06, 0.03, 0.06, 0.5])
"""Log-ratios of the policy and the sampler: inside the clip or far outside, so that rounding moves no token across."""
PAIRS = [1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 0.0, 0.0, -1.0, 1.0]
"""Advantages of the twelve rollouts as five pairs and a tie, for preference objectives."""
TEMPERATURES = 0.8, 0.9, 1.0
"""At which the rollouts were drawn, by turns."""
SPEC = StageSpec(objective=PolicyGradient(), optimizer=LINEAR, num_threads=1)


@dataclass(frozen=True)
class Kind:
    """One implementation in one configuration; zero_stage None is the plain learner."""

    zero_stage: int | None
    dtype: torch.dtype
    lora: LoraSpec | None = None

    @property
    def plain(self) -> Kind:
        return Kind(None, torch.float32, self.lora)

    def __str__(self) -> str:
        name = "plain" if self.zero_stage is None else f"zero{self.zero_stage}-{str(self.dtype)[6:]}"
        return name if self.lora is None else f"{name}-lora"


PLAIN = Kind(None, torch.float32)
FULL = [Kind(stage, dtype) for dtype in (torch.float32, torch.bfloat16) for stage in (1, 2, 3)]
LORA = LoraSpec(rank=4, alpha=8.0)
PLAIN_LORA = replace(PLAIN, lora=LORA)
DEEPSPEED_LORA = [replace(kind, lora=LORA) for kind in FULL[:3] + FULL[4:5]]
DEEPSPEED = [*FULL, *DEEPSPEED_LORA]


@dataclass(frozen=True)
class Job:
    """Learn for some steps from the same rollouts, from the beginning or from a checkpoint."""

    kind: Kind
    model_path: Path
    num_steps: int = 3
    spec: StageSpec = SPEC
    lr: float = 1e-4
    """So small that the policy, and with it the rounding of its forward pass, is nearly the same in every step."""
    denominator: float = 20.0
    rows: tuple[int, ...] = tuple(range(12))
    """Which rollouts, in which order."""
    cuts: tuple[int, ...] = (7,)
    """Where the rollouts of a step are cut into calls of `accumulate`."""
    max_staleness: int = 1
    """0 leaves out the first two tokens of each response, which are of version 0."""
    micro_batch_tokens: int = 64
    gradient_checkpointing: bool = False
    load: Path | None = None
    save: Path | None = None
    save_after: int = 2
    """Steps."""
    stages_before: int = 0
    """Stages of one step each, before the one that is watched."""
    serve_dtype: torch.dtype | None = None
    """None: that of the kind."""
    serve_adapter: bool = False
    watch: bool = False
    """Read what is served before the first step and after each; and beside them, where a rank reads alone."""


@dataclass
class Served:
    """A version as one rank reads it."""

    weights: Mapping[str, Tensor]
    readings: list[list[WeightSection]]
    """First right after the step, then in the middle of the forward and backward passes of the next one."""


@dataclass
class Result:
    before: Mapping[str, Tensor]
    masters: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    reports: list[StepReport] = field(default_factory=list)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    """Masters when the checkpoint was written."""
    critic_before: Mapping[str, Tensor] = field(default_factory=dict)
    critic: Mapping[str, Tensor] = field(default_factory=dict)
    """Masters of the critic at the end; empty without one."""
    critic_saved: Mapping[str, Tensor] = field(default_factory=dict)
    num_state: int = 0
    """Numbers of optimizer state on this rank at the end."""
    served: list[Served] = field(default_factory=list)
    """Version by version, if they are watched."""

    @property
    def moved(self) -> Tensor:
        """How far every weight moved, as one vector."""
        return torch.cat([(self.masters[name] - self.before[name]).flatten() for name in self.masters])

    @property
    def norms(self) -> list[float]:
        return [report.grad_norm for report in self.reports]

    def of_critic(self) -> Result:
        """The same of the critic."""
        reports = [replace(r, grad_norm=r.critic_grad_norm or 0.0) for r in self.reports]
        return Result(self.critic_before, self.critic, {}, reports, self.critic_saved)


@functools.cache
def make_rollouts(model_path: Path) -> tuple[list[Rollout], list[float]]:
    """Twelve rollouts of 7 to 20 tokens, two of them without advantage, from a sampler near the model, each at one of
    TEMPERATURES, in flight while its weights were swapped; three were cut at the token limit."""
    policy = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for index in range(12):
        num_prompt, num_response = 3 + index % 4, 4 + (7 * index) % 11
        length = num_prompt + num_response
        mask = torch.arange(length) >= num_prompt
        token_ids = torch.randint(0, policy.config.vocab_size, (length,), generator=generator)
        temperature = TEMPERATURES[index % 3]
        noise = NOISE[torch.randint(0, len(NOISE), (length,), generator=generator)]
        rollouts.append(
            Rollout(
                token_ids=token_ids,
                loss_mask=mask,
                sampler_logprobs=torch.where(mask, dense_logprobs(policy, token_ids, temperature) + noise, 0.0),
                temperature=temperature,
                spans=(VersionSpan(version=0, start=0, end=2), VersionSpan(version=1, start=2, end=num_response)),
                finish_reason="length" if index % 5 == 1 else "stop",
                text="",
            )
        )
    return rollouts, [1.0, -0.5, 0.0, 2.0, -1.0, 0.5] * 2


@torch.no_grad()
def dense_logprobs(policy: Any, token_ids: Tensor, temperature: float) -> Tensor:
    """[L] log-prob of every token after those before it; 0 for the first."""
    table = torch.log_softmax(policy(token_ids[None]).logits[0, :-1] / temperature, -1)
    return torch.cat([torch.zeros(1), table.gather(-1, token_ids[1:, None])[:, 0]])


def make_learner(job: Job, *, rank: int = 0, world_size: int = 1) -> Any:
    if job.kind.zero_stage is None:
        return PlainLearner(
            job.model_path,
            serve_dtype=job.serve_dtype or torch.float32,
            lora=job.kind.lora,
            serve_adapter=job.serve_adapter,
        )
    from rlpost.engines.deepspeed_learner import DeepSpeedLearner

    return DeepSpeedLearner(
        job.model_path,
        dtype=job.kind.dtype,
        zero_stage=job.kind.zero_stage,  # type: ignore[arg-type]
        micro_batch_tokens=job.micro_batch_tokens,
        serve_dtype=job.serve_dtype or job.kind.dtype,
        rank=rank,
        world_size=world_size,
        gradient_checkpointing=job.gradient_checkpointing,
        lora=job.kind.lora,
        serve_adapter=job.serve_adapter,
        optimizer=type(job.spec.optimizer),
    )


def masters(learner: Any) -> dict[str, Tensor]:
    """The float32 weights the optimizer updates (collective)."""
    trained = {name: p for name, p in learner._scorer.policy.named_parameters() if p.requires_grad}
    if isinstance(learner, PlainLearner):
        return {name: p.detach().clone() for name, p in trained.items()}
    return {name: _master(p) for name, p in trained.items()}


def _master(parameter: nn.Parameter) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter)
    assert master is not None
    return master.clone()


def learner_optimizer(learner: Any) -> Any:
    """The one of its policy."""
    return learner._optimizer if isinstance(learner, PlainLearner) else learner._engine.optimizer


def num_state(optimizer: Any) -> int:
    """How many numbers its state has, step counters aside."""
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() for tensor in tensors if tensor.ndim)


@torch.no_grad()
def stir(learner: Any) -> None:
    """Give a fresh adapter a B: while it is 0, A has no gradient and nothing could be seen of it. B is small, so that no
    token crosses a clip, and holds bfloat16 numbers, so that all dtypes start alike (collective)."""
    generator = torch.Generator().manual_seed(1)
    for weight in checkpoint_weights(learner._scorer.policy):
        if weight.adapter is not None:
            with learner._adapter._whole(weight.adapter, True):
                B_MR = weight.adapter[1]
                B_MR.copy_((torch.randn(B_MR.shape, generator=generator) / 50).bfloat16())
    if not isinstance(learner, PlainLearner):
        learner._engine.optimizer.refresh_fp32_params()


def critic_masters(learner: Any) -> dict[str, Tensor]:
    """The same of its critic; empty without one (collective)."""
    if learner._critic is None:
        return {}
    if isinstance(learner, PlainLearner):
        return {name: p.detach().clone() for name, p in learner._critic.named_parameters()}
    return {name: _master(p) for name, p in learner._critic.module.named_parameters()}


def alone(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rollout as a micro-batch: token ids, lengths, mask and temperatures."""
    lengths, temperatures = torch.tensor([len(rollout.token_ids)]), torch.tensor([rollout.temperature])
    return rollout.token_ids[None], lengths, rollout.loss_mask[None], temperatures


def check_first_ratio(learner: LearnerEngine, fresh: Sequence[Rollout], advantages: Sequence[float]) -> None:
    """On rollouts of the present policy the first step's ratio is exactly 1, and after that step it is not."""
    maxima = []
    for _ in range(2):
        learner.accumulate(fresh, advantages, learner_version=1, max_staleness=1)
        maxima.append(learner.step(denominator=1.0, lr=1e-3).tally.maxima)
    assert (maxima[0]["ratio"], maxima[0]["gap"]) == (1.0, 0.0)
    assert maxima[1]["ratio"] > 1.0 and maxima[1]["gap"] > 1e-6


def train(learner: LearnerEngine, job: Job) -> StepReport:
    rollouts, advantages = make_rollouts(job.model_path)
    if isinstance(job.spec.objective, Preference):
        advantages = PAIRS
    for start, end in zip((0, *job.cuts), (*job.cuts, len(job.rows)), strict=True):
        rows = job.rows[start:end]
        learner.accumulate(
            [rollouts[i] for i in rows],
            [advantages[i] for i in rows],
            learner_version=1,
            max_staleness=job.max_staleness,
        )
    return learner.step(denominator=job.denominator, lr=job.lr)


def run(job: Job, *, rank: int = 0, world_size: int = 1) -> Result:
    learner = make_learner(job, rank=rank, world_size=world_size)
    for _ in range(job.stages_before):
        learner.begin_stage(job.spec)
        train(learner, replace(job, lr=0.01))
    learner.begin_stage(job.spec)
    if job.load is not None:
        learner.load(job.load)
    elif job.kind.lora is not None:
        stir(learner)
    before, critic_before = masters(learner), critic_masters(learner)
    reports, saved, critic_saved, served = [], {}, {}, []
    if job.watch:
        served.append(Served(published(learner, job), [read(learner)]))
        if learner.reads_alone:
            read_beside(learner, served, rank)
    for step in range(job.num_steps):
        reports.append(train(learner, job))
        if job.watch:
            served.append(Served(published(learner, job), [read(learner)]))
        if job.save is not None and step + 1 == job.save_after:
            learner.save(job.save)
            saved, critic_saved = masters(learner), critic_masters(learner)
    result = Result(
        before,
        masters(learner),
        dict(learner.weights()),
        reports,
        saved,
        critic_before=critic_before,
        critic=critic_masters(learner),
        critic_saved=critic_saved,
        num_state=num_state(learner_optimizer(learner)),
        served=served,
    )
    close(learner)
    return result


def published(learner: Any, job: Job) -> Mapping[str, Tensor]:
    """What samplers should be sent, whole; of an adapter beside its base, from what peft would be given (collective)."""
    if not job.serve_adapter:
        return learner.weights()
    tensors: dict[str, Tensor] = {}
    adapter = {name.removeprefix("base_model.model."): tensor for name, tensor in learner.adapter().tensors.items()}
    for weight in checkpoint_weights(learner._scorer.policy):
        with learner._adapter._whole((weight.base,), False):
            tensors[weight.name] = weight.base.detach().clone()
        layer = weight.name.removesuffix(".weight")
        if weight.adapter is not None:
            tensors[f"{layer}.lora_A.weight"] = adapter[f"{layer}.lora_A.weight"]
            tensors[f"{layer}.lora_B.weight"] = 2.0 * adapter[f"{layer}.lora_B.weight"].float()
    return {name: tensor.to(job.serve_dtype) for name, tensor in tensors.items()}


def read(learner: LearnerEngine) -> list[WeightSection]:
    """Copies of this rank's sections, each made before the next one is asked for."""
    return [replace(section, values_N=section.values_N.clone()) for section in learner.sections()]


def read_beside(learner: Any, served: list[Served], rank: int) -> None:
    """From now on, read whenever the embedding's gradient is about to be computed; the first rank, whom the others would
    keep waiting if it needed them, also when the embedding has just been."""

    def note(*_: Any) -> None:
        served[-1].readings.append(read(learner))

    def on_forward(module: Any, inputs: Any, output: Tensor) -> None:
        if rank == 0:
            note()
        if output.requires_grad:
            output.register_hook(note)

    learner._scorer.policy.get_input_embeddings().register_forward_hook(on_forward)


def close(learner: Any) -> None:
    if not isinstance(learner, PlainLearner):
        learner.close()


def run_in_children(jobs: Sequence[Job], *, world_size: int) -> list[list[Result]]:
    """Results of the jobs, one after the other, per rank: fresh processes joined by gloo."""
    context = multiprocessing.get_context("spawn")
    port, pipes, processes = free_port(), [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(theirs, list(jobs), rank, world_size, port), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [_answer(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answer(pipe: Any) -> list[Result]:
    if not pipe.poll(CHILD_TIMEOUT_S):
        raise TimeoutError(f"no answer from a learner rank in {CHILD_TIMEOUT_S} s")
    answer = torch.load(pipe.recv(), weights_only=False)
    if isinstance(answer, str):
        raise RuntimeError(f"a learner rank failed:\n{answer}")
    return answer


def _serve(pipe: Any, jobs: list[Job], rank: int, world_size: int, port: int) -> None:
    import tempfile

    from rlpost.engines.deepspeed_learner import init_distributed

    torch.set_num_threads(1)
    answer: Any
    try:
        init_distributed(rank=rank, world_size=world_size, master_port=port, timeout_s=60)
        gc.freeze()  # as in conftest.py
        answer = [run(job, rank=rank, world_size=world_size) for job in jobs]
    except Exception:  # noqa: BLE001 - raised again in the parent
        answer = traceback.format_exc()
    # Through a file: tensors sent over a pipe live in the sender, which is about to end.
    with tempfile.NamedTemporaryFile(suffix=".pt", delete=False) as file:
        torch.save(answer, file)
    pipe.send(file.name)
