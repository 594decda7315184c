"""The sockets of the pipeline: what it asks of samplers, verifiers and learners. No engine, no Ray, no I/O here.

A `Handle` stands for a group's tokens wherever they live (this process, or Ray's object store). The control plane passes
handles on and never looks inside: it decides by `GroupSummary` and `Judgement`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlpost.core.metrics import StepReport
from rlpost.core.objective import StageSpec
from rlpost.core.patch import WeightPatch
from rlpost.core.subnetwork import Coverage
from rlpost.types import GroupSummary, Judgement, Prompt, RolloutGroup

Handle = Any
Seconds = Mapping[str, float]
"""State name to the seconds a worker spent in it since it was last asked; they sum to the wall time between."""


class WorkerLost(Exception):
    """A worker died, or did not answer within its deadline: names the worker, what it was doing, and its log's tail."""

    def __init__(self, worker: str, phase: str, detail: str) -> None:
        super().__init__(worker, phase, detail)
        self.worker, self.phase, self.detail = worker, phase, detail

    def __str__(self) -> str:
        return f"{self.worker} was lost during {self.phase}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """Sample one group. Seeds make a rollout independent of the sampler that serves it."""

    prompt: Prompt
    seeds_G: tuple[int, ...]
    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedGroup:
    """A group on its way to the learner: its tokens by handle, its credit by value."""

    handle: Handle
    kept_G: tuple[int, ...]
    """The rollouts to train, by index: all but those that nobody could judge."""
    advantages_G: tuple[float, ...]
    """One per kept rollout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A version ready to be published: its bytes by handle, its identity by value."""

    version: int
    base: int | None
    """The version whose changes it is; None when it is complete."""
    handles: tuple[Handle, ...]
    """One per learner rank."""
    num_bytes: int
    """What a sampler is sent."""
    full_bytes: int
    """What it would be sent of a complete version."""
    num_changed: int
    num_values: int

    @property
    def unchanged_fraction(self) -> float | None:
        """Share of the weights that are bit-identical to those of `base`."""
        return None if self.base is None else 1 - self.num_changed / self.num_values

    @classmethod
    def of(cls, patch: WeightPatch, handle: Handle) -> Export:
        """What the control plane needs to know of a rank's patch, which lies behind `handle`."""
        return cls(
            version=patch.version,
            base=patch.base,
            handles=(handle,),
            num_bytes=patch.num_bytes,
            full_bytes=patch.full_bytes,
            num_changed=patch.num_changed,
            num_values=patch.num_values,
        )

    @classmethod
    def joined(cls, parts: Sequence[Export]) -> Export:
        """One version from those of all ranks."""
        (version,), (base,) = {part.version for part in parts}, {part.base for part in parts}
        return cls(
            version=version,
            base=base,
            handles=tuple(handle for part in parts for handle in part.handles),
            num_bytes=sum(part.num_bytes for part in parts),
            full_bytes=sum(part.full_bytes for part in parts),
            num_changed=sum(part.num_changed for part in parts),
            num_values=sum(part.num_values for part in parts),
        )


class Sampler(Protocol):
    name: str

    async def sample(self, request: GroupRequest) -> tuple[Handle, GroupSummary]:
        """Raises WorkerLost if the sampler dies; the group can then be sampled elsewhere."""
        ...

    async def held(self) -> int | None:
        """The version it has proved to hold; None when it holds none, and needs a complete one."""
        ...

    async def update(self, export: Export) -> int:
        """Hold `export` from the next token on; returns the version the sampler proved to hold.

        Raises:
            UpdateRefused: when it cannot; a complete version puts it right.
        """
        ...

    async def seconds(self) -> Seconds: ...


class Verifier(Protocol):
    name: str

    async def judge(self, handle: Handle, shaping: Mapping[str, Any] | None = None) -> tuple[Judgement, ...]:
        """One judgement per rollout of the group, in order; with `shaping`, its reward and parts are those of
        `reward.shaping.shape`."""
        ...

    async def seconds(self) -> Seconds: ...


class Learner(Protocol):
    """All ranks as one."""

    name: str

    async def begin_stage(self, spec: StageSpec) -> Coverage: ...

    async def accumulate(
        self, groups: Sequence[GradedGroup], *, learner_version: int, max_staleness: int | None
    ) -> None: ...

    async def step(self, *, denominator: float, lr: float) -> StepReport: ...

    @property
    def exports_beside(self) -> bool:
        """Whether `export` and `accumulate` may run at the same time; before `step` it has to have ended anyway."""
        ...

    async def export(self, version: int) -> Export:
        """The present policy, as changes of the version exported last; the first time complete."""
        ...

    async def complete(self) -> Export:
        """The version exported last, whole."""
        ...

    async def save(self, path: Path) -> None: ...

    async def load(self, path: Path) -> None: ...

    async def save_pretrained(self, path: Path) -> None:
        """A plain Hugging Face directory: weights, config, tokenizer."""
        ...

    async def seconds(self) -> Seconds: ...


class Serving(Protocol):
    """Samplers that hold a model, and a verifier."""

    @property
    def samplers(self) -> Sequence[Sampler]:
        """Those that were started first."""
        ...

    @property
    def verifier(self) -> Verifier: ...

    async def fetch(self, handle: Handle) -> RolloutGroup:
        """Bring a group's tokens here, to log them."""
        ...

    async def restart(self, sampler: Any) -> Sampler:
        """Replace a dead sampler; the new one holds no published version yet."""
        ...


class Workers(Serving, Protocol):
    """Everything that holds a model or judges one, wherever it runs."""

    learner: Learner

    @property
    def evaluators(self) -> Sequence[Sampler]:
        """Samplers that nothing is trained on: they are for evaluations alone."""
        ...

    def put(self, group: RolloutGroup) -> Handle:
        """Make a group that no sampler produced (a demonstration) available to the learner."""
        ...

    async def fetch_version(self, export: Export) -> WeightPatch:
        """Bring a version's bytes here, to keep them."""
        ...


class PromptSource(Protocol):
    """Prompts by ordinal: the n-th admission of a stage always gets the same prompt, resumed or not."""

    def __getitem__(self, ordinal: int) -> Prompt: ...

    def __len__(self) -> int:
        """Prompts of the epoch that began last."""
        ...

    def observe(self, ordinal: int, solved: float) -> None:
        """The group of `ordinal` has been judged: this share of it is right. Epochs that begin later may differ."""
        ...

    @property
    def state(self) -> Any:
        """What the prompts of ordinals given out depend on beside data and seed, as plain data; `restore` takes it."""
        ...

    def restore(self, state: Any) -> None: ...

    @property
    def fingerprint(self) -> str:
        """Changes when the data or its order changes; a resume on different data is refused."""
        ...
