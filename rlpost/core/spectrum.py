"""The shape of an update: how many directions it has, and what it does to those of the weight it is added to.

Source: the rank rule of Mukherjee et al. (arXiv 2505.11711) is that of `torch.linalg.matrix_rank` on the float32 difference; the
entropy rank is Roy and Vetterli's (2007); principal angles and spectral shift are those of "The Path Not Taken" (arXiv
2511.08567); intruder dimensions those of Shuttleworth et al. (arXiv 2410.21228). Matrices [M, K], R = min(M, K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Of a spectrum; all 0 of an update that is zero.

    Example:
        Ranks(full=64, numerical=64, stable=3.2, entropy=21.7, energy_90=30, energy_99=52)
    """

    full: int
    """R: the most there could be."""
    numerical: int
    """Singular values above max(M, K) eps sigma_1, eps of float32."""
    stable: float
    """sum sigma^2 / sigma_1^2."""
    entropy: float
    """exp(-sum p log p), p = sigma / sum sigma."""
    energy_90: int
    """Fewest singular values with 90 % of sum sigma^2."""
    energy_99: int


def singular_values(before_MK: Tensor, after_MK: Tensor) -> Tensor:
    """[R] descending, of the float32 difference."""
    return torch.linalg.svdvals(after_MK.detach().float() - before_MK.detach().float())


def ranks(sigma_R: Tensor, shape: tuple[int, int]) -> Ranks:
    """Of a matrix of `shape` with these singular values, descending."""
    full = min(shape)
    if not full or not float(sigma_R[0]):
        return Ranks(full=full, numerical=0, stable=0.0, entropy=0.0, energy_90=0, energy_99=0)
    threshold = max(shape) * EPSILON * sigma_R[0]
    sigma_R = sigma_R.double()
    energy_R = sigma_R.square()
    share_R = energy_R.cumsum(0) / energy_R.sum()
    p = sigma_R / sigma_R.sum()
    return Ranks(
        full=full,
        numerical=int((sigma_R.float() > threshold).sum()),
        stable=float(energy_R.sum() / energy_R[0]),
        entropy=float(torch.exp(torch.special.entr(p).sum())),
        energy_90=int((share_R < 0.9).sum()) + 1,
        energy_99=int((share_R < 0.99).sum()) + 1,
    )


def principal_cosines(before_MK: Tensor, after_MK: Tensor, k: int) -> Tensor:
    """[k] cosines of the angles between the top-k left singular subspaces, descending: 1 where a direction was kept."""
    left = [torch.linalg.svd(w.detach().float(), full_matrices=False).U[:, :k] for w in (before_MK, after_MK)]
    return torch.linalg.svdvals(left[0].T @ left[1]).clamp(max=1.0)


def spectral_shift(before_MK: Tensor, after_MK: Tensor) -> float | None:
    """|sigma(after) - sigma(before)|_2 / |sigma(before)|_2: 0 where the spectrum was kept; None where there was none."""
    before_R, after_R = (torch.linalg.svdvals(w.detach().float()) for w in (before_MK, after_MK))
    return float((after_R - before_R).norm() / before_R.norm()) if before_R.any() else None


def intruder_dimensions(before_MK: Tensor, after_MK: Tensor, *, k: int = 10, epsilon: float = 0.5) -> int:
    """Of the top-k left singular vectors of the tuned weight, those whose cosine with every one of the base's is below
    `epsilon`, in magnitude."""
    before_MR, after_MR = (torch.linalg.svd(w.detach().float(), full_matrices=False).U for w in (before_MK, after_MK))
    nearest_k = (before_MR.T @ after_MR[:, :k]).abs().amax(0)
    return int((nearest_k < epsilon).sum())
