"""A LoRA adapter, as peft stores one, as the version of a model that it makes of its base. Axes: M x N a weight, R rank."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlpost.core.sparsity import in_pieces
from rlpost.core.weights import merged_weight
from rlpost.engines.pretrained import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    StoredTensors,
    check_weights,
    peft_names,
    read_json,
)

if TYPE_CHECKING:
    from rlpost.analysis.stored import StoredVersion

_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_UNDERSTOOD = {"r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "fan_in_fan_out"}
_NO_MATTER = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
"""Which layers are adapted, and how training begins: the matrices in the file say all of it."""


class MergedAdapter:
    """W + s B A of the adapted matrices, anything else as in the base; one weight is in memory at a time."""

    def __init__(self, path: Path, base: StoredVersion, dtype: torch.dtype | None = None) -> None:
        """
        Args:
            path: a directory with adapter_config.json and adapter_model.safetensors.
            dtype: what a sum, taken in float32, is rounded to; None: the dtype that the base has the weight in.

        Raises:
            ValueError: naming the setting, when it is more than a LoRA; or the weight that is not in the base, or not of its
                shape there.
        """
        self._base, self._dtype = base, dtype
        self._config = _plain_lora(path / ADAPTER_CONFIG)
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise ValueError(f"{path} has no {ADAPTER_WEIGHTS}: save the adapter with safe_serialization=True")
        check_weights(path / ADAPTER_WEIGHTS)
        self._stored = StoredTensors(path / ADAPTER_WEIGHTS)
        self._modules = self._adapted(path)

    @property
    def names(self) -> list[str]:
        return self._base.names

    def shape(self, name: str) -> torch.Size:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def tensor(self, name: str) -> Tensor:
        base = self._base.tensor(name)
        if name not in self._modules:
            return base
        module = self._modules[name]
        A_RN, B_MR = map(self._stored.tensor, peft_names(name))
        turned = self._config.get("fan_in_fan_out", False)
        whole_MN = merged_weight(base.T if turned else base, A_RN, B_MR, self._scale(module, len(A_RN)))
        return (whole_MN.T if turned else whole_MN).to(self._dtype or base.dtype)

    def pieces(self, name: str, numel: int) -> Iterator[Tensor]:
        return (
            in_pieces(self.tensor(name).flatten()[:numel]) if name in self._modules else self._base.pieces(name, numel)
        )

    def _scale(self, module: str, rank: int) -> float:
        """Of an adapted module; a pattern is a regular expression for the end of its name, and the first that fits counts."""
        patterns: Mapping[str, float] = self._config.get("alpha_pattern") or {}
        fitting = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
        alpha = next(fitting, self._config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _adapted(self, path: Path) -> dict[str, str]:
        """The adapted weights' names to those of their modules, once all fit."""
        modules: dict[str, str] = {}
        stored, in_base = set(self._stored.names), set(self._base.names)
        for key in self._stored.names:
            found = _MATRIX.fullmatch(key)
            if found is None:
                raise ValueError(
                    f"{path}: {key} is no LoRA matrix of a linear layer, and cannot be merged here: merge the adapter with"
                    " peft (merge_and_unload) and give that model"
                )
            modules[f"{found[1]}.weight"] = found[1]
        for name in modules:
            missing = [key for key in peft_names(name) if key not in stored]
            if missing:
                raise ValueError(f"{path} lacks {missing[0]}: copy or download it again")
            if name not in in_base:
                raise ValueError(
                    f"{path} adapts {name}, which the model before it does not have: give the base it was trained on"
                )
            A_shape, B_shape = map(self._stored.shape, peft_names(name))
            delta = (*B_shape[:-1], *A_shape[1:])
            if self._config.get("fan_in_fan_out"):
                delta = delta[::-1]
            if delta != (*self._base.shape(name),) or A_shape[0] != B_shape[-1]:
                raise ValueError(
                    f"{path}: {name} is {(*self._base.shape(name),)} in the model before it, and B A of {(*B_shape,)} and"
                    f" {(*A_shape,)}: give the base it was trained on"
                )
        return modules


def _plain_lora(file: Path) -> Mapping[str, Any]:
    """The settings, none of which makes it more than W + s B A; those that are not known here are refused where set."""
    config = read_json(file)
    remedy = "merge it with peft (merge_and_unload) and give that model"
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type = {config.get('peft_type')!r} is no LoRA: {remedy}")
    if "lora_alpha" not in config:
        raise ValueError(f"{file} has no lora_alpha: save the adapter with save_pretrained")
    allowed = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
    for key, value in config.items():
        if value and key not in _UNDERSTOOD | _NO_MATTER and value not in allowed.get(key, ()):
            # PiSSA and its like train from a base they have changed: what they store is not the update.
            raise ValueError(f"{file}: an adapter with {key} = {value!r} is more than a LoRA on its base: {remedy}")
    return config
