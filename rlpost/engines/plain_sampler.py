"""The executable specification of `SamplerEngine`: plain PyTorch, one sequence at a time, no cache of any kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoTokenizer

from rlpost.core.delta import apply_pieces, check_result
from rlpost.core.patch import WeightPatch, naming
from rlpost.engines.base import RolloutRequest
from rlpost.engines.forward import load_policy
from rlpost.engines.lora_layers import LoraSpec, serve_beside
from rlpost.engines.sampling import Holding, check_fits, check_request, end_token_ids, make_rollout
from rlpost.types import Rollout, VersionSpan


@dataclass(slots=True)
class _Running:
    request: RolloutRequest
    generator: torch.Generator
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class PlainSampler:
    """Every token is a full forward pass over its own prefix at batch size 1.

    Slow, and right by construction: nothing is remembered between tokens, so nothing can be stale after `update`, and
    no request can touch another's numbers.
    """

    def __init__(self, model_path: str | Path, *, dtype: str = "float32", lora: LoraSpec | None = None) -> None:
        """
        Args:
            lora: the adapter that versions have beside the weights; None: versions are plain weights.
        """
        path = Path(model_path)
        self._model = load_policy(path, getattr(torch, dtype))
        if lora is not None:
            serve_beside(self._model, lora)
        self._model.eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._end_ids = end_token_ids(path)
        self._max_model_len = int(self._model.config.max_position_embeddings)
        self._running: dict[str, _Running] = {}
        self._holding = Holding()

    @property
    def version(self) -> int:
        return self._holding.version

    @property
    def held(self) -> int | None:
        return self._holding.held

    def add(self, request: RolloutRequest) -> None:
        check_request(request, max_model_len=self._max_model_len, running=self._running)
        self._running[request.id] = _Running(request, torch.Generator().manual_seed(request.seed))

    def has_work(self) -> bool:
        return bool(self._running)

    def stats(self) -> dict[str, int]:
        return {"running": len(self._running), "waiting": 0}

    def step(self) -> list[tuple[str, Rollout]]:
        """One token for every running request, in order of arrival."""
        self._holding.check()
        finished = []
        for running in list(self._running.values()):
            if finish_reason := self._decode(running):
                del self._running[running.request.id]
                finished.append((running.request.id, self._rollout(running, finish_reason)))
        return finished

    def update(self, patch: WeightPatch) -> None:
        parameters = dict(self._model.named_parameters())
        with self._holding.updating(patch):
            check_fits(patch, parameters)
            for name, tensor in patch.tensors.items():
                with naming(name):
                    apply_pieces(tensor.pieces, parameters[name].view(-1))
            for name, tensor in patch.tensors.items():
                with naming(name):
                    check_result(tensor, parameters[name].view(-1))

    @torch.inference_mode()
    def _decode(self, running: _Running) -> str | None:
        """Append one token; the reason to end, if this token is one."""
        request = running.request
        token_ids = torch.tensor([[*request.prompt_ids, *running.response_ids]])
        logits_1V = self._model(input_ids=token_ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        if request.temperature:
            probs_1V = torch.softmax(logits_1V / request.temperature, dim=-1)
            token_1 = torch.multinomial(probs_1V, 1, generator=running.generator)[:, 0]
        else:
            token_1 = logits_1V.argmax(-1)
        # Greedy has no distribution of its own: its log-probs are those at temperature 1, as vLLM reports them.
        logprob_1 = torch.log_softmax(logits_1V / (request.temperature or 1.0), dim=-1)[0, token_1]
        running.response_ids.append(int(token_1))
        running.logprobs.append(float(logprob_1))
        running.versions.append(self.version)
        if running.response_ids[-1] in self._end_ids:
            return "stop"
        return "length" if len(running.response_ids) == request.max_tokens else None

    def _rollout(self, running: _Running, finish_reason: str) -> Rollout:
        return make_rollout(
            running.request,
            running.response_ids,
            running.logprobs,
            _spans(running.versions),
            finish_reason=finish_reason,
            tokenizer=self._tokenizer,
        )


def _spans(versions: list[int]) -> tuple[VersionSpan, ...]:
    """Runs of equal versions, one per token, as spans."""
    edges = [0, *(i for i in range(1, len(versions)) if versions[i] != versions[i - 1]), len(versions)]
    return tuple(VersionSpan(version=versions[start], start=start, end=end) for start, end in pairwise(edges))
