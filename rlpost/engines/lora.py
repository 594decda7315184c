"""LoRA through peft, in place: W x + s B (A x) while training, W + s B A for exports. The one file that imports peft.

"LoRA: Low-Rank Adaptation of Large Language Models" (https://arxiv.org/abs/2106.09685), section 4.1; s = alpha / rank, or
alpha / sqrt(rank) (rsLoRA, https://arxiv.org/abs/2312.03732). W is never written to while a stage runs: what is merged is
computed from it each time, in float32. Axes: M x N a weight matrix, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlpost.core.weights import adapter_names, merged_weight
from rlpost.engines.lora_layers import LoraSpec, select_targets
from rlpost.engines.pretrained import PeftAdapter, peft_names, write_tensors

ADAPTER = "default"
"""peft's name for the one adapter of a policy."""
BASE = "base.safetensors"
"""Base weights of the adapted layers in a checkpoint, once an earlier stage was merged into them."""
Whole = Callable[[Sequence[nn.Parameter], bool], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One weight of the checkpoint, and the parameters it is computed from.

    Example:
        Weight(name="model.layers.0.mlp.up_proj.weight", base=W, adapter=(A, B), scale=2.0)
    """

    name: str
    base: nn.Parameter
    adapter: tuple[nn.Parameter, nn.Parameter] | None = None
    """A [R, N] and B [M, R], where the layer is adapted."""
    scale: float = 0.0

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.base, *(self.adapter or ()))

    @torch.no_grad()
    def value(self) -> Tensor:
        """The weight as the policy has it, to be cast to the dtype it is used in: float32 where it is adapted."""
        if self.adapter is None:
            return self.base.detach()
        return merged_weight(self.base, *self.adapter, self.scale)

    @torch.no_grad()
    def renew(self, generator: torch.Generator) -> bool:
        """Merge the adapter into the base, and begin a fresh one: A as peft draws it, B = 0. True if the base changed."""
        assert self.adapter is not None, self.name
        A_RN, B_MR = self.adapter
        moved = bool(B_MR.any())
        if moved:
            self.base.copy_(self.value())
        # Drawn on the host in float32, so that every rank, device and dtype begins with the same numbers.
        drawn_RN = nn.init.kaiming_uniform_(torch.empty(A_RN.shape), a=math.sqrt(5), generator=generator)
        A_RN.copy_(drawn_RN)
        B_MR.zero_()
        return moved


def checkpoint_weights(policy: nn.Module) -> Iterator[Weight]:
    """Every weight under its checkpoint name, tied ones once, in a fixed order; without an adapter, as they are."""
    layers = {f"{name}.base_layer.weight": m for name, m in policy.named_modules() if isinstance(m, LoraLayer)}
    # By name: asked of its module during a forward pass, a parameter is gathered by ZeRO-3, by this rank alone.
    parameters = dict(policy.named_parameters())
    for name, parameter in parameters.items():
        if name in layers:
            layer = name.removesuffix("base_layer.weight")
            adapter = (parameters[f"{layer}lora_A.{ADAPTER}.weight"], parameters[f"{layer}lora_B.{ADAPTER}.weight"])
            scale = layers[name].scaling[ADAPTER]
            yield Weight(name=name.replace(".base_layer.", "."), base=parameter, adapter=adapter, scale=scale)
        elif ".lora_" not in name:
            yield Weight(name=name.replace(".base_layer.", "."), base=parameter)


def unmerged(policy: nn.Module) -> Iterator[tuple[str, nn.Parameter, float]]:
    """(published name, parameter, factor) of everything the policy is made of, tied weights once, in a fixed order: its base, and
    A and s B of what is adapted."""
    for weight in checkpoint_weights(policy):
        yield weight.name, weight.base, 1.0
        if weight.adapter is not None:
            yield from zip(adapter_names(weight.name), weight.adapter, (1.0, weight.scale), strict=True)


class Adapter:
    """The adapter of one policy: attached when made, merged and renewed at every stage, switched off for the reference."""

    def __init__(self, policy: PreTrainedModel, spec: LoraSpec, whole: Whole = lambda *_: nullcontext()) -> None:
        """Put it on every target, in place; from now on nothing else of the policy has a gradient.

        Args:
            whole: where parameters are sharded, whole(parameters, written) has them whole on every rank while it holds,
                and what was written to them stays if `written`.

        Raises:
            ValueError: when a target is no linear layer of the model.
        """
        self.spec, self._policy, self._whole = spec, policy, whole
        self._base_changed = False
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType] - peft divides it, whatever it is
            target_modules=list(select_targets(policy, spec)),
            use_rslora=spec.rslora,
            task_type="CAUSAL_LM",
        )
        inject_adapter_in_model(config, policy, ADAPTER)
        self._config: Mapping[str, Any] = config.to_dict() | {"inference_mode": True}

    def renew(self, seed: int) -> None:
        """The base becomes the present policy, rounded to its own dtype, and a fresh adapter begins (collective)."""
        generator = torch.Generator().manual_seed(seed)
        for weight in self._adapted():
            with self._whole(weight.parameters, True):
                self._base_changed |= weight.renew(generator)

    @contextmanager
    def off(self) -> Iterator[None]:
        """While it holds, the policy is its base: the one the stage began with."""
        layers: list[Any] = [layer for layer in self._policy.modules() if isinstance(layer, LoraLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def export(self) -> PeftAdapter:
        """As `PeftModel.from_pretrained` takes it on the base of the stage (collective)."""
        tensors: dict[str, Tensor] = {}
        for weight in self._adapted():
            with self._whole(weight.parameters, False):
                copies = [p.detach().to("cpu", copy=True) for p in weight.parameters[1:]]
            tensors |= zip(peft_names(weight.name), copies, strict=True)
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in self._config.items()}
        return PeftAdapter(config=config, tensors=tensors)

    def save_base(self, directory: Path, *, write: bool) -> None:
        """The base of the stage, on the rank that writes, if it is no longer the model's own (collective)."""
        if not self._base_changed:
            return
        tensors = {}
        for weight in self._adapted():
            with self._whole((weight.base,), False):
                tensors[weight.name] = weight.base.detach().to("cpu", copy=True)
        if write:
            write_tensors(tensors, directory / BASE)

    def load_base(self, directory: Path) -> None:
        """Undoes `save_base`, in a learner that has merged nothing yet (collective)."""
        assert not self._base_changed, "a learner loads before it has merged an adapter"
        self._base_changed = (directory / BASE).exists()
        if not self._base_changed:
            return
        tensors = load_file(directory / BASE)
        for weight in self._adapted():
            with self._whole((weight.base,), True), torch.no_grad():
                weight.base.copy_(tensors[weight.name])

    def _adapted(self) -> Iterator[Weight]:
        return (weight for weight in checkpoint_weights(self._policy) if weight.adapter is not None)


def keep_trained(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """A hook for `register_state_dict_post_hook`: what is frozen stays out, under all of its names."""
    trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in state.keys() - trained:
        del state[name]
