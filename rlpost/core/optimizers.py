"""Optimizers by their settings; `engines.optimizers` makes them. Master weights and state are float32 in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    weight_decay: float = 0.0
    """Decoupled: w <- w (1 - lr x weight_decay), then the update of the gradient."""
    max_grad_norm: float = 1.0
    """The gradient of a step is scaled down to this norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(_Shared):
    """Loshchilov & Hutter, https://arxiv.org/abs/1711.05101, algorithm 2."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Lion(_Shared):
    """Chen et al., https://arxiv.org/abs/2302.06675, algorithm 2. Every weight with a gradient moves by lr, which
    is 3 to 10 times below AdamW's, and the decay as much above (section 5)."""

    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD(_Shared):
    """m <- momentum m + g, w <- w - lr m; with decay it is SGDW, algorithm 1 of https://arxiv.org/abs/1711.05101."""

    momentum: float = 0.9


OptimizerSpec = AdamW | Lion | SGD
OPTIMIZERS: Mapping[str, type[OptimizerSpec]] = {"adamw": AdamW, "lion": Lion, "sgd": SGD}
"""By their names in a recipe."""
