"""Intruder dimensions made smaller: what finetuning added to a weight's leading directions, and no pretrained one is like.

Source: Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228): scaling an intruder
down to lambda of its singular value cost next to no accuracy on the task and took back up to a third of what was forgotten.
Matrices [M, K], R = min(M, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.core.spectrum import decompose, intruders


def dampened(
    before_MK: Tensor, after_MK: Tensor, scale: float, *, k: int = 10, epsilon: float = 0.5
) -> tuple[Tensor, int]:
    """`after` + (scale - 1) sum sigma_i u_i v_i' over its intruders i, in its own dtype, and how many there are.

    The k leading directions are asked; see `spectrum.intruders`. Without one, `after` itself.
    """
    left_MR, sigma_R, right_RK = torch.linalg.svd(after_MK.detach().float(), full_matrices=False)
    found = torch.nonzero(intruders(decompose(before_MK), left_MR[:, :k], epsilon)).flatten()
    if not len(found):
        return after_MK, 0
    component_MK = (left_MR[:, found] * sigma_R[found]) @ right_RK[found]
    return (after_MK.float() + (scale - 1) * component_MK).to(after_MK.dtype), len(found)
