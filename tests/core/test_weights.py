"""Checksums and unchanged fractions look at bytes, not at values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlpost.core.weights import checksum, merged, unchanged_fraction

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_does_not_depend_on_how_memory_is_laid_out(dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    transposed = tensor.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert checksum(transposed) == checksum(tensor) == checksum(tensor.clone())
    # One entry is contiguous whatever its stride, also for torch, which then does not copy.
    assert checksum(tensor[:1, 0]) == checksum(tensor[:1, 0].clone())


def test_every_single_bit_and_the_shape_and_the_dtype_change_the_checksum() -> None:
    tensor = torch.ones(4, dtype=torch.bfloat16)
    seen = {checksum(tensor), checksum(tensor.view(2, 2)), checksum(tensor.view(torch.float16))}
    for bit in range(16):
        flipped = tensor.clone()
        flipped.view(torch.int16)[2] ^= 1 << bit if bit < 15 else -(1 << 15)
        seen.add(checksum(flipped))
    assert len(seen) == 3 + 16


def test_an_empty_tensor_and_a_scalar_have_checksums() -> None:
    assert checksum(torch.empty(0)) != checksum(torch.empty(0, 3)) != checksum(torch.tensor(0.0))


def test_unchanged_fraction_counts_entries_over_all_tensors() -> None:
    """3 of 4 and 6 of 6 entries are as they were: 9 of 10, whatever the mean of 0.75 and 1."""
    before: dict[str, Tensor] = {"a": torch.zeros(4), "b": torch.ones(2, 3)}
    after = {"a": torch.tensor([0.0, 1.0, 0.0, 0.0]), "b": torch.ones(2, 3)}
    assert unchanged_fraction(before, after) == 0.9


def test_equal_values_with_other_bytes_have_changed_and_equal_nans_have_not() -> None:
    assert unchanged_fraction({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}) == 0.0
    assert unchanged_fraction({"a": torch.tensor([float("nan")])}, {"a": torch.tensor([float("nan")])}) == 1.0


def test_an_adapter_is_merged_in_float32_and_rounded_once() -> None:
    """[1 2; 3 4] + [1; 0.5] [1 -2] = [2 0; 3.5 3]; in bfloat16, 256 + (1 + 0.75) is 258, where 256 + 1 would be 256."""
    tensors = {
        "up.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "up.lora_A.weight": torch.tensor([[1.0, -2.0]]),
        "up.lora_B.weight": torch.tensor([[1.0], [0.5]]),
        "down.weight": torch.tensor([[256.0]]).bfloat16(),
        "down.lora_A.weight": torch.tensor([[1.0], [0.75]]).bfloat16(),
        "down.lora_B.weight": torch.tensor([[1.0, 1.0]]).bfloat16(),
        "norm.weight": torch.ones(2),
    }
    found = merged(tensors)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "up.weight": [[2.0, 0.0], [3.5, 3.0]],
        "down.weight": [[258.0]],
        "norm.weight": [1.0, 1.0],
    }
    assert found["down.weight"].dtype == torch.bfloat16 and found["norm.weight"] is tensors["norm.weight"]
    assert tensors["up.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
