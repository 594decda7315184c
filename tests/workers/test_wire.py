"""What crosses a process border arrives bit for bit."""

from __future__ import annotations

import pickle
import warnings

import torch

from rlpost.core.weights import bits, checksum
from rlpost.types import Prompt, Rollout, RolloutGroup, VersionSpan, WeightUpdate
from rlpost.workers.wire import pack_group, pack_update, unpack_group, unpack_update


def rollout(num_prompt: int, num_response: int, version: int) -> Rollout:
    return Rollout(
        token_ids=torch.arange(num_prompt + num_response) + version,
        loss_mask=torch.arange(num_prompt + num_response) >= num_prompt,
        sampler_logprobs=torch.rand(num_prompt + num_response),
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
        assert (before.spans, before.finish_reason, before.text) == (after.spans, after.finish_reason, after.text)


def test_weights_keep_every_bit_and_read_only_memory_is_no_nuisance() -> None:
    tensors = {
        "bf16": torch.tensor([1.5, -0.0, float("inf"), float("nan")], dtype=torch.bfloat16).reshape(2, 2),
        "fp32": torch.randn(3, 5).t(),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
    }
    update = WeightUpdate(version=3, tensors=tensors, checksums={n: checksum(t) for n, t in tensors.items()})
    packed = pack_update(update)
    for array in packed.arrays.values():
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = unpack_update(packed)
    assert back.version == 3
    for name, tensor in tensors.items():
        assert back.tensors[name].shape == tensor.shape and torch.equal(bits(back.tensors[name]), bits(tensor))
        assert checksum(back.tensors[name]) == update.checksums[name]
