"""Which layers LoRA adapts, and an adapter as samplers have it: A and s B beside the plain weights. Needs no peft.

Axes: M x N a weight matrix, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlpost.engines.forward import linear_layers
from rlpost.engines.pretrained import PeftAdapter, peft_names


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Which layers are adapted, and how.

    Example:
        LoraSpec(rank=16, alpha=32.0, targets=("q_proj", "v_proj"))
    """

    rank: int
    alpha: float
    targets: str | tuple[str, ...] = "all-linear"
    """Last parts of layer names, or whole names; "all-linear": every linear layer but the output layer."""
    rslora: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}, targets {self.targets}, rslora {self.rslora}"


def select_targets(policy: PreTrainedModel, spec: LoraSpec) -> dict[str, nn.Linear]:
    """The layers `spec` adapts, by their names in the model.

    Raises:
        ValueError: when a target is none of them.
    """
    linear = linear_layers(policy)
    if spec.targets == "all-linear":
        return linear
    for target in spec.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(
                f"learner.lora.targets: {target!r} is no layer of {type(policy).__name__} that can be adapted. Those are"
                f' its linear layers, {sorted({name.rpartition(".")[2] for name in linear})}, or "all-linear" for all;'
                " embedding and output layer may share one weight, and have no adapter"
            )
    return {n: m for n, m in linear.items() if any(f".{n}".endswith(f".{target}") for target in spec.targets)}


def target_shapes(config: PretrainedConfig, spec: LoraSpec) -> dict[str, tuple[int, int]]:
    """(M, N) of every target, by its name. The model is laid out without memory for it.

    Raises:
        ValueError: when a target is no linear layer of the model.
    """
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
    return {name: (m.out_features, m.in_features) for name, m in select_targets(policy, spec).items()}


def num_adapter_parameters(config: PretrainedConfig, spec: LoraSpec) -> int:
    """How many are trained: rank x (M + N) per target; raises ValueError as `target_shapes`."""
    return sum(spec.rank * (rows + columns) for rows, columns in target_shapes(config, spec).values())


def zero_adapter(layer: str, shape: tuple[int, int], rank: int) -> PeftAdapter:
    """One of zeros, on this layer of (M, N). Its scale is 1, so that it may hold s B."""
    a, b = peft_names(f"{layer}.weight")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [layer]}
    return PeftAdapter(config=config, tensors={a: torch.zeros(rank, shape[1]), b: torch.zeros(shape[0], rank)})


def serve_beside(policy: PreTrainedModel, spec: LoraSpec) -> None:
    """Let every target compute W x + s B (A x), with A and s B parameters of the policy under their published names, 0 at first.

    Raises:
        ValueError: when a target is no linear layer of the model.
    """
    for layer in select_targets(policy, spec).values():
        like = {"bias": False, "dtype": layer.weight.dtype}
        layer.lora_A = nn.Linear(layer.in_features, spec.rank, **like)
        layer.lora_B = nn.Linear(spec.rank, layer.out_features, **like)
        nn.init.zeros_(layer.lora_A.weight)
        nn.init.zeros_(layer.lora_B.weight)
        layer.register_forward_hook(_add_adapter)


def _add_adapter(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + layer.lora_B(layer.lora_A(inputs[0]))  # pyright: ignore[reportCallIssue]
