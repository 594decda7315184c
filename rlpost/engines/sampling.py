"""What both samplers agree on: which requests are valid, what a rollout is made of, which updates are intact."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlpost.core.weights import checksum
from rlpost.engines.base import RolloutRequest
from rlpost.types import Rollout, VersionSpan, WeightUpdate

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


def check_payload(update: WeightUpdate) -> None:
    """Compare the tensors of `update`, as they arrived, with the checksums they left with.

    Raises:
        RuntimeError: naming the first tensor that is missing, unannounced or different.
    """
    if strangers := sorted(update.tensors.keys() ^ update.checksums.keys()):
        raise RuntimeError(
            f"weight update {update.version}: {strangers[0]} is only among its"
            f" {'tensors' if strangers[0] in update.tensors else 'checksums'} ({len(strangers)} such names in all)"
        )
    for name, tensor in update.tensors.items():
        if (found := checksum(tensor)) != update.checksums[name]:
            raise RuntimeError(
                f"weight update {update.version}: {name} arrived with checksum {found}, published with"
                f" {update.checksums[name]}"
            )


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
        spans=tuple(spans),
        finish_reason=finish_reason,
        text=tokenizer.decode(list(response_ids), skip_special_tokens=True),  # pyright: ignore[reportArgumentType]
    )
