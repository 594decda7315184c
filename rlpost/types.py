"""The records that flow through the pipeline, and nothing else.

A `Prompt` is sampled into G `Rollout`s, which form a `RolloutGroup`; groups become `TrainingBatch`es (micro-batches of one
optimizer step); a step ends in a version of the weights. Axes: B rows, T token positions, L tokens of one sequence, G rollouts
of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem, tokenized once.

    Example:
        Prompt(id="arithmetic/17", token_ids=(49, 43, 50, 61), task="math", reference={"answer": "3"})
    """

    id: str
    """Unique within its source; the same problem keeps its id in every epoch."""
    token_ids: tuple[int, ...]
    """[L] tokens given to the policy."""
    task: str
    """Which verifier judges the rollouts: a key of `reward`."""
    reference: Mapping[str, Any]
    """What the verifier needs. The policy never sees it."""
    problem: str | None = None
    """Digest of what is asked and of its reference, whatever the tokenizer; None for pairs, which nobody judges."""
    demonstration_ids: tuple[int, ...] | None = None
    """[L] tokens of a response to imitate, end token included, where the source has one (supervised stages train on it)."""
    rejected_ids: tuple[int, ...] | None = None
    """[L] tokens of a worse response than the demonstration, end token included, where the source has pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Response tokens [start, end) were decoded under weights `version`.

    Example:
        VersionSpan(version=7, start=0, end=49) followed by VersionSpan(version=8, start=49, end=200): the weights were
        swapped after the 49th token, in flight.
    """

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion, exactly as the engine produced it.

    Example:
        prompt of 3 tokens, response of 2: token_ids [5], loss_mask [F, F, F, T, T], sampler_logprobs [0, 0, 0, -0.1, -2.3].
    """

    token_ids: Tensor
    """[L] int64: prompt, then response. Never decoded and encoded again."""
    loss_mask: Tensor
    """[L] bool: True on the tokens the policy sampled, from the engine's own count."""
    sampler_logprobs: Tensor
    """[L] float32: log-prob of each response token under the distribution it was drawn from (temperature included)."""
    temperature: float
    """What divides the logits of that distribution; 1 for a demonstration."""
    spans: tuple[VersionSpan, ...]
    """Cover the response from 0 without gaps, versions ascending. Empty for a demonstration: no policy sampled it."""
    finish_reason: str
    """"stop" (the policy ended it) or "length" (cut at the token limit)."""
    text: str
    """The decoded response, for the verifier and for people."""

    @property
    def num_response_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def oldest_version(self) -> int | None:
        return min((span.version for span in self.spans), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The G rollouts of one prompt: the unit of admission, of credit and of dropping."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    def only(self, kept: Sequence[int]) -> RolloutGroup:
        return replace(self, rollouts=tuple(self.rollouts[index] for index in kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """A micro-batch: rows padded on the right to one length.

    Example:
        two rollouts of 5 and 3 tokens: every tensor is [2, 5] and the last two positions of row 1 are off the mask.
    """

    token_ids_BT: Tensor
    """int64; padding is any valid id, always off the mask and never attended to by a real token."""
    lengths_B: Tensor
    """int64: real tokens per row."""
    loss_mask_BT: Tensor
    """bool: sampled tokens, minus those older than the staleness bound allows."""
    sampler_logprobs_BT: Tensor
    """float32, 0 off the mask."""
    temperatures_B: Tensor
    """float32: what divides the logits of each row. Rows of one step may differ, as groups of several do."""
    advantages_B: Tensor
    """float32, one per rollout: verifiable rewards judge the whole response. With a critic, its reward instead: the
    advantage of each token is estimated where the values are (`core.critic`)."""
    truncated_B: Tensor
    """bool: cut at the token limit."""
    weights_B: Tensor
    """float32: the rollout's weight in the step's loss (see `core.losses.rollout_weight`)."""
    ages_BT: Tensor
    """int64: version being updated minus version of the token, 0 off the mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightImage:
    """One policy version, whole.

    Example:
        WeightImage(version=8, tensors={"model.norm.weight": ...})
    """

    version: int
    tensors: Mapping[str, Tensor]
    """Checkpoint name to tensor, in the dtype the samplers serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """What the control plane knows of a group: everything but its tokens.

    Example:
        GroupSummary(prompt_id="arithmetic/17", num_tokens_G=(9, 12), num_prompt_tokens=4, finish_reasons_G=("stop",
        "length"), temperature=1.0, surprisals_G=(2.1, 3.5), oldest_version=7, newest_version=8)
    """

    prompt_id: str
    num_tokens_G: tuple[int, ...]
    """Response tokens of each rollout."""
    num_prompt_tokens: int
    finish_reasons_G: tuple[str, ...]
    temperature: float
    surprisals_G: tuple[float, ...]
    """Minus the log-prob of each response, in nats, as it was drawn."""
    oldest_version: int | None
    """Version of the oldest token of the group; None for demonstrations."""
    newest_version: int | None

    def only(self, kept: Sequence[int]) -> GroupSummary:
        """That of the kept rollouts; the versions stay those of the whole group, which held its place for all."""
        return replace(
            self,
            num_tokens_G=tuple(self.num_tokens_G[index] for index in kept),
            finish_reasons_G=tuple(self.finish_reasons_G[index] for index in kept),
            surprisals_G=tuple(self.surprisals_G[index] for index in kept),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verifier's verdict on one rollout, as the pipeline needs it."""

    reward: float
    outcome: str
    """correct, wrong, no_answer, timeout or verifier_error (`reward.Outcome`)."""
    parts: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    flags: tuple[str, ...] = ()
    """Suspicious patterns in the response; for people."""
    seconds: float = 0.0
    """Wall time of judging."""
    queued_s: float = 0.0
    """Wall time of waiting to be judged."""
    tier: str | None = None
    """Isolation of the run; None where nothing ran."""
    second_opinion: bool | None = None
    """Whether a second, independent path agreed; None where none was asked."""


def summarize(group: RolloutGroup) -> GroupSummary:
    """The control-plane view of `group`."""
    spans = [span for rollout in group.rollouts for span in rollout.spans]
    return GroupSummary(
        prompt_id=group.prompt.id,
        num_tokens_G=tuple(rollout.num_response_tokens for rollout in group.rollouts),
        num_prompt_tokens=len(group.prompt.token_ids),
        finish_reasons_G=tuple(rollout.finish_reason for rollout in group.rollouts),
        temperature=group.rollouts[0].temperature,
        surprisals_G=tuple(-float(rollout.sampler_logprobs.sum(dtype=float64)) for rollout in group.rollouts),
        oldest_version=min((span.version for span in spans), default=None),
        newest_version=max((span.version for span in spans), default=None),
    )
