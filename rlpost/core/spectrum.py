"""The shape of an update: how many directions it has, and what it does to those of the weight it is added to.

Source: the rank rule of Mukherjee et al. (arXiv 2505.11711) is that of `torch.linalg.matrix_rank` on the float32 difference; the
entropy rank is Roy and Vetterli's (2007); principal angles and spectral shift are those of "The Path Not Taken" (arXiv
2511.08567); intruder dimensions those of Shuttleworth et al. (arXiv 2410.21228). Matrices [M, K], R = min(M, K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.core.rank import DIRECT, EPSILON, gram, rounding_error, thresholds


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
    """[R] descending, of the float32 difference D; `ranks` of them has the numerical rank of `torch.linalg.matrix_rank`.

    As roots of the eigenvalues of D'D in float64: below 1e-7 sigma_1 that is noise, as float32's own are, and more exact
    above. Small matrices, and those of which float32's rounding decides the rank, are decomposed in float32.
    """
    difference_MK = after_MK.detach().float() - before_MK.detach().float()
    longest, shortest = max(difference_MK.shape), min(difference_MK.shape)
    if shortest > DIRECT:
        matrix_LR = difference_MK if len(difference_MK) == longest else difference_MK.T
        energy_R = torch.linalg.eigvalsh(gram(matrix_LR)).flip(0).clamp(min=0.0)
        top = float(energy_R[0])
        below, above = thresholds(longest, top, top, rounding_error(matrix_LR, float(energy_R.sum())))
        if not ((energy_R > below) & (energy_R < above)).any():
            return energy_R.sqrt().float()
    return torch.linalg.svdvals(difference_MK)


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


def rounded_approximation(before_MK: Tensor, after_MK: Tensor, k: int) -> Tensor:
    """`after` if the update had been its best approximation of rank k, in float32, and then been rounded to the stored dtype.

    A null: what rank its difference from `before` has beyond k, the rounding alone gave it: an observed rank up to that is no
    evidence of more than k directions.
    """
    left_MR, sigma_R, right_RK = torch.linalg.svd(
        after_MK.detach().float() - before_MK.detach().float(), full_matrices=False
    )
    return (before_MK.detach().float() + (left_MR[:, :k] * sigma_R[:k]) @ right_RK[:k]).to(after_MK.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """Of one weight: left singular vectors [M, R] and singular values [R], descending, float32."""

    left_MR: Tensor
    sigma_R: Tensor


def decompose(weight_MK: Tensor) -> Decomposition:
    left_MR, sigma_R, _ = torch.linalg.svd(weight_MK.detach().float(), full_matrices=False)
    return Decomposition(left_MR=left_MR, sigma_R=sigma_R)


def principal_cosines(before: Decomposition, after: Decomposition, k: int) -> Tensor:
    """[k] cosines of the angles between the top-k left singular subspaces, descending: 1 where a direction was kept."""
    return torch.linalg.svdvals(before.left_MR[:, :k].T @ after.left_MR[:, :k]).clamp(max=1.0)


def spectral_shift(before: Decomposition, after: Decomposition) -> float | None:
    """|sigma(after) - sigma(before)|_2 / |sigma(before)|_2: 0 where the spectrum was kept; None where there was none."""
    return float((after.sigma_R - before.sigma_R).norm() / before.sigma_R.norm()) if before.sigma_R.any() else None


def intruder_dimensions(before: Decomposition, after: Decomposition, *, k: int = 10, epsilon: float = 0.5) -> int:
    """Of the top-k left singular vectors of the tuned weight, those that are `intruders`."""
    return int(intruders(before, after.left_MR[:, :k], epsilon).sum())


def intruders(before: Decomposition, left_Mk: Tensor, epsilon: float) -> Tensor:
    """[k] bool: left singular vectors whose cosine with every one of the base's is below `epsilon`, in magnitude."""
    return (before.left_MR.T @ left_Mk).abs().amax(0) < epsilon
