"""The numerical rank is `torch.linalg.matrix_rank`'s, and is found without it where that is certain."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlpost.core import rank
from rlpost.core.rank import numerical_rank

THRESHOLD = torch.finfo(torch.float32).eps
"""Times max(M, K) sigma_1."""


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "DIRECT", 0)
    monkeypatch.setattr(rank, "BLOCK", 32)
    monkeypatch.setattr(rank, "CHUNK", 4000)


@pytest.fixture
def without_singular_values(every_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("matrix_rank was asked")

    monkeypatch.setattr(torch.linalg, "matrix_rank", refuse)


def planted(sigma: list[float], shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Float32, with these singular values and random directions."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(sigma), dtype=torch.float64, generator=generator)).Q for size in shape
    )
    return ((left * torch.tensor(sigma, dtype=torch.float64)) @ right.T).float()


def same(matrix: Tensor) -> bool:
    return numerical_rank(matrix) == int(torch.linalg.matrix_rank(matrix))


@pytest.mark.usefixtures("every_size")
@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    share=st.floats(0, 1),
    decades=st.floats(0, 12),
    scale=st.integers(-30, 30),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_it_is_matrix_ranks_for_spectra_that_fall_through_the_threshold_at_any_scale(
    shape: tuple[int, int], share: float, decades: float, scale: int, zeros: float, seed: int
) -> None:
    """Of every shape, some rank and some number of decades of singular values, a share of its rows and columns zero."""
    num = round(share * min(shape))
    sigma = [10.0 ** (scale - decades * i / max(1, num)) for i in range(num)]
    matrix = planted(sigma, shape, seed)
    torch.manual_seed(seed)
    for dim in (0, 1):
        matrix = matrix * (torch.rand(shape[dim]) >= zeros).float().view((-1, 1) if dim == 0 else (1, -1))
    assert same(matrix)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("shape", [(300, 200), (160, 240), (200, 200)])
@pytest.mark.parametrize("offset", [0.0, 1e-6, 1e-3, 1e-2, 0.03, 0.1, 0.5])
@pytest.mark.parametrize("low_rank", [True, False])
def test_it_is_matrix_ranks_with_singular_values_around_the_threshold(
    shape: tuple[int, int], offset: float, low_rank: bool
) -> None:
    """Nine at, just above and just below it, under 10, which are found by sketch, or 140, by inertia."""
    threshold = max(shape) * THRESHOLD
    near = [threshold * (1 + sign * offset * (1 + 0.1 * i)) for i in range(5) for sign in (1, -1)][:9]
    for seed in range(3):
        assert same(planted([1.0] * (10 if low_rank else 140) + near, shape, seed))


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("near", [0.994, 1.006])
def test_it_is_matrix_ranks_where_float32_puts_singular_values_on_the_other_side_of_the_threshold(near: float) -> None:
    """Half of 256 are 0.6 % off the threshold, more than float64 is, and float32's rounding spreads them by 1 %."""
    update = planted([1.0] * 128 + [256 * THRESHOLD * near] * 128, (256, 256))
    assert 128 < int(torch.linalg.matrix_rank(update)) < 256
    assert same(update)


@pytest.mark.usefixtures("every_size")
def test_more_directions_than_random_vectors_are_not_taken_for_as_many() -> None:
    """70 of 1 and 12 of 1.2 thresholds: all 80 found count, and so do two more."""
    assert numerical_rank(planted([1.0] * 70 + [300 * THRESHOLD * 1.2] * 12, (300, 200))) == 82


def gaussian(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("without_singular_values")
@pytest.mark.parametrize("scale", [1e-27, 1.0, 1e30])
def test_what_it_counts_without_singular_values(scale: float) -> None:
    """Dense, directions 1e-4 of the largest (above 300 eps = 4e-5) and 1e-5 (below), and few rows."""
    shape = (300, 200)
    assert numerical_rank(torch.zeros(shape)) == 0
    assert numerical_rank(scale * gaussian(shape)) == 200
    assert numerical_rank(scale * gaussian(shape).T) == 200
    assert numerical_rank(scale * planted([1.0] * 120 + [1e-4] * 30 + [1e-5] * 30, shape)) == 150
    rows = torch.zeros(shape)
    rows[::50] = scale * gaussian((6, 200))
    assert numerical_rank(rows) == 6
    rows[0, 0] = 100 * scale * 200**0.5
    assert numerical_rank(rows) == 6


@pytest.mark.usefixtures("without_singular_values")
def test_few_directions_are_counted_without_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "gram", lambda *_: pytest.fail("multiplied"))
    for num in (1, 16, 79):
        assert numerical_rank(planted([10.0 ** (-i / 40) for i in range(num)], (300, 200))) == num


@pytest.mark.parametrize("num_steps", [1, 7, 40])
def test_the_largest_eigenvalue_is_between_its_bounds(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step the bound from below is an average, and no excess above it that is tried is enough."""
    monkeypatch.setattr(rank, "NUM_LANCZOS", num_steps)
    product = rank.gram(gaussian((150, 120)))
    low, high = rank._top_eigenvalue(product)
    assert low <= float(torch.linalg.eigvalsh(product)[-1]) * (1 + 1e-12) < high
    assert (high == math.inf) == (num_steps == 1) and (high == 1.001 * low) == (num_steps == 40)


@pytest.mark.usefixtures("without_singular_values")
def test_the_threshold_is_that_of_the_whole_matrix_and_not_of_its_nonzero_part() -> None:
    """diag(1, 2e-5): of 2 x 2, 2; of 300 x 200 the threshold is 3.6e-5."""
    matrix = torch.zeros(300, 200)
    matrix[7, 7], matrix[9, 9] = 1.0, 2e-5
    assert numerical_rank(matrix) == 1
    assert numerical_rank(matrix[:10, :10]) == 2


def test_of_nothing_zero_one_number_and_what_is_not_finite() -> None:
    for matrix in (torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(200, 300), torch.zeros(1, 1), torch.ones(1, 1)):
        assert same(matrix)
    for broken in (torch.nan, torch.inf):
        matrix = gaussian((200, 200))
        matrix[3, 4] = broken
        with pytest.raises(ValueError, match="not finite"):
            numerical_rank(matrix)


def test_positive_eigenvalues_are_counted_by_pivots_of_one_row_and_of_two() -> None:
    """(0 1; 1 0), whose eigenvalues are 1 and -1, has no pivot of one row."""
    swap, one = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    assert [rank._num_positive(swap - shift * one) for shift in (-2.0, 0.0, 2.0)] == [2, 1, 0]
    matrix = gaussian((90, 90)).double()
    matrix += matrix.T.clone()
    for shift in (-20.0, -3.0, 0.0, 1.0, 15.0):
        shifted = matrix - shift * torch.eye(90, dtype=torch.float64)
        assert rank._num_positive(shifted) == int((torch.linalg.eigvalsh(shifted) > 0).sum())
