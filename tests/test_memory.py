"""The memory plan: by hand for small numbers, and against what autograd saves in a forward pass."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlpost import memory
from rlpost.core import logprobs
from rlpost.memory import (
    MAX_BUCKET_ELEMENTS,
    Architecture,
    LearnerShape,
    activation_bytes,
    layer_bytes_per_token,
    learner_memory,
    logits_workspace_bytes,
    observer_bytes,
    peak,
    states,
)

MODEL = Architecture(hidden=4, intermediate=8, layers=3, heads=2, kv_heads=1, head_size=2, vocabulary=16)


def shape(**changes: Any) -> LearnerShape:
    default = LearnerShape(
        parameters=1000,
        trained=1000,
        width=2,
        ranks=1,
        zero_stage=1,
        optimizer="adamw",
        micro_batch_tokens=8,
        gradient_checkpointing=False,
        architecture=MODEL,
        on_gpu=False,
    )
    return dataclasses.replace(default, **changes)


@pytest.mark.parametrize(
    ("changes", "weights", "gradients", "optimizer", "reduction", "step"),
    [
        ({}, 2000, 6000, 12_000, 0, 8000),
        ({"ranks": 4}, 2000, 6000, 3000, 0, 2000),
        ({"ranks": 4, "zero_stage": 2}, 2000, 1000, 3000, 8000, 2000),
        ({"ranks": 4, "zero_stage": 3}, 2500, 5000, 3000, 8000, 3000),
        ({"zero_stage": 3}, 2000, 8000, 12_000, 8000, 12_000),
        ({"zero_stage": 3, "on_gpu": True}, 2000, 8000, 12_000, 4000, 12_000),
        ({"width": 4}, 4000, 4000, 12_000, 0, 8000),
        ({"width": 4, "ranks": 4}, 4000, 4000, 3000, 0, 1000),
        ({"width": 4, "ranks": 4, "zero_stage": 2}, 4000, 1000, 3000, 5000, 2000),
        ({"width": 4, "zero_stage": 2, "optimizer": "sgd"}, 4000, 4000, 8000, 8000, 4000),
        ({"optimizer": "lion"}, 2000, 6000, 8000, 0, 4000),
    ],
)
def test_what_an_optimizer_holds_of_a_thousand_weights(
    changes: dict[str, Any], weights: int, gradients: int, optimizer: int, reduction: int, step: int
) -> None:
    found = states(shape(**changes), 1000)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    assert (found.reduction, found.step) == (reduction, step)


@pytest.mark.parametrize(
    ("changes", "optimizer", "step"),
    [
        ({}, 4000 + 2000 + 2000, 4000),
        ({"ranks": 4}, 1000 + 500 + 1250, 1000),
        ({"optimizer": "lion"}, 4000 + 1000 + 2000, 4000),
        ({"zero_stage": 3}, 4000 + 2000 + 2000, 4000 + 4000),
    ],
)
def test_of_a_quarter_of_the_weights_moments_are_a_quarter(changes: dict[str, Any], optimizer: int, step: int) -> None:
    """Masters and moments, and a byte for the mask of each weight and of each master; before and after the step, 16 bytes
    for each of the 250 entries. Working weights, gradients and a critic are as without."""
    found, whole = states(shape(**changes), 1000, subnetwork=0.25), states(shape(**changes), 1000)
    assert found == dataclasses.replace(whole, optimizer=optimizer, step=step)
    moments = learner_memory(shape(critic=True, subnetwork=0.25, **changes))
    assert moments["step"]["optimizer"] == optimizer
    assert moments["step"]["critic"] == learner_memory(shape(critic=True, **changes))["step"]["critic"]


def test_a_bucket_is_bounded_and_frozen_weights_have_nothing_else() -> None:
    found = states(shape(zero_stage=2), 10**9)
    assert found.reduction == 8 * 200_000_000 and found.bucket_share == 0.2
    assert states(shape(), 10, frozen=90) == dataclasses.replace(states(shape(), 10), weights=200)


def test_a_layer_by_hand() -> None:
    """bfloat16: two norms of (4 + 2 + 2) x 4, attention 4 x (4 + 4 + 2 + 2) + 4 x 2 + 2 x 4, feed-forward 4 x 2 x 8."""
    assert layer_bytes_per_token(MODEL, width=2, on_gpu=False, adapter=False) == 64 + 64 + 64
    assert layer_bytes_per_token(MODEL, width=2, on_gpu=True, adapter=False) == 64 + 40 + 64
    assert layer_bytes_per_token(MODEL, width=2, on_gpu=False, adapter=True) == 48 + 64 + 64
    assert layer_bytes_per_token(MODEL, width=4, on_gpu=False, adapter=False) == 96 + 72 + 128
    assert activation_bytes(shape()) == 8 * (3 * 192 + 8 * 4)
    assert activation_bytes(shape(gradient_checkpointing=True)) == 8 * (3 * 8 + 8 * 4)


def test_the_logits_by_hand() -> None:
    """8 tokens x 16: backward holds them at 4 + 2 bytes, the output layer's gradient (16 x 4) at 4 + 2, and 8 x 4 at 2."""
    assert logits_workspace_bytes(shape()) == 6 * 128 + 6 * 64 + 64
    assert logits_workspace_bytes(shape(width=4)) == 8 * 128
    assert logits_workspace_bytes(shape(adapter=True)) == 8 * 128
    wide = dataclasses.replace(MODEL, vocabulary=2**25)
    # Chunks of 2 tokens: forward at most at 4 + 4 + 2 + 4 bytes; backward 2 x (4 + 2), beside the sum at 4.
    assert logits_workspace_bytes(shape(architecture=wide, adapter=True)) == 14 * 2**26
    assert logits_workspace_bytes(shape(architecture=wide)) == 12 * 2**26 + 4 * 4 * 2**25 + 64


def test_moments_by_hand() -> None:
    moments = learner_memory(shape(reference=True, critic=True))
    critic = 20 * (1000 - 16 * 4)  # without the output layer
    held = {"weights": 2000, "gradients": 6000, "optimizer": 12_000, "reference": 2000, "critic": critic, "image": 2000}
    activations = 8 * (3 * 192 + 8 * 4)
    workspace = activations + 8 * 3 * 2 * 8  # the critic's, and gradients in one of its layers
    assert moments["backward"] == held | {"activations": activations, "workspace": workspace}
    assert moments["step"] == held | {"workspace": 8000}
    assert moments["export"] == held | {"image": 4000}
    assert activations + workspace > 8000 and peak(shape(reference=True, critic=True)) == (
        "backward",
        moments["backward"],
    )

    of_four = learner_memory(shape(ranks=4))
    assert (
        of_four["backward"]["image"] == 500 and of_four["export"]["image"] == 1000
    )  # each its part of what is published
    on_gpu = learner_memory(shape(on_gpu=True, reference=True, adapter=True, trained=10))
    assert on_gpu["export"]["image"] == on_gpu["export"]["reference"] == 0  # on the host; the adapter is switched off
    unknown = learner_memory(shape(architecture=None))
    assert unknown["backward"]["activations"] == unknown["backward"]["workspace"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_what_autograd_saves(tiny_model: Path, dtype: torch.dtype) -> None:
    """Distinct memory behind the tensors that a forward pass keeps, parameters excepted."""
    from rlpost.engines.forward import Scorer, load_policy

    scorer = Scorer(load_policy(tiny_model, dtype))
    parameters = {p.untyped_storage().data_ptr() for p in scorer.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    num_tokens = 4 * 64
    ids_BT = torch.randint(0, 250, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = scorer(ids_BT, torch.full((4,), 64), torch.arange(64).expand(4, 64) > 0, torch.ones(4))
    assert output[0].requires_grad
    width = dtype.itemsize
    model = Architecture.of_directory(tiny_model)
    planned = activation_bytes(shape(width=width, micro_batch_tokens=num_tokens, architecture=model))
    assert planned == pytest.approx(sum(t.untyped_storage().nbytes() for t in saved.values()), rel=0.05)


def test_sizes_of_a_directory(tiny_model: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    assert Architecture.of_directory(tiny_model) == Architecture(
        hidden=64, intermediate=192, layers=2, heads=2, kv_heads=2, head_size=32, vocabulary=vocabulary
    )
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    assert Architecture.of_directory(tmp_path) is None


@pytest.mark.parametrize(
    ("served", "compared", "adapter", "expected"),
    [
        (2, 2, 0, 3 * 2 + 1),  # two versions, the start of the stage, and a byte for what ever moved
        (4, 4, 0, 3 * 4 + 1),
        (4, 2, 0, 2 * 4 + 2 * 2 + 1),  # the last version and the start rounded
        (2, 2, 50, 2 + 3 * 2 + 1 + 2 * 0.1),  # the base once, two merged, the start; the adapter of both
        (4, 2, 50, 4 + 4 + 3 * 2 + 1 + 4 * 0.1),
    ],
)
def test_the_observer_holds_versions_and_the_start_of_the_stage(
    served: int, compared: int, adapter: int, expected: float
) -> None:
    assert observer_bytes(1000, served=served, compared=compared, adapter=adapter) == 1000 * expected


def test_constants_are_those_of_the_engine() -> None:
    from rlpost.engines import deepspeed_learner

    assert memory.WORKSPACE_ELEMENTS == logprobs.WORKSPACE_ELEMENTS
    assert MAX_BUCKET_ELEMENTS == deepspeed_learner.MAX_BUCKET_ELEMENTS
