"""What crosses a process border arrives bit for bit."""

from __future__ import annotations

import pickle
import warnings

import torch

from rlpost.core.patch import diff, patched, to_bytes
from rlpost.core.weights import bits
from rlpost.types import Prompt, Rollout, RolloutGroup, VersionSpan, WeightImage
from rlpost.workers.wire import pack_group, pack_patch, unpack_group, unpack_patch


def rollout(num_prompt: int, num_response: int, version: int) -> Rollout:
    return Rollout(
        token_ids=torch.arange(num_prompt + num_response) + version,
        loss_mask=torch.arange(num_prompt + num_response) >= num_prompt,
        sampler_logprobs=torch.rand(num_prompt + num_response),
        temperature=version / 10,
        spans=(VersionSpan(version=version, start=0, end=num_response),),
        finish_reason="stop",
        text=f"text {version}",
    )


def test_a_group_of_ragged_rollouts_survives_packing_and_pickling() -> None:
    group = RolloutGroup(
        prompt=Prompt(id="p", token_ids=(1, 2), task="math", reference={"answer": "3"}),
        rollouts=(rollout(2, 3, 7), rollout(2, 1, 8), rollout(2, 5, 9)),
    )
    back = unpack_group(pickle.loads(pickle.dumps(pack_group(group))))
    assert back.prompt == group.prompt
    for before, after in zip(group.rollouts, back.rollouts, strict=True):
        assert torch.equal(before.token_ids, after.token_ids) and torch.equal(before.loss_mask, after.loss_mask)
        assert torch.equal(before.sampler_logprobs, after.sampler_logprobs)
        assert all(getattr(before, n) == getattr(after, n) for n in ("temperature", "spans", "finish_reason", "text"))


def test_a_patch_keeps_every_bit_and_read_only_memory_is_no_nuisance() -> None:
    """Its payloads cross as arrays beside the pickle, as Ray's object store takes and gives them."""
    before = {
        "bf16": torch.tensor([1.5, -0.0, float("inf"), float("nan")], dtype=torch.bfloat16).reshape(2, 2),
        "fp32": torch.randn(3, 5).t(),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
    }
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["bf16"][1, 0] = -1.0
    after["scalar"] += 1
    for base in (None, WeightImage(version=2, tensors=before)):
        patch = diff(base, WeightImage(version=3, tensors=after))
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(pack_patch(patch), protocol=5, buffer_callback=buffers.append)
        assert len(buffers) == sum(len(tensor.pieces) for tensor in patch.tensors.values())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            back = unpack_patch(pickle.loads(data, buffers=[buffer.raw().toreadonly() for buffer in buffers]))
            assert to_bytes(back) == to_bytes(patch)
            received = patched(base, back)
        assert all(torch.equal(bits(received.tensors[name]), bits(tensor)) for name, tensor in after.items())
