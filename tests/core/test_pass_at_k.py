"""Statistics of repeated samples: by hand, against every subset, and against draws."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from statistics import mean, stdev

import pytest

from rlpost.core.pass_at_k import clustered_mean, majority_at_k, pass_at_k, sign_flip_p_value


def test_pass_at_k_by_hand() -> None:
    """4 samples, 1 right: of the 6 pairs 3 have it, of the 4 triples 3."""
    assert [pass_at_k(4, 1, k) for k in (1, 2, 3, 4)] == pytest.approx([1 / 4, 3 / 6, 3 / 4, 1])
    assert pass_at_k(4, 0, 4) == 0 and pass_at_k(4, 4, 1) == 1


def test_pass_at_k_has_no_bias() -> None:
    """Over draws of 6 samples that are each right with chance 0.3, pass@4 averages 1 - 0.7^4; counting 4-blocks of the
    plug-in estimate 1 - (1 - c/n)^4 would give less."""
    weights = [math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) for c in range(7)]
    expected = sum(weight * pass_at_k(6, c, 4) for c, weight in enumerate(weights))
    assert expected == pytest.approx(1 - 0.7**4)


def test_a_majority_by_hand() -> None:
    """Right, right, wrong: of the 3 pairs one agrees on the right answer and two tie, so 1/3 + 2/3 * 1/2 = 2/3.

    With one wrong sample and one without an answer beside one right: pairs are right-wrong (a tie), right-none (won),
    wrong-none (lost): (1/2 + 1 + 0) / 3.
    """
    assert majority_at_k(3, 2, (1,), 2) == pytest.approx(2 / 3)
    assert majority_at_k(3, 2, (1,), 3) == 1
    assert majority_at_k(3, 1, (1,), 2) == pytest.approx(1.5 / 3)
    assert majority_at_k(3, 1, (), 1) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("num", "right", "wrong"), [(8, 3, (2, 2, 1)), (9, 2, (2, 2, 2)), (7, 4, ()), (7, 0, (3,)), (8, 1, (1, 1, 1, 1, 1))]
)
def test_a_majority_is_the_average_over_all_subsets(num: int, right: int, wrong: tuple[int, ...]) -> None:
    """Against the obvious version: every subset, its votes counted, ties shared."""
    stated = [0] * right + [i + 1 for i, count in enumerate(wrong) for _ in range(count)]
    answers = [*stated, *[None] * (num - len(stated))]
    for k in range(1, num + 1):
        shares = []
        for subset in itertools.combinations(answers, k):
            votes = Counter(answer for answer in subset if answer is not None)
            most = [answer for answer, count in votes.items() if count == max(votes.values())]
            shares.append(1 / len(most) if 0 in most else 0)
        assert majority_at_k(num, right, wrong, k) == pytest.approx(mean(shares))


def test_a_majority_of_many_samples_is_what_draws_say() -> None:
    """20,000 draws of 16 of 64 samples: within 4 standard errors, of 0.0035 at most."""
    answers = [0] * 20 + [1] * 18 + [2] * 10 + list(range(3, 13))
    rng, won = random.Random(0), 0.0
    for _ in range(20_000):
        votes = Counter(answer for answer in rng.sample(answers + [-1] * 6, 16) if answer >= 0)
        most = [answer for answer, count in votes.items() if count == max(votes.values())]
        won += 0 in most and 1 / len(most)
    assert majority_at_k(64, 20, (18, 10, *[1] * 10), 16) == pytest.approx(won / 20_000, abs=0.014)


def test_errors_are_those_of_problems() -> None:
    """Means 1, 0.5 and 0: mean 0.5, standard deviation 0.5, error 0.5 / sqrt(3), whatever the number of samples."""
    assert clustered_mean([4, 2, 0], [4, 4, 4]) == pytest.approx((0.5, 0.5 / math.sqrt(3)))
    assert clustered_mean([0.2, 0.9, 0.4]) == pytest.approx((0.5, stdev([0.2, 0.9, 0.4]) / math.sqrt(3)))
    assert clustered_mean([1]) == (1, 0)


def test_errors_of_unequal_counts_by_hand() -> None:
    """3 of 3 and 0 of 1 right: mean 3/4; deviations 3 - 9/4 = 3/4 and -3/4; sqrt(2 * 9/8) / 4 = 0.375."""
    assert clustered_mean([3, 0], [3, 1]) == pytest.approx((0.75, 0.375))


def test_errors_are_what_repeated_evaluations_spread_by() -> None:
    """Problems of pass rate 0.1 or 0.9, 40 of them with 8 samples each: 2,000 evaluations spread as the error says, and
    twice as far as if their samples were independent."""
    rng, means, errors = random.Random(0), [], []
    for _ in range(2000):
        rates = [rng.choice((0.1, 0.9)) for _ in range(40)]
        right = [sum(rng.random() < rate for _ in range(8)) for rate in rates]
        value, error = clustered_mean(right, [8] * 40)
        means.append(value)
        errors.append(error)
    assert mean(errors) == pytest.approx(stdev(means), rel=0.06)
    assert mean(errors) > 2 * math.sqrt(0.25 / 320)


def test_single_samples_are_compared_by_mcnemar() -> None:
    """1 problem lost and 5 won: twice the binomial tail of at most 1 of 6, 2 * (1 + 6) / 64. Equal ones say nothing."""
    assert sign_flip_p_value([-1, 1, 1, 1, 1, 1, 0, 0, 0]) == pytest.approx(14 / 64)
    assert sign_flip_p_value([0, 0]) == 1 and sign_flip_p_value([1, -1]) == 1


@pytest.mark.parametrize("differences", [[2, -4, 6, 0, 2], [3, 1, -2, 5, 5, -1, 4], [-8]])
def test_a_comparison_counts_every_assignment_of_signs(differences: list[int]) -> None:
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)
    assert sign_flip_p_value(differences) == pytest.approx(expected)
