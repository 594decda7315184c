"""What an engine is: one model in one process, driven by one thread. Two roles, `SamplerEngine` and `LearnerEngine`.

The plain-PyTorch pair (`engines.plain_sampler`, `engines.plain_learner`) is the executable specification of both;
`tests/engines/test_*_contract.py` hold vLLM and DeepSpeed to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rlpost.core.metrics import StepReport
from rlpost.core.objective import StageSpec
from rlpost.core.patch import WeightPatch
from rlpost.core.subnetwork import Coverage
from rlpost.engines.pretrained import PeftAdapter
from rlpost.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One completion to sample. Every sampling parameter is here: an engine adds no default of its own."""

    id: str
    prompt_ids: tuple[int, ...]
    seed: int
    """The rollout depends on the weights and on this seed, not on which engine serves it or beside what."""
    temperature: float
    """Divides the logits; 0 is greedy."""
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSection:
    """Consecutive entries of one weight of the policy: all of them, or those that one rank answers for.

    Example:
        WeightSection(name="model.norm.weight", shape=(64,), start=0, values_N=tensor([1.0, ...]))
    """

    name: str
    """Its checkpoint name."""
    shape: tuple[int, ...]
    """Of the whole weight."""
    start: int
    """Place of the first entry in the flattened weight."""
    values_N: Tensor
    """[N], in the dtype samplers serve. May be a view of the live weight: read it before the next one, or the next step."""


class SamplerEngine(Protocol):
    """Decodes many requests at once, token by token."""

    @property
    def version(self) -> int:
        """Version of the weights that decode the next token."""
        ...

    def add(self, request: RolloutRequest) -> None: ...

    def has_work(self) -> bool: ...

    def step(self) -> list[tuple[str, Rollout]]:
        """Decode one token for every running request; returns the (request id, rollout) that finished."""
        ...

    @property
    def held(self) -> int | None:
        """The version it proved to hold; None before the first update, and after one that was refused."""
        ...

    def update(self, patch: WeightPatch) -> None:
        """Change the weights between two steps, and prove it.

        Running requests continue under the new weights; what is cached of their past is recomputed, so that every
        token's log-prob is exactly that of its version on its own prefix. The engine compares the checksum of every
        section of what the model now holds with the published one.

        Raises:
            UpdateRefused: when the patch applies to another version than the one held, which then stays; or when the model does
                not hold exactly what was published afterwards: `held` is then None, and it does not sample until a
                complete update succeeds.
        """
        ...


class LearnerEngine(Protocol):
    """One rank's share of the policy being trained."""

    def begin_stage(self, spec: StageSpec) -> Coverage:
        """Fresh optimizer state; copies of the present policy as the reference and as the critic's beginning, if the
        objective needs them. Those of the last stage end here (collective).

        Under LoRA the adapter is merged first and a fresh one begun: the present policy is the new base, and with its
        adapter off the reference.

        Returns:
            What the stage may change, where that is a subnetwork; empty when it is everything.

        Raises:
            ValueError: when the subnetwork has no entry, or what it is read from is not of this policy.
        """
        ...

    def accumulate(
        self,
        rollouts: Sequence[Rollout],
        advantages: Sequence[float],
        *,
        learner_version: int,
        max_staleness: int | None,
    ) -> None:
        """Add these rollouts' summed loss to the step's gradient.

        They are whole groups, and each is scored at its own temperature. For a preference objective those with an
        advantage are pairs, one after another: 1 marks the chosen response, -1 the rejected one. For KTO they mark a
        desirable response and an undesirable one, and any may come alone. With a critic, advantages are the rollouts' rewards
        (`core.objective.credit`), values are those of the critic at the last step, and its gradient accumulates too.

        Every rank is given the same rollouts in the same order and trains its share of them (collective).
        """
        ...

    def step(self, *, denominator: float, lr: float) -> StepReport:
        """Divide the accumulated gradient by `denominator`, clip it, update the weights, clear it (collective).

        The same for the critic, at its own learning rate.
        """
        ...

    def sections(self) -> Iterator[WeightSection]:
        """The policy as samplers serve it, streamed: this rank's sections of every weight, which with those of the other
        ranks are all of it, once. No rank holds more than one whole weight for it.

        An adapter is merged, as in `weights`; or, where the learner was made to serve it, A and s B follow the weight they
        adapt (`core.weights.adapter_names`), and nothing is gathered.

        Collective only where `reads_alone` is False.
        """
        ...

    @property
    def reads_alone(self) -> bool:
        """Whether a rank reads its `sections` without the others, and so beside what they and itself do between two steps."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """The policy under its checkpoint names, in the dtype samplers serve, as CPU copies (collective).

        A LoRA adapter is merged into them, in float32 and from the untouched base.
        """
        ...

    def adapter(self) -> PeftAdapter | None:
        """What this stage has added to its base, in peft's format; None without LoRA (collective)."""
        ...

    def save(self, path: Path) -> None:
        """Write this rank's model, critic, optimizer and RNG state under `path`, as of the last step (collective).

        What was accumulated since is not part of it: an interrupted run trains those groups again.
        """
        ...

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, bit for bit, in the same stage (collective)."""
        ...
