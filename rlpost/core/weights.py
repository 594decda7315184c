"""Weight images: the bytes a version is made of, their checksums, how many of them changed, and what their names say.

Axes: M x N a weight matrix, R the rank of an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
import xxhash
from torch import Tensor

KINDS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "gate": "router",
}
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""A [R, N] and s B [M, R] of an adapted layer of weight [M, N] follow the layer's name, where they are published beside it."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's values as integers of the same width, so that -0.0, NaN and infinities compare by their bytes."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def dtype_name(dtype: torch.dtype) -> str:
    """As files and recipes have it: bfloat16 of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def checksum(tensor: Tensor) -> str:
    """xxh3-128 of the tensor's bytes in row-major order, after dtype and shape, so that a reshape is not the same."""
    digest = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(bits(tensor.cpu()).numpy().data)
    return digest.hexdigest()


def unchanged_fraction(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Share of the entries whose bytes are the same in both images: 1.0 when nothing moved."""
    assert before.keys() == after.keys()
    unchanged = sum(int((bits(before[name]) == bits(after[name])).sum()) for name in after)
    return unchanged / sum(tensor.numel() for tensor in after.values())


def merged_weight(base_MN: Tensor, A_RN: Tensor, B_MR: Tensor, scale: float) -> Tensor:
    """W + s B A in float32: the weight that a LoRA adapter makes of W. https://arxiv.org/abs/2106.09685, section 4.1."""
    return base_MN.float() + scale * (B_MR.float() @ A_RN.float())


def adapter_names(weight: str) -> tuple[str, str]:
    """Names of A and s B beside a weight.

    Example: model.layers.0.mlp.up_proj.lora_A.weight, ...lora_B.weight, of model.layers.0.mlp.up_proj.weight
    """
    layer = weight.removesuffix(".weight")
    return layer + LORA_A, layer + LORA_B


def is_of_adapter(name: str) -> bool:
    """Whether a published tensor is the A or s B of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A version as plain weights: W + s B A in float32, rounded once to the dtype of W, where an adapter is beside it; all else
    is shared."""
    plain = {name: tensor for name, tensor in tensors.items() if not is_of_adapter(name)}
    for name, weight_MN in plain.items():
        a, b = adapter_names(name)
        if a in tensors:
            plain[name] = merged_weight(weight_MN, tensors[a], tensors[b], 1.0).to(weight_MN.dtype)
    return plain


def weight_kind(name: str) -> str:
    """q, k, v, o, gate, up, down, embedding, head, norm, bias, or the name of the module, of a checkpoint tensor."""
    *_, module, parameter = ["", *name.split(".")]
    if parameter == "bias":
        return "bias"
    return KINDS.get(module, "norm" if module.endswith("norm") else module)


def in_model_order(kinds: Iterable[str]) -> list[str]:
    """Kinds of weights as a model has them; those that `weight_kind` only takes from a module come last."""
    order = [*KINDS.values(), "norm", "bias"]
    return sorted(kinds, key=lambda kind: (order.index(kind) if kind in order else len(order), kind))


def weight_layer(name: str) -> int | None:
    """Number of the layer a checkpoint tensor belongs to; None for those of no layer."""
    found = re.search(r"\.(\d+)\.", name)
    return None if found is None else int(found[1])
