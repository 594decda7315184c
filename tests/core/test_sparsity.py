"""Unchanged entries counted as the literature counts them, and as arithmetic alone predicts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlpost.core.sparsity import (
    TOLERANCES,
    UpdateCounts,
    absorption_null,
    changed_grid,
    in_pieces,
    pooled,
    spacing,
    sparsity,
)
from rlpost.core.weights import bits


def paper_sparsity(before: Tensor, after: Tensor, tolerance: float) -> float:
    """Mukherjee et al.: the difference in the stored dtype, close to zero by an absolute tolerance."""
    delta = after - before
    return float(torch.isclose(delta, torch.zeros_like(delta), atol=tolerance).float().mean())


def pair(dtype: torch.dtype, density: float, size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    before = torch.randn(300, 70).mul(0.02).to(dtype)
    moved = (before.float() + size * torch.randn(300, 70)).to(dtype)
    return before, torch.where(torch.rand(300, 70) < density, moved, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-5, 1e-3])
def test_every_tolerance_is_the_papers(dtype: torch.dtype, size: float) -> None:
    before, after = pair(dtype, 0.3, size)
    found = sparsity(before, after)
    for tolerance in TOLERANCES:
        assert found.share(found.within[tolerance]) == pytest.approx(paper_sparsity(before, after, tolerance), abs=1e-7)
    assert found.unchanged == pytest.approx(float((before == after).float().mean()), abs=1e-7)
    assert found.rms_update == pytest.approx(float((after.double() - before.double()).square().mean().sqrt()))


def test_a_planted_update_is_counted_exactly() -> None:
    """Of ten entries one changes its sign and is zero, one moves by 2e-5, and one by a third of its size."""
    before = torch.tensor([1.0, 1.0, 0.0, -0.0, 3e-5, 3.0, torch.nan, torch.inf, 2.0, 2.0])
    after = before.clone()
    after[4] = 5e-5
    after[3] = 0.0
    after[5] = 4.0
    found = sparsity(before, after)
    assert (found.numel, found.bit_equal) == (10, 7), "0.0 and -0.0 are different bits; NaN is the same"
    assert found.within == {1e-8: 8, 1e-7: 8, 1e-6: 8, 1e-5: 8, 1e-4: 9}
    assert found.within_relative == 8
    assert found.squared_update == pytest.approx(1.0, rel=1e-6)


def test_the_relative_probe_is_bit_equality_in_bfloat16() -> None:
    for size in (1e-6, 1e-4, 1e-2):
        found = sparsity(*pair(torch.bfloat16, 0.5, size))
        assert found.within_relative == found.bit_equal < found.numel


def test_identical_weights_are_unchanged_by_every_measure() -> None:
    before, _ = pair(torch.bfloat16, 0.0, 0.0)
    for weight in (before, torch.zeros(0, 3), torch.tensor(2.0)):
        found = sparsity(weight, weight.clone())
        assert found.unchanged == found.share(found.predicted) == found.share(found.within[1e-8]) == 1.0
        assert found.rms_update == 0.0


def test_pooling_weighs_by_size() -> None:
    small, large = torch.zeros(10), torch.zeros(90)
    total = pooled([sparsity(small, small + 1), sparsity(large, large)])
    assert (total.numel, total.bit_equal, total.unchanged) == (100, 90, 0.9)
    assert total.rms_update == pytest.approx(math.sqrt(0.1))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_change_to_what_is_not_finite_is_refused(broken: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        sparsity(torch.zeros(3), torch.tensor([0.0, broken, 0.0]))
    with pytest.raises(ValueError, match=r"float32 \(3,\) and torch.bfloat16"):
        sparsity(torch.zeros(3), torch.zeros(3).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_spacing_is_the_distance_to_the_next_value(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(500) * 10.0 ** torch.randint(-4, 3, (500,)), torch.tensor([1.0, 2.0, 0.5, 0.0])])
    values = values.to(dtype)
    magnitude = values.abs()
    following = torch.nextafter(magnitude.float(), torch.tensor(torch.inf)) if dtype == torch.float32 else None
    if following is None:
        integers = magnitude.view(torch.int16) + 1
        following = integers.view(dtype)
    torch.testing.assert_close(spacing(values), following.double() - magnitude.double(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4])
def test_an_update_that_only_size_and_spacing_decide_is_predicted(size: float) -> None:
    """Weights on the bfloat16 grid, every one moved by a normal step and rounded again."""
    torch.manual_seed(0)
    before = torch.randn(1000, 500).mul(0.02).bfloat16()
    after = (before.double() + size * torch.randn(1000, 500).double()).bfloat16()
    observed = float((before == after).double().mean())
    assert absorption_null(before.flatten(), size) == pytest.approx(observed, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_prediction_is_the_mean_over_every_entrys_spacing(dtype: torch.dtype) -> None:
    """With zeros, both signs, and values below the smallest normal one."""
    torch.manual_seed(0)
    values = (torch.randn(500).double() * 10.0 ** torch.randint(-4, 3, (500,))).to(dtype)
    values[:10], values[10:20] = 0.0, torch.finfo(dtype).smallest_normal / 2
    expected = torch.erf(spacing(values) / (2 * math.sqrt(2) * 1e-4)).mean()
    assert absorption_null(values, 1e-4) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 9, 1 << 22])
def test_rows_and_columns_that_changed(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """However many entries are looked at together."""
    monkeypatch.setattr("rlpost.core.sparsity.CHUNK", chunk)
    before = torch.zeros(3, 4)
    after = before.clone()
    after[1, :2] = 1.0
    counts = UpdateCounts(before.shape)
    for old_N, new_N in zip(in_pieces(before), in_pieces(after), strict=True):
        counts.add(old_N, new_N)
    assert counts.rows_M.tolist() == [False, True, False]
    assert counts.columns_K.tolist() == [True, True, False, False]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_null_is_averaged_over_evenly_spaced_entries(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Of 1000 entries every second, whatever the pieces: those are 1 and move by a bfloat16 step; no such step moves 1024."""
    monkeypatch.setattr("rlpost.core.sparsity.CHUNK", chunk)
    monkeypatch.setattr("rlpost.core.sparsity.NULL_SAMPLE", 500)
    before = torch.tensor([1.0, 1024.0]).bfloat16().repeat(500)
    after = before.clone()
    after[::2] = 1 + 2.0**-7
    expected = absorption_null(torch.ones(500).bfloat16(), 2.0**-7 * 0.5**0.5)
    assert 0.5 < expected < 0.55  # erf(1 / 2)
    assert sparsity(before, after).predicted == pytest.approx(1000 * expected, rel=1e-12)


def test_a_grid_has_the_share_of_changed_entries_in_each_of_its_cells() -> None:
    """[4, 6] in cells of [2, 3]: two entries of the first cell change, six of the last, -0.0 to 0.0 is one."""
    before = torch.zeros(4, 6)
    before[0, 0] = -0.0
    after = torch.zeros(4, 6)
    after[1, 2] = 1.0
    after[2:, 3:] = 1.0
    torch.testing.assert_close(
        changed_grid(bits(before) != bits(after), size=2), torch.tensor([[2 / 6, 0.0], [0.0, 1.0]])
    )


def test_a_matrix_smaller_than_the_grid_is_its_own_picture() -> None:
    before, after = torch.zeros(3, 200), torch.zeros(3, 200)
    after[1, :100] = 1.0
    grid = changed_grid(before != after, size=100)
    assert grid.shape == (3, 100), "no row is drawn twice"
    torch.testing.assert_close(grid[1], torch.cat([torch.ones(50), torch.zeros(50)]))
    assert not grid[[0, 2]].any()
