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
DIRECT = 256
"""Shorter sides up to this are left to `torch.linalg.matrix_rank`, which is as fast."""
ROUNDING = 0.5
"""A float32 singular value near the threshold is off by less than this times sqrt(max(M, K)) eps sigma_1; measured: 0.22."""
NUM_RANDOM = 80
NUM_LANCZOS = 40
EXCESSES = (1e-3, 1e-2, 1e-1)
"""Shares by which the largest eigenvalue is tried to be below, once Lanczos has bounded it from below."""
CHUNK = 1 << 24
"""Entries that are float64 at a time."""
BLOCK = 256
"""Columns that are multiplied or eliminated at a time."""


def numerical_rank(matrix_MK: Tensor) -> int:
    """Singular values above max(M, K) eps sigma_1, eps of float32: always the count of `torch.linalg.matrix_rank` in float32.

    It is asked itself where a singular value is so near the threshold that float32's rounding decides, and of small matrices.

    Raises:
        ValueError: when an entry is not finite.
    """
    matrix_MK = matrix_MK.detach().float()
    if not matrix_MK.isfinite().all():
        raise ValueError("a matrix with an entry that is not finite has no rank")
    found = _counted(matrix_MK) if min(matrix_MK.shape) > DIRECT else None
    return int(torch.linalg.matrix_rank(matrix_MK)) if found is None else found


def _counted(matrix_MK: Tensor) -> int | None:
    """None where the count is not certain."""
    magnitude_MK = matrix_MK.abs()
    largest_M, largest_K = magnitude_MK.amax(1), magnitude_MK.amax(0)
    largest = float(largest_M.amax())
    if largest == 0.0:
        return 0
    if not SMALLEST < largest < torch.finfo(torch.float32).max / math.sqrt(matrix_MK.numel()):
        return None
    # Rows and columns of zeros change no other singular value, and not the threshold, which is of the whole shape.
    for dim, largest_N in enumerate((largest_M, largest_K)):
        if not largest_N.all():
            matrix_MK = matrix_MK.index_select(dim, largest_N.nonzero()[:, 0])
    matrix_LR = matrix_MK if matrix_MK.shape[0] >= matrix_MK.shape[1] else matrix_MK.T
    longest = max(len(largest_M), len(largest_K))
    found = _count_of_low_rank(matrix_LR, longest)
    return _count_by_inertia(matrix_LR, longest) if found is None else found


def thresholds(longest: int, low: float, high: float, error: float) -> tuple[float, float]:
    """Two squares: eigenvalues above the second surely count, those below the first surely do not.

    Args:
        longest: max(M, K) of the whole matrix.
        low, high: bounds of the largest eigenvalue.
        error: of any computed eigenvalue.
    """
    slack = ROUNDING * math.sqrt(longest)
    below, above = (longest - slack) * EPSILON * math.sqrt(low), (longest + slack) * EPSILON * math.sqrt(high)
    return below**2 - error, above**2 + error


def rounding_error(matrix_LR: Tensor, energy: float) -> float:
    """Of an eigenvalue: sums of L terms round by L eps |A|_F^2 at most, and by so much less that a factorisation has room."""
    return len(matrix_LR) * torch.finfo(torch.float64).eps * energy


def _count_of_low_rank(matrix_LR: Tensor, longest: int) -> int | None:
    """With Q the range of A' times random vectors, the eigenvalues of A'A are those of Q'A'AQ or more, by no more than
    |A - AQQ'|_F^2."""
    random_LS = torch.randn(len(matrix_LR), NUM_RANDOM, generator=torch.Generator().manual_seed(0))
    range_RS, triangle_SS = torch.linalg.qr((matrix_LR.T @ random_LS).double())
    scale_S = triangle_SS.diagonal().abs()
    if len(scale_S) == NUM_RANDOM and float(scale_S[-1]) > longest * EPSILON * float(scale_S[0]):
        return None  # more directions than vectors
    gram_SS = torch.zeros_like(triangle_SS[:, : len(scale_S)])
    energy = 0.0
    for rows in _chunks(matrix_LR):
        inside = rows @ range_RS
        gram_SS += inside.T @ inside
        energy += float(rows.square().sum())
    eigenvalues_S, error = torch.linalg.eigvalsh(gram_SS), rounding_error(matrix_LR, energy)
    outside = max(0.0, energy - float(gram_SS.trace())) + error
    top = float(eigenvalues_S[-1])
    below, above = thresholds(longest, top, top + outside, error)
    surely, perhaps = int((eigenvalues_S > above).sum()), int((eigenvalues_S + outside > below).sum())
    return surely if surely == perhaps and outside < below else None


def _count_by_inertia(matrix_LR: Tensor, longest: int) -> int | None:
    """Of G - above, with a leading part H that is positive definite, the positive eigenvalues are as many as those of H and
    of its Schur complement C. Of G - below there are no fewer, and no more than with C's tangent in its place, as C is
    concave in the shift: C + (above - below) (I + WW'), W = BH^-1, B the rows under H.
    """
    gram_RR = gram(matrix_LR)
    energy = float(gram_RR.trace())
    low, high = _top_eigenvalue(gram_RR)
    if high == math.inf:
        return None
    below, above = thresholds(longest, low, high, rounding_error(matrix_LR, energy))
    gram_RR.diagonal().sub_(above)
    size = _eliminate(gram_RR)
    factor, under, schur = gram_RR[:size, :size], gram_RR[size:, :size], gram_RR[size:, size:]
    if float(under.square().sum()) > energy:
        return None  # pivots so small that rounding grew
    surely = _num_positive(schur)
    w = torch.linalg.solve_triangular(factor, under, upper=False, left=False)
    tangent = (above - below) * (torch.eye(len(schur), dtype=torch.float64) + w @ w.T)
    return size + surely if surely == _num_positive(schur + tangent) else None


def _chunks(matrix_LR: Tensor) -> Iterator[Tensor]:
    return (rows.double() for rows in matrix_LR.split(max(1, CHUNK // matrix_LR.shape[1])))


def gram(matrix_LR: Tensor) -> Tensor:
    """A'A; what is above its diagonal is not multiplied but mirrored."""
    size = matrix_LR.shape[1]
    gram_RR = torch.zeros(size, size, dtype=torch.float64)
    blocks = [slice(low, min(low + BLOCK, size)) for low in range(0, size, BLOCK)]
    for rows in _chunks(matrix_LR):
        for block in blocks:
            gram_RR[block, : block.stop].addmm_(rows[:, block].T, rows[:, : block.stop])
    for block in blocks:
        gram_RR[: block.start, block] = gram_RR[block, : block.start].T
    return gram_RR


def _top_eigenvalue(gram_RR: Tensor) -> tuple[float, float]:
    """Bounds: below, by Lanczos from a random start; above, by a Cholesky factorisation of what is to be positive definite."""
    vector_R = torch.randn(len(gram_RR), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis_SR = torch.zeros(min(NUM_LANCZOS, len(gram_RR)), len(gram_RR), dtype=torch.float64)
    rounding = float(gram_RR.trace()) * torch.finfo(torch.float64).eps
    for step in range(len(basis_SR)):
        basis_SR[step] = vector_R / vector_R.norm()
        vector_R = gram_RR @ basis_SR[step]
        for _ in range(2):  # once leaves what cancellation makes of it
            vector_R -= basis_SR[: step + 1].T @ (basis_SR[: step + 1] @ vector_R)
        if vector_R.norm() <= rounding:
            break
    low = float(torch.linalg.eigvalsh(basis_SR @ gram_RR @ basis_SR.T)[-1])
    for excess in EXCESSES:
        rest_RR = -gram_RR
        rest_RR.diagonal().add_((1 + excess) * low)
        if _eliminate(rest_RR) == len(gram_RR):
            return low, (1 + excess) * low
    return low, math.inf


def _eliminate(matrix_RR: Tensor) -> int:
    """Cholesky's factorisation, in place, of as many leading blocks as are positive definite; returns how many rows they have.

    Below them is what it has of the other rows, and after them their Schur complement; only lower triangles count.
    """
    size = len(matrix_RR)
    for low in range(0, size, BLOCK):
        high = min(low + BLOCK, size)
        panel, done = matrix_RR[low:, low:high], matrix_RR[low:, :low]
        panel.addmm_(done, done[: high - low].T, alpha=-1)
        factor, info = torch.linalg.cholesky_ex(panel[: high - low])
        if int(info):
            matrix_RR[high:, high:].addmm_(done[high - low :], done[high - low :].T, alpha=-1)
            return low
        panel[: high - low] = factor
        panel[high - low :] = torch.linalg.solve_triangular(factor, panel[high - low :].T, upper=False).T
    return size


def _num_positive(matrix_NN: Tensor) -> int:
    """Eigenvalues, by the signs of the pivots; a pivot of two rows has one of each sign (Bunch and Kaufman 1977)."""
    if not len(matrix_NN):
        return 0
    factor = torch.linalg.ldl_factor(matrix_NN)
    single_N = factor.pivots > 0
    return int((single_N & (factor.LD.diagonal() > 0)).sum()) + int((~single_N).sum()) // 2
