"""Planted ranks and directions are found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlpost.core.spectrum import (
    decompose,
    intruder_dimensions,
    principal_cosines,
    ranks,
    rounded_approximation,
    singular_values,
    spectral_shift,
)


def matrix(sigma: list[float], shape: tuple[int, int] = (40, 30), seed: int = 0) -> Tensor:
    """With these singular values and random directions."""
    torch.manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(shape[0], len(sigma), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], len(sigma), dtype=torch.float64))
    return (left * torch.tensor(sigma, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_the_rank_of_a_planted_update_is_found_and_is_matrix_ranks(rank: int) -> None:
    before, update = torch.zeros(40, 30), matrix([1.0] * rank).float()
    found = ranks(singular_values(before, before + update), (40, 30))
    assert found.numerical == rank == int(torch.linalg.matrix_rank(update))
    assert (found.full, found.energy_99) == (30, math.ceil(0.99 * rank))
    assert found.stable == pytest.approx(rank, rel=1e-4) and found.entropy == pytest.approx(rank, rel=1e-3)


def test_the_rank_rule_is_matrix_ranks_on_spectra_that_fall_through_its_threshold() -> None:
    for seed in range(5):
        update = matrix([10.0 ** (-i / 3) for i in range(30)], seed=seed).float()
        found = ranks(torch.linalg.svdvals(update), (40, 30))
        assert found.numerical == int(torch.linalg.matrix_rank(update)) and 10 < found.numerical < 30


@pytest.mark.parametrize("shape", [(300, 280), (280, 300)])
def test_a_large_spectrum_is_found_without_a_decomposition_and_is_float32s(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty directions are zero: in float64 products they are noise of 1e-8, in float32 of 1e-7."""
    update = matrix([10.0 ** (-i / 100) for i in range(220)], shape=shape).float()
    expected = torch.linalg.svdvals(update.double())
    monkeypatch.setattr(torch.linalg, "svdvals", lambda *_: pytest.fail("decomposed"))
    found = singular_values(torch.zeros(shape), update)
    assert found.dtype == torch.float32 and len(found) == 280
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    assert ranks(found, shape).numerical == 220


def test_the_rank_of_a_large_spectrum_is_matrix_ranks_where_rounding_decides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlpost.core.spectrum.DIRECT", 0)
    for seed in range(20):
        near = [200 * 2.0**-23 * (1 + 1e-3 * (i - 10)) for i in range(20)]
        update = matrix([1.0] * 20 + near, shape=(200, 60), seed=seed).float()
        found = ranks(singular_values(torch.zeros(200, 60), update), (200, 60)).numerical
        assert found == int(torch.linalg.matrix_rank(update))


def test_ranks_of_a_spectrum_worked_by_hand() -> None:
    """Sigma 3, 1: energies 9 and 1; p = 3/4, 1/4."""
    found = ranks(torch.tensor([3.0, 1.0, 0.0]), (3, 5))
    assert (found.numerical, found.energy_90, found.energy_99) == (2, 1, 2)
    assert found.stable == pytest.approx(10 / 9)
    assert found.entropy == pytest.approx(4 / 3**0.75)
    assert ranks(torch.zeros(3), (3, 5)).numerical == 0


def test_angles_and_shift() -> None:
    before = matrix([5.0, 4.0, 3.0, 2.0]).float()
    assert principal_cosines(decompose(before), decompose(2 * before), 3).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert spectral_shift(decompose(before), decompose(2 * before)) == pytest.approx(1.0, abs=1e-5)
    other = torch.zeros(40, 30)
    left = torch.linalg.svd(before).U
    other[:, 0], other[:, 1] = 9 * left[:, 0], 8 * left[:, 20]
    cosines = principal_cosines(decompose(before), decompose(other), 2)
    assert cosines.tolist() == pytest.approx([1.0, 0.0], abs=1e-5)


def test_an_intruder_is_a_top_direction_that_the_base_does_not_have() -> None:
    base = matrix([5.0, 4.0, 3.0, 2.0, 1.0], shape=(60, 5)).float()
    direction = torch.linalg.svd(base).U[:, 30]
    assert intruder_dimensions(decompose(base), decompose(base), k=5) == 0
    tuned = base + 20 * torch.outer(direction, torch.linalg.svd(base).Vh[4])
    assert intruder_dimensions(decompose(base), decompose(tuned), k=1) == 1
    nudged = base + 0.1 * torch.outer(direction, torch.ones(5))
    assert intruder_dimensions(decompose(base), decompose(nudged), k=5) == 0


def test_what_rank_the_cast_alone_adds() -> None:
    """Above 1 bfloat16 counts in steps of 2^-7. The update 0.6 (1 2; 2 4) steps, of rank 1, is stored as (1 1; 1 2), whose
    singular values are 2.618 and 0.382: of rank 2, but so is its best approximation of rank 1, (0.72 1.17; 1.17 1.89), once
    it is stored. (1 2; 2 4) is stored as it is, and stays of rank 1 whatever is cast."""
    step, ones = 2.0**-7, torch.ones(2, 2).bfloat16()
    rounded = (1 + 0.6 * step * torch.tensor([[1.0, 2.0], [2.0, 4.0]])).bfloat16()
    assert ((rounded.float() - 1) / step).tolist() == [[1, 1], [1, 2]]
    assert torch.equal(rounded_approximation(ones, rounded, 1), rounded)
    exact = (1 + step * torch.tensor([[1.0, 2.0], [2.0, 4.0]])).bfloat16()
    assert torch.equal(rounded_approximation(ones, exact, 1), exact)
    assert int(torch.linalg.matrix_rank(exact.float() - 1)) == 1


def test_two_directions_that_the_cast_did_not_add_are_not_in_the_null() -> None:
    """diag(8, 4) steps: the approximation of rank 1 is diag(8, 0)."""
    step, zeros = 2.0**-7, torch.zeros(2, 2).bfloat16()
    after = (torch.eye(2) + step * torch.diag(torch.tensor([8.0, 4.0]))).bfloat16()
    null = rounded_approximation(torch.eye(2).bfloat16(), after, 1)
    assert null.dtype == torch.bfloat16
    assert torch.equal(null - torch.eye(2).bfloat16(), zeros + step * torch.diag(torch.tensor([8.0, 0.0])).bfloat16())
