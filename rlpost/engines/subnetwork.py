"""A stage's subnetwork in an engine: its masks, from weights, model directories or a file, and gradients held to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from rlpost.core.subnetwork import (
    FileEntries,
    RandomEntries,
    Subnetwork,
    UpdatedEntries,
    principal_mask,
    random_mask,
    updated_mask,
    with_control,
)
from rlpost.engines.forward import linear_layers
from rlpost.engines.mask_file import MaskFile
from rlpost.engines.pretrained import StoredTensors


class Masks:
    """mask_of(name, weight) for each weight of a policy, one weight at a time.

    Raises:
        ValueError: when what the subnetwork is read from does not hold the policy's weights.
    """

    def __init__(self, subnetwork: Subnetwork, policy: PreTrainedModel, *, serve_dtype: torch.dtype) -> None:
        self._subnetwork, self._serve_dtype = subnetwork, serve_dtype
        self._linear = {f"{name}.weight" for name in linear_layers(policy)}
        if isinstance(subnetwork, UpdatedEntries):
            self._stored = [StoredTensors(Path(path)) for path in (subnetwork.before, subnetwork.after)]
        if isinstance(subnetwork, FileEntries):
            self._file = MaskFile(Path(subnetwork.path))

    def mask_of(self, name: str, weight: Tensor) -> Tensor:
        """bool, of the weight's shape and on its device; True where the stage may change it."""
        choice = self._subnetwork
        if isinstance(choice, RandomEntries):
            count = round(choice.density * weight.numel())
            return random_mask(weight.shape, count=count, seed=choice.seed, name=name).to(weight.device)
        if isinstance(choice, UpdatedEntries):
            before, after = (stored.read(name, weight.shape).to(weight.device) for stored in self._stored)
            dtype = self._serve_dtype if choice.dtype is None else getattr(torch, choice.dtype)
            mask = updated_mask(before, after, dtype=dtype)
        elif isinstance(choice, FileEntries):
            mask = self._file.read(name, weight.shape)
        elif name in self._linear:
            mask = principal_mask(weight, rank=choice.rank, density=choice.density)
        else:
            mask = torch.zeros_like(weight, dtype=torch.bool)
        return with_control(mask, choice.control, seed=choice.seed, name=name).to(weight.device)


def hold_gradients(named: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> Sequence[RemovableHandle]:
    """From now on the gradient of each weight is 0 off its mask, until the handles are removed.

    On the gradient of the whole weight as autograd has it, before any reduction, accumulation, norm or clip: so it is the
    same under every sharding, and a gradient that moves nothing does not decide how far the rest moves.
    """
    return [named[name].register_hook(partial(_held, mask)) for name, mask in masks.items()]


def _held(mask: Tensor, gradient: Tensor) -> Any:
    return torch.where(mask, gradient, 0.0)


def check_trains_something(masks: Mapping[str, Tensor], subnetwork: Subnetwork) -> None:
    """Raises ValueError for a subnetwork without entries."""
    if not any(mask.any() for mask in masks.values()):
        raise ValueError(
            f"{subnetwork} selects no entry: no weight would be trained. Choose a larger density, or others"
        )
