"""What both samplers agree on: which requests are valid, what a rollout is made of, when an update may be trusted."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlpost.core.delta import check_sections
from rlpost.core.patch import UpdateRefused, WeightPatch, naming
from rlpost.engines.base import RolloutRequest
from rlpost.types import Rollout, VersionSpan

COLDEST, HOTTEST = 0.01, 2.0
"""vLLM silently raises a lower temperature and refuses a higher one; 0 is greedy."""


def end_token_ids(model_path: Path) -> frozenset[int]:
    """Tokens that end a response, from the model directory.

    generation_config.json wins over config.json (chat models list more ends there than the architecture has).

    Raises:
        ValueError: if neither file names one.
    """
    for name in ("generation_config.json", "config.json"):
        file = model_path / name
        ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    raise ValueError(
        f"{str(model_path)!r} names no end token: set eos_token_id in its generation_config.json, or every response"
        " would run to its token limit"
    )


def check_request(request: RolloutRequest, *, max_model_len: int, running: Container[str]) -> None:
    """Refuse what would be sampled differently from how it was asked for.

    Raises:
        ValueError: naming the request, the value and the limit.
    """
    num_prompt = len(request.prompt_ids)
    if request.id in running:
        raise ValueError(f"request {request.id!r} is already running; every request needs an id of its own")
    if not num_prompt or request.max_tokens < 1:
        raise ValueError(
            f"request {request.id!r} has {num_prompt} prompt tokens and max_tokens {request.max_tokens}; both must be"
            " at least 1"
        )
    if num_prompt + request.max_tokens > max_model_len:
        raise ValueError(
            f"request {request.id!r}: {num_prompt} prompt tokens + max_tokens {request.max_tokens} ="
            f" {num_prompt + request.max_tokens}, but the sampler holds sequences of {max_model_len}. Leave the prompt"
            " out, lower max_tokens or raise the sampler's max_model_len"
        )
    if request.temperature and not COLDEST <= request.temperature <= HOTTEST:
        raise ValueError(
            f"request {request.id!r}: temperature {request.temperature} is neither 0 (greedy) nor in"
            f" [{COLDEST}, {HOTTEST}]"
        )


class Holding:
    """Which version a sampler holds, and whether it may sample: the rules of `SamplerEngine.update`."""

    def __init__(self) -> None:
        self.version = 0
        """Stamped on tokens."""
        self.held: int | None = None
        self._fault: str | None = None

    def check(self) -> None:
        """Raises RuntimeError while what the sampler holds is not proved."""
        if self._fault:
            raise RuntimeError(f"this sampler may not sample until a weight update succeeds: {self._fault}")

    @contextmanager
    def updating(self, patch: WeightPatch) -> Iterator[None]:
        """Around whatever changes the weights and proves them; a ValueError or RuntimeError from it is a fault.

        Raises:
            UpdateRefused: for a patch of another version before anything changes, and for a fault.
        """
        if patch.base not in (None, self.held):
            holding = "nothing proved" if self.held is None else f"version {self.held}"
            raise UpdateRefused(f"weight update {patch.version} applies to version {patch.base}, and {holding} is held")
        self.held, self._fault = None, f"update {patch.version} was interrupted"
        try:
            yield
        except (ValueError, RuntimeError) as error:
            self._fault = f"weight update {patch.version}: {error}"
            raise UpdateRefused(self._fault) from error
        self.version = self.held = patch.version
        self._fault = None


def check_fits(patch: WeightPatch, model: Mapping[str, Tensor]) -> None:
    """Refuse what leads to no version of this model, whatever its pieces say.

    Raises:
        ValueError: naming the first tensor that is missing, unknown, of another shape or dtype, or not whole in a patch
            without a base.
    """
    if strangers := sorted(model.keys() ^ patch.tensors.keys()):
        raise ValueError(
            f"{strangers[0]} is only in the {'model' if strangers[0] in model else 'update'} ({len(strangers)} such names"
            " in all)"
        )
    for name, tensor in patch.tensors.items():
        held = model[name]
        if (tensor.shape, tensor.dtype) != (tuple(held.shape), held.dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, the model has {held.dtype} {list(held.shape)}"
            )
        with naming(name):
            check_sections(tensor)
            if patch.base is None and not tensor.is_complete:
                raise ValueError("the update applies to no version, and is not all of it")


def make_rollout(
    request: RolloutRequest,
    response_ids: Sequence[int],
    logprobs: Sequence[float],
    spans: Sequence[VersionSpan],
    *,
    finish_reason: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    """A finished request as the record that is trained on. The text is decoded once, for people and verifiers."""
    num_prompt, num_response = len(request.prompt_ids), len(response_ids)
    assert num_response == len(logprobs) > 0, (request.id, num_response, len(logprobs))
    assert finish_reason in ("stop", "length"), (request.id, finish_reason)
    edges = [0, *(span.end for span in spans)]
    assert edges == [*(span.start for span in spans), num_response], (request.id, spans, num_response)
    return Rollout(
        token_ids=torch.tensor([*request.prompt_ids, *response_ids], dtype=torch.int64),
        loss_mask=torch.arange(num_prompt + num_response) >= num_prompt,
        sampler_logprobs=torch.tensor([0.0] * num_prompt + list(logprobs), dtype=torch.float32),
        temperature=request.temperature or 1.0,  # greedy: as their log-probs are reported
        spans=tuple(spans),
        finish_reason=finish_reason,
        text=tokenizer.decode(list(response_ids), skip_special_tokens=True),  # pyright: ignore[reportArgumentType]
    )
