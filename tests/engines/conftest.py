"""Small models for engines, versions of their weights that differ a lot, and learners of every kind."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.core.delta import TensorPatch, encode_section
from rlpost.core.patch import WeightPatch, joined_patch
from rlpost.core.weights import is_of_adapter, merged
from rlpost.engines.lora_layers import LoraSpec, serve_beside
from rlpost.types import WeightImage
from tests.engines.learner_jobs import Job, Kind, close, free_port, make_learner

END_IDS = (1, *range(40, 50))
"""Eleven of about 300 tokens end a response, so that an untrained policy ends some of its own accord."""


@pytest.fixture(scope="session")
def served_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with a list of end tokens, as chat models have."""
    path = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(tiny_model, path)
    name = path / "generation_config.json"
    name.write_text(json.dumps(json.loads(name.read_text()) | {"eos_token_id": list(END_IDS)}))
    return path


@pytest.fixture(scope="session")
def tied_model(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output layer is its embedding: one tensor, two places."""
    path = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(served_model, path)
    config = AutoConfig.from_pretrained(path)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    shutil.copy(served_model / "generation_config.json", path)
    return path


@pytest.fixture(scope="session")
def process_group() -> None:
    """DeepSpeed's, of one rank: a process has one for good."""
    from rlpost.engines.deepspeed_learner import init_distributed

    if not torch.distributed.is_initialized():
        init_distributed(rank=0, world_size=1, master_port=free_port())
        gc.freeze()  # ZeRO-3 collects garbage when an engine is made, and what was imported until here is none


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    """The kind of learner a test is run for (`indirect`)."""
    if request.param.zero_stage is not None:
        request.getfixturevalue("process_group")
    return request.param


@pytest.fixture
def make(kind: Kind, tied_model: Path) -> Iterator[Callable[..., Any]]:
    """make(**changes) is a learner of this kind whose stage has begun."""
    made: list[Any] = []

    def make(**changes: Any) -> Any:
        job = replace(Job(kind, tied_model), **changes)
        learner = make_learner(job)
        made.append(learner)
        learner.begin_stage(job.spec)
        return learner

    yield make
    for learner in made:
        close(learner)


def random_weights(model_path: Path, seed: int, lora: LoraSpec | None = None) -> dict[str, Tensor]:
    """Weights of the model's own shapes that have nothing to do with those of another seed; beside them such an adapter."""
    config = AutoConfig.from_pretrained(model_path)
    torch.manual_seed(seed)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # all ones or zeros in a fresh model
                parameter.add_(torch.randn_like(parameter) / 4)
    if lora is not None:
        serve_beside(policy, lora)
        for name, parameter in policy.named_parameters():
            if is_of_adapter(name):
                nn.init.normal_(parameter, std=0.2)
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def make_update(
    version: int, tensors: Mapping[str, Tensor], *, base: WeightImage | None = None, num_ranks: int = 1
) -> WeightPatch:
    """What changed since `base`, or all of it, joined from what each of `num_ranks` ranks encodes of every tensor."""
    parts: list[dict[str, TensorPatch]] = [{} for _ in range(num_ranks)]
    for name, tensor in tensors.items():
        after_N = tensor.flatten()
        before_N = None if base is None else base.tensors[name].flatten()
        edges = [rank * len(after_N) // num_ranks for rank in range(num_ranks + 1)]
        for part, (start, stop) in zip(parts, pairwise(edges), strict=True):
            before = None if before_N is None else before_N[start:stop]
            part[name] = encode_section(before, after_N[start:stop], shape=tuple(tensor.shape), start=start)
    number = None if base is None else base.version
    return joined_patch([WeightPatch(version=version, base=number, tensors=part) for part in parts])


def stepped(tensors: Mapping[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    """A share of the entries of every matrix takes another value of its tensor; vectors stay."""
    generator = torch.Generator().manual_seed(seed)
    after = {}
    for name, tensor in tensors.items():
        changed = torch.rand(tensor.shape, generator=generator) < (share if tensor.ndim > 1 else 0.0)
        after[name] = torch.where(changed, tensor.flatten().flip(0).view(tensor.shape), tensor)
    return after


class Reference:
    """Log-probs recomputed from nothing: one full forward pass per sequence with the weights of one version, and an adapter in
    them."""

    def __init__(self, model_path: Path) -> None:
        self._policy = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprobs(self, weights: Mapping[str, Tensor], token_ids: Tensor, *, temperature: float) -> Tensor:
        """[L] log-prob of every token given those before it; 0 for the first."""
        plain = merged(weights)
        for name, parameter in self._policy.named_parameters():
            parameter.copy_(plain[name])
        logits = self._policy(input_ids=token_ids[None], use_cache=False).logits[0, :-1]
        table = torch.log_softmax(logits / temperature, dim=-1)
        return torch.cat([torch.zeros(1), table.gather(-1, token_ids[1:, None])[:, 0]])
