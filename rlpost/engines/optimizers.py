"""Optimizers over master weights: torch's where it has them, Lion, and the decay that all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlpost.core.optimizers import SGD, AdamW, Lion, OptimizerSpec

SHARED = {"weight_decay", "max_grad_norm"}
"""Settings that `Decay` and the learner see to."""


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


class Decay:
    """Decoupled weight decay, w <- w (1 - lr x weight_decay), right before the update: what AdamW does itself, here for
    every optimizer, and only for the weights a mask allows."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.weight_decay = 0.0
        self.masks: Mapping[Tensor, Tensor] = {}
        """Master weight to a bool mask of its shape; a weight without one decays whole."""
        optimizer.register_step_pre_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self.weight_decay:
            return
        for group in optimizer.param_groups:
            kept = 1 - group["lr"] * self.weight_decay
            for master in group["params"]:
                mask = self.masks.get(master)
                master.mul_(kept if mask is None else torch.where(mask, kept, 1.0))


def make_optimizer(parameters: Iterable[Tensor], kind: type[OptimizerSpec]) -> tuple[torch.optim.Optimizer, Decay]:
    """An optimizer of this kind and the decay that goes before its every step; `apply_settings` says how much of each."""
    optimizer = CLASSES[kind](parameters, lr=0.0)
    return optimizer, Decay(optimizer)


def apply_settings(spec: OptimizerSpec, optimizer: Any, decay: Decay) -> None:
    """From the next step on; `optimizer` is one of `make_optimizer`, or DeepSpeed's wrapper around one."""
    settings = {key: value for key, value in dataclasses.asdict(spec).items() if key not in SHARED}
    for group in optimizer.param_groups:
        group.update(settings)
    decay.weight_decay = spec.weight_decay
