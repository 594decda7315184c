"""The numerical rank that `torch.linalg.matrix_rank` finds, without the singular values: they are counted, not computed.

Of A [L, R], L >= R, the singular values above t are as many as the eigenvalues of A'A above t^2. A matrix of low rank shows
them in its product with few random vectors (Halko, Martinsson and Tropp, arXiv 0909.4061); of any other they are as many as
the positive pivots of A'A - t^2 I (Sylvester's law of inertia; Parlett, "The Symmetric Eigenvalue Problem", section 3.3). All
in float64, whose square root is finer than float32. S vectors: random, or of Lanczos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps
SMALLEST = torch.finfo(torch.float32).tiny / EPSILON
"""Of a matrix's largest magnitude: below, float32 loses precision at the threshold."""
DIRECT = 128
"""Shorter sides up to this are left to `torch.linalg.matrix_rank`, which is as fast."""
ROUNDING = 1.0
"""A float32 singular value is off by less than this times sqrt(max(M, K)) eps sigma_1."""
NUM_RANDOM = 80
NUM_LANCZOS = 64
TOP_ERROR = 4e-3
"""More than those steps miss of the largest eigenvalue; a Cholesky factorisation confirms it."""
CHUNK = 1 << 24
"""Entries that are float64 at a time."""
BLOCK = 512
"""Columns of a product of which one triangle is needed."""


def numerical_rank(matrix_MK: Tensor) -> int:
    """Singular values above max(M, K) eps sigma_1, eps of float32: always the count of `torch.linalg.matrix_rank` in float32.

    It is asked itself where a singular value is so near the threshold that float32's rounding decides, and of small matrices.

    Raises:
        torch.linalg.LinAlgError: when an entry is not finite.
    """
    matrix_MK = matrix_MK.detach().float()
    found = _counted(matrix_MK) if min(matrix_MK.shape) > DIRECT else None
    return int(torch.linalg.matrix_rank(matrix_MK)) if found is None else found


def _counted(matrix_MK: Tensor) -> int | None:
    """None where the count is not certain."""
    largest = float(matrix_MK.abs().amax())
    if largest == 0.0:
        return 0
    if not SMALLEST < largest < torch.finfo(torch.float32).max / math.sqrt(matrix_MK.numel()):
        return None
    matrix_LR, longest = _nonzero(matrix_MK), max(matrix_MK.shape)
    found = _count_of_low_rank(matrix_LR, longest)
    return _count_by_inertia(matrix_LR, longest) if found is None else found


def _nonzero(matrix_MK: Tensor) -> Tensor:
    """Without its rows and columns of zeros, the longer side first; the singular values are the same, but for zeros."""
    nonzero_MK = matrix_MK != 0
    for dim in (0, 1):
        if not (kept := nonzero_MK.any(1 - dim)).all():
            matrix_MK = matrix_MK.index_select(dim, kept.nonzero()[:, 0])
    return matrix_MK if matrix_MK.shape[0] >= matrix_MK.shape[1] else matrix_MK.T


def _thresholds(longest: int, low: float, high: float, error: float) -> tuple[float, float]:
    """Two squares: eigenvalues above the second surely count, those below the first surely do not.

    Args:
        longest: max(M, K) of the whole matrix.
        low, high: bounds of the largest eigenvalue.
        error: of any computed eigenvalue.
    """
    slack = ROUNDING * math.sqrt(longest)
    below, above = (longest - slack) * EPSILON * math.sqrt(low), (longest + slack) * EPSILON * math.sqrt(high)
    return below**2 - error, above**2 + error


def _error(matrix_LR: Tensor, energy: float) -> float:
    """Of an eigenvalue: sums of L terms round by L eps |A|_F^2 at most, and as much again for what is made of them."""
    return 2 * len(matrix_LR) * torch.finfo(torch.float64).eps * energy


def _count_of_low_rank(matrix_LR: Tensor, longest: int) -> int | None:
    """With Q the range of A' times random vectors, the eigenvalues of A'A are those of Q'A'AQ or more, by no more than
    |A - AQQ'|_F^2."""
    generator = torch.Generator().manual_seed(0)
    sketch_RS = torch.zeros(matrix_LR.shape[1], NUM_RANDOM, dtype=torch.float64)
    for rows in _chunks(matrix_LR):
        sketch_RS += rows.T @ torch.randn(len(rows), NUM_RANDOM, dtype=torch.float64, generator=generator)
    range_RS = torch.linalg.qr(sketch_RS).Q
    gram_SS = torch.zeros(range_RS.shape[1], range_RS.shape[1], dtype=torch.float64)
    energy = 0.0
    for rows in _chunks(matrix_LR):
        inside = rows @ range_RS
        gram_SS += inside.T @ inside
        energy += float(rows.square().sum())
    eigenvalues_S, error = torch.linalg.eigvalsh(gram_SS), _error(matrix_LR, energy)
    outside = max(0.0, energy - float(gram_SS.trace())) + error
    top = float(eigenvalues_S[-1])
    below, above = _thresholds(longest, top, top + outside, error)
    surely, perhaps = int((eigenvalues_S > above).sum()), int((eigenvalues_S + outside > below).sum())
    return surely if surely == perhaps and outside < below else None


def _count_by_inertia(matrix_LR: Tensor, longest: int) -> int | None:
    gram_RR = _gram(matrix_LR)
    top, error = _top_eigenvalue(gram_RR), _error(matrix_LR, float(gram_RR.trace()))
    ceiling = (1 + TOP_ERROR) * top
    if int(torch.linalg.cholesky_ex(_plus_diagonal(-gram_RR, ceiling)).info):
        return None
    below, above = _thresholds(longest, top, ceiling, error)
    surely = _num_above(gram_RR, above)
    return surely if surely == len(gram_RR) or surely == _num_above(gram_RR, below) else None


def _chunks(matrix_LR: Tensor) -> Iterator[Tensor]:
    return (rows.double() for rows in matrix_LR.split(max(1, CHUNK // matrix_LR.shape[1])))


def _gram(matrix_LR: Tensor) -> Tensor:
    """A'A; the upper triangle is the mirror of the lower, the only one multiplied."""
    size = matrix_LR.shape[1]
    gram_RR = torch.zeros(size, size, dtype=torch.float64)
    for rows in _chunks(matrix_LR):
        for low in range(0, size, BLOCK):
            gram_RR[low : low + BLOCK, : low + BLOCK] += rows[:, low : low + BLOCK].T @ rows[:, : low + BLOCK]
    return gram_RR.tril_() + gram_RR.tril(-1).T


def _top_eigenvalue(gram_RR: Tensor) -> float:
    """From below: Lanczos's of a random start."""
    generator = torch.Generator().manual_seed(0)
    basis_SR = torch.zeros(min(NUM_LANCZOS, len(gram_RR)), len(gram_RR), dtype=torch.float64)
    vector_R, num_steps = torch.randn(len(gram_RR), dtype=torch.float64, generator=generator), 0
    scale = float(gram_RR.trace()) * torch.finfo(torch.float64).eps
    for step in range(len(basis_SR)):
        basis_SR[step] = vector_R / vector_R.norm()
        num_steps = step + 1
        vector_R = gram_RR @ basis_SR[step]
        for _ in range(2):  # once is not orthogonal where cancellation was large
            vector_R -= basis_SR[:num_steps].T @ (basis_SR[:num_steps] @ vector_R)
        if vector_R.norm() <= scale:  # the space is invariant, and has the top direction
            break
    found_SR = basis_SR[:num_steps]
    return float(torch.linalg.eigvalsh(found_SR @ gram_RR @ found_SR.T)[-1])


def _num_above(gram_RR: Tensor, shift: float) -> int:
    """Eigenvalues above `shift`, by the signs of the pivots; a pivot of two rows has one of each sign (Bunch and Kaufman)."""
    factor = torch.linalg.ldl_factor(_plus_diagonal(gram_RR.clone(), -shift))
    single_R = factor.pivots > 0
    return int((single_R & (factor.LD.diagonal() > 0)).sum()) + int((~single_R).sum()) // 2


def _plus_diagonal(matrix_RR: Tensor, value: float) -> Tensor:
    matrix_RR.diagonal().add_(value)
    return matrix_RR
