"""Optimizers over master weights: torch's where it has them, Lion, and over which entries they step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlpost.core.optimizers import SGD, AdamW, Lion, OptimizerSpec

SHARED = {"weight_decay", "max_grad_norm"}
"""Settings that `TrainedEntries` and the learner see to."""


class LionOptimizer(torch.optim.Optimizer):
    """u = sign(b1 m + (1 - b1) g); w <- w - lr u; m <- b2 m + (1 - b2) g. Chen et al., https://arxiv.org/abs/2302.06675,
    algorithm 2, without its decay. An entry whose gradient was always 0 does not move: sign(0) = 0."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.0, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - as DeepSpeed's
        assert closure is None, "a loss is not evaluated again within a step"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                update = state["exp_avg"].lerp(parameter.grad, 1 - beta1).sign_()
                parameter.add_(update, alpha=-group["lr"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta2)


CLASSES: Mapping[type[OptimizerSpec], Callable[..., torch.optim.Optimizer]] = {
    AdamW: partial(torch.optim.AdamW, weight_decay=0.0),
    Lion: LionOptimizer,
    SGD: torch.optim.SGD,
}


class TrainedEntries:
    """What every step of an optimizer is over: all of a master weight, or the K entries that its mask allows.

    They decay right before the update, w <- w (1 - lr x weight_decay): what AdamW does itself, here for every optimizer.
    For the update a master with a mask lends its place to a copy of its entries, [K], which is then written back: so
    state is of K as well, and no other entry is touched. Between steps state is filed under the master, as a checkpoint
    of the optimizer expects it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.weight_decay = 0.0
        self.masks: Mapping[Tensor, Tensor] = {}
        """Master weight to a bool mask of its shape. The optimizer's state is of the masks it began with."""
        self._masters: list[list[Tensor]] = []
        """Of each group, during a step."""
        optimizer.register_step_pre_hook(self._lend)
        optimizer.register_step_post_hook(self._write_back)

    @torch.no_grad()
    def _lend(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._masters = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [self._entries(master, optimizer.state) for master in group["params"]]
            if self.weight_decay:
                for entries in group["params"]:
                    entries.mul_(1 - group["lr"] * self.weight_decay)

    def _entries(self, master: Tensor, state: MutableMapping[Tensor, Any]) -> Tensor:
        mask = self.masks.get(master)
        if mask is None:
            return master
        assert master.grad is not None, "a step needs a gradient"
        entries_K = master[mask]
        entries_K.grad = master.grad[mask]
        state[entries_K] = state.pop(master, {})
        return entries_K

    @torch.no_grad()
    def _write_back(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, masters in zip(optimizer.param_groups, self._masters, strict=True):
            for master, entries in zip(masters, group["params"], strict=True):
                if entries is not master:
                    entries.grad = None
                    master[self.masks[master]] = entries
                    optimizer.state[master] = optimizer.state.pop(entries)
            group["params"] = masters


def make_optimizer(
    parameters: Iterable[Tensor], kind: type[OptimizerSpec]
) -> tuple[torch.optim.Optimizer, TrainedEntries]:
    """An optimizer of this kind and what its steps are over; `apply_settings` says how far they go."""
    optimizer = CLASSES[kind](parameters, lr=0.0)
    return optimizer, TrainedEntries(optimizer)


def apply_settings(spec: OptimizerSpec, optimizer: Any, entries: TrainedEntries) -> None:
    """From the next step on; `optimizer` is one of `make_optimizer`, or DeepSpeed's wrapper around one."""
    settings = {key: value for key, value in dataclasses.asdict(spec).items() if key not in SHARED}
    for group in optimizer.param_groups:
        group.update(settings)
    entries.weight_decay = spec.weight_decay
