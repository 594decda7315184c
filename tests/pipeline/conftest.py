"""A whole run on the plain pair, in this process: real tokens, real gradients, no Ray, about a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpost.core.objective import Objective, PolicyGradient, StageSpec, Supervised
from rlpost.core.optimizers import AdamW
from rlpost.core.weights import checksum
from rlpost.data.prompts import Prompts, ShuffledPrompts
from rlpost.engines.lora_layers import LoraSpec
from rlpost.engines.plain_learner import PlainLearner
from rlpost.engines.plain_sampler import PlainSampler
from rlpost.pipeline.buffer import Position, StagePlan
from rlpost.pipeline.controller import Controller, RunSettings, Stage
from rlpost.pipeline.evaluation import EvalSet
from rlpost.pipeline.fleet import Limits
from rlpost.pipeline.moving_on import History
from rlpost.types import Judgement, Prompt, Rollout, RolloutGroup
from rlpost.workers.local import LocalLearner, LocalSampler, LocalVerifier, LocalWorkers

PROMPTS = tuple(
    Prompt(
        id=f"prompt-{i}",
        token_ids=(10 + i, 20, 30),
        task="math",
        reference={},
        demonstration_ids=(40 + i % 7, 41, 1),
        rejected_ids=(40 + (i + 3) % 7, 42, 43, 1),
    )
    for i in range(12)
)


@dataclass
class MemoryTracker:
    rows: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def log(self, kind: str, row: Mapping[str, Any]) -> None:
        self.rows.append((kind, row))

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        return [row for k, row in self.rows if k == kind]

    def events(self, name: str) -> list[Mapping[str, Any]]:
        return [row for row in self.of("event") if row["event"] == name]


@dataclass
class DirectoryCheckpoints:
    """Saves the learner like the real ones, without manifest; of exports it keeps the names."""

    root: Path
    written: list[Position] = field(default_factory=list)
    exported: list[str] = field(default_factory=list)

    async def write(self, position: Position, learner: Any) -> None:
        await learner.save(self.path(position.step))
        self.written.append(position)

    async def export(self, stage: str, learner: Any) -> None:
        self.exported.append(stage)

    def path(self, step: int) -> Path:
        return self.root / f"step-{step}"


def parity_judge(group: RolloutGroup, rollout: Rollout) -> Judgement:
    """Reward 1 for an even sum of response tokens: learnable, cheap, and different within most groups."""
    even = int(rollout.token_ids[rollout.loss_mask].sum()) % 2 == 0
    return Judgement(reward=float(even), outcome="correct" if even else "wrong")


def make_stage(
    name: str = "rl",
    *,
    steps: int = 4,
    prompts: int = 3,
    staleness: int | None = 1,
    group_size: int = 4,
    max_tokens: int = 5,
    lr: float = 1e-3,
    objective: Objective | None = None,
    **settings: Any,
) -> Stage:
    objective = objective or (Supervised() if staleness is None else PolicyGradient())
    return Stage(
        name=name,
        plan=StagePlan(num_steps=steps, groups_per_step=prompts, max_staleness=staleness),
        prompts=ShuffledPrompts(Prompts.listed(PROMPTS), seed=0),
        spec=StageSpec(objective=objective, optimizer=AdamW(), num_threads=1),
        group_size=group_size,
        max_response_tokens=max_tokens,
        lr=lr,
        **settings,
    )


@dataclass
class Run:
    controller: Controller
    tracker: MemoryTracker
    checkpoints: DirectoryCheckpoints
    learner: PlainLearner

    def start(self) -> Run:
        asyncio.run(self.controller.run())
        return self

    @property
    def digest(self) -> dict[str, str]:
        return {name: checksum(tensor) for name, tensor in self.learner.weights().items()}

    def losses(self) -> list[tuple[float, float]]:
        return [(row["actor/pg_loss"], row["actor/grad_norm"]) for row in self.tracker.of("step")]


@pytest.fixture
def make_run(tiny_model: Path, tmp_path: Path) -> Callable[..., Run]:
    """make_run(stages, num_samplers=1, num_evaluators=0, judge=..., eval_sets=(), evaluated=None, start=None, history=None,
    publish_changes=True, archive=None, observer=None, lora=None, serve_adapter=False, **RunSettings)"""

    def build(
        stages: Sequence[Stage],
        *,
        num_samplers: int = 1,
        num_evaluators: int = 0,
        wrap_sampler: Callable[[LocalSampler], Any] = lambda sampler: sampler,
        restart: Any = None,
        judge: Callable[[RolloutGroup, Rollout], Judgement] = parity_judge,
        eval_sets: Sequence[EvalSet] = (),
        evaluated: Any = None,
        start: Position | None = None,
        load_from: Path | None = None,
        history: History | None = None,
        publish_changes: bool = True,
        archive: Any = None,
        lora: LoraSpec | None = None,
        serve_adapter: bool = False,
        observer: Any = None,
        **settings: Any,
    ) -> Run:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        learner = PlainLearner(tiny_model, lora=lora, serve_adapter=serve_adapter)
        beside = lora if serve_adapter else None
        samplers, evaluators = (
            [wrap_sampler(LocalSampler(f"{name}-{i}", PlainSampler(tiny_model, lora=beside))) for i in range(num)]
            for name, num in (("sampler", num_samplers), ("evaluator", num_evaluators))
        )
        publishing = LocalLearner(learner, tiny_model, publish_changes=publish_changes)
        workers = LocalWorkers(samplers, LocalVerifier(judge), publishing, restart, evaluators)
        tracker, checkpoints = MemoryTracker(), DirectoryCheckpoints(tmp_path / "checkpoints")
        run_settings = RunSettings(**{"seed": 0, "limits": Limits(), **settings})
        controller = Controller(
            stages,
            workers,
            tracker,
            checkpoints,
            run_settings,
            decode=lambda token_ids: " ".join(map(str, token_ids)),
            eval_sets=eval_sets,
            evaluated=evaluated,
            archive=archive,
            observer=observer,
            start=start,
            load_from=load_from,
            history=history,
        )
        return Run(controller, tracker, checkpoints, learner)

    return build
