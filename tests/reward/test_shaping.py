"""Parts of the reward, by hand."""

from __future__ import annotations

import math

import pytest

from reward.shaping import cosine_length, overlong, repetition, shape, thinking_format

THINKING = [
    ("I think\n</think>\nIt is 5.", 1.0),
    ("<think>\nI think\n</think>\n", 1.0),
    ("I think</think>It is 5.", 0.0),
    ("a\n</think>\nb\n</think>\nc", 0.0),
    ("It is 5.", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("response", "value"), THINKING)
def test_thinking_is_closed_exactly_once(response: str, value: float) -> None:
    assert thinking_format(response) == value


# cos(0) = 1, cos(pi/3) = 1/2, cos(pi/2) = 0, cos(pi) = -1, so the share of the way still to go is 1, 3/4, 1/2, 0.
COSINE = [
    (0, True, 1.0),
    (1000, True, 0.875),
    (1500, True, 0.75),
    (3000, True, 0.5),
    (9000, True, 0.5),
    (0, False, 0.0),
    (1000, False, -0.125),
    (1500, False, -0.25),
    (3000, False, -0.5),
]


@pytest.mark.parametrize(("num_tokens", "correct", "value"), COSINE)
def test_the_cosine_falls_from_its_first_value_to_its_second(num_tokens: int, correct: bool, value: float) -> None:
    """Tina's settings (correct 1 to 0.5, wrong 0 to -0.5), of 3,000 tokens; past the end it stays and does not wrap."""
    found = cosine_length(
        num_tokens, correct=correct, max_tokens=3000, correct_range=(1.0, 0.5), wrong_range=(0.0, -0.5)
    )
    assert found == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("num_tokens", "value"), [(0, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (30000, -1.0)]
)
def test_overlong_is_free_until_the_buffer_and_linear_within(num_tokens: int, value: float) -> None:
    """DAPO's lengths: 20,480 tokens, the last 4,096 of them the buffer; 17,408 is a quarter into it."""
    assert overlong(num_tokens, max_tokens=20480, buffer_tokens=4096) == value


REPETITION = [
    ("a b c d", 2, 0.0),  # ab bc cd
    ("a b a b", 2, -1 / 3),  # ab ba ab: 2 of 3 differ
    ("a a a a a", 2, -3 / 4),  # aa four times: 1 of 4 differs
    ("A a a", 1, -2 / 3),  # one word in two cases
    ("a b", 3, 0.0),  # no three words
    ("", 1, 0.0),
]


@pytest.mark.parametrize(("response", "ngram_words", "value"), REPETITION)
def test_repetition_is_the_share_of_ngrams_seen_before(response: str, ngram_words: int, value: float) -> None:
    assert repetition(response, ngram_words=ngram_words) == pytest.approx(value)


PLAIN = {
    "accuracy": 1.0,
    "format": 0.0,
    "thinking_format": 0.0,
    "cosine_length": None,
    "overlong": None,
    "repetition": None,
}


def test_without_weights_the_reward_is_accuracy() -> None:
    for accuracy in (0.0, 1.0):
        parts = {"accuracy": accuracy, "format": 1.0}
        assert shape(parts, "a a a", num_tokens=3, table=PLAIN) == (accuracy, parts)


def test_the_reward_is_the_weighted_sum_and_every_part_is_reported_unweighted() -> None:
    """Words a, a, </think>, a: 2 of 4 differ, so repetition is -0.5."""
    table = PLAIN | {
        "accuracy": 2.0,
        "format": 0.5,
        "thinking_format": 1.0,
        "cosine_length": {"weight": 0.5, "correct": (1.0, 0.5), "wrong": (0.0, -0.5)},
        "overlong": {"weight": 1.0, "buffer_tokens": 100},
        "repetition": {"weight": 0.1, "ngram_words": 1},
        "max_tokens": 100,
    }
    reward, parts = shape({"accuracy": 1.0, "format": 1.0}, "a a\n</think>\n a", num_tokens=50, table=table)
    assert parts == pytest.approx(
        {
            "accuracy": 1.0,
            "format": 1.0,
            "thinking_format": 1.0,
            "cosine_length": 0.75,
            "overlong": -0.5,
            "repetition": -0.5,
        }
    )
    assert reward == pytest.approx(2 + 0.5 + 1 + 0.375 - 0.5 - 0.05)
    wrong, parts = shape({"accuracy": 0.0, "format": 1.0}, "a", num_tokens=100, table=table)
    assert wrong == pytest.approx(0.5 - 0.25 - 1.0)
    assert parts["accuracy"] == 0.0 and math.isclose(parts["cosine_length"], -0.5)
