"""What several samples of each problem say of a model: pass@k, majority votes, their errors, and whether two models differ.

P problems, C answers that some sample gave. Samples of one problem are alike, so errors are those of a sample of problems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that at least one of k samples is right, without bias from n >= k of them.

    "Evaluating Large Language Models Trained on Code", eq. 1 (https://arxiv.org/abs/2107.03374). It is what a verifier
    that picks the best of k samples reaches.
    """
    assert 1 <= k <= num_samples and 0 <= num_correct <= num_samples
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def budgets(num_samples: int) -> list[int]:
    """The k that are reported of n samples: 1, 2, 4 and so on, and all."""
    return sorted({num_samples, *(1 << power for power in range(num_samples.bit_length()))})


def voted_at_k(votes_N: Sequence[tuple[bool, str | None]], k: int) -> float:
    """`majority_at_k` of one problem.

    Args:
        votes_N: of each sample whether it is right, and its answer as it votes; None: it gave none. All right answers are
            one, whatever they look like: the verifier has found them equal.
    """
    wrong = Counter(answer for right, answer in votes_N if not right and answer is not None)
    return majority_at_k(len(votes_N), sum(right for right, _ in votes_N), tuple(sorted(wrong.values())), k)


@lru_cache(maxsize=10_000)
def majority_at_k(num_samples: int, num_correct: int, wrong_C: tuple[int, ...], k: int) -> float:
    """The chance that the right answer has the most votes of k samples, drawn from the n without replacement.

    "Self-Consistency Improves Chain of Thought Reasoning" (https://arxiv.org/abs/2203.11171), as an average over all
    subsets and not of one. Of answers that tie one is chosen at random.

    Args:
        num_correct: samples with the right answer.
        wrong_C: samples with each of the wrong answers. The rest gave none, and do not vote.
    """
    abstained = num_samples - num_correct - sum(wrong_C)
    assert 1 <= k <= num_samples and abstained >= 0
    won = 0.0
    for votes in range(1, min(num_correct, k) + 1):
        # Answers too rare to tie may be drawn as they come; ways_S[s][t]: to draw s of the others with t ties.
        free = abstained + sum(count for count in wrong_C if count < votes)
        ways_S = {num: {0: math.comb(free, num)} for num in range(k - votes + 1)}
        for count in wrong_C:
            if count >= votes:
                ways_S = _with_answer(ways_S, count, votes)
        won += math.comb(num_correct, votes) * sum(ways / (ties + 1) for ties, ways in ways_S[k - votes].items())
    return won / math.comb(num_samples, k)


def _with_answer(ways_S: dict[int, dict[int, int]], count: int, votes: int) -> dict[int, dict[int, int]]:
    """With another wrong answer of `count` samples, of which at most `votes` are drawn."""
    result: dict[int, dict[int, int]] = {num: {} for num in ways_S}
    for num, ways_T in ways_S.items():
        for drawn in range(min(votes, max(ways_S) - num) + 1):
            for ties, ways in ways_T.items():
                tied = ties + (drawn == votes)
                known = result[num + drawn].get(tied, 0)
                result[num + drawn][tied] = known + ways * math.comb(count, drawn)
    return result


def clustered_mean(sums_P: Sequence[float], counts_P: Sequence[int] | None = None) -> tuple[float, float]:
    """The mean of all samples and its standard error, clustered by problem.

    "Adding Error Bars to Evals", section 2.2 (https://arxiv.org/abs/2411.00640), with the correction P / (P - 1). With
    equally many samples of each problem it is the standard error of the mean of the problems' means.

    Args:
        sums_P: of each problem, the sum over its samples.
        counts_P: of each problem, its number of samples; None: one each.

    Returns:
        Mean, and standard error: 0 for a single problem, which shows no spread.
    """
    counts = np.ones(len(sums_P)) if counts_P is None else np.asarray(counts_P, float)
    sums = np.asarray(sums_P, float)
    assert len(sums) == len(counts) and counts.sum() > 0
    mean = sums.sum() / counts.sum()
    num = len(sums)
    variance = ((sums - mean * counts) ** 2).sum() * num / max(num - 1, 1)
    return float(mean), float(math.sqrt(variance) / counts.sum())


def estimate(values_P: Sequence[float]) -> dict[str, float]:
    """`clustered_mean` of one figure of each problem, under the names it has in files."""
    mean, error = clustered_mean(values_P)
    return {"mean": mean, "se": error}


def sign_flip_p_value(differences_P: Sequence[int]) -> float:
    """How likely a sum of paired differences this far from 0 is, on either side, when each sign is as likely as the other.

    The exact randomization test for pairs (Fisher, The Design of Experiments, 1935, section 21), from the distribution of
    the sum over all 2^P signs. For single samples, whose differences are -1, 0 and 1, it is the exact form of McNemar's test
    (https://doi.org/10.1007/BF02295996).

    Args:
        differences_P: of each problem, how many more samples the second model has right.
    """
    sizes = [abs(difference) for difference in differences_P if difference]
    if not sizes:
        return 1.0
    unit = math.gcd(*sizes)
    total = sum(sizes) // unit
    chances = np.zeros(total + 1)  # of the sum of the positive ones
    chances[0] = 1.0
    for size in sizes:
        step = size // unit
        chances[step:] = (chances[step:] + chances[:-step]) / 2
        chances[:step] /= 2
    far = np.abs(2 * np.arange(total + 1) - total) >= abs(sum(differences_P)) // unit
    return min(float(chances[far].sum()), 1.0)
