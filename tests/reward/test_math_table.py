"""Verdicts on a table of labelled pairs, both ways round; and properties of the comparison that no table can list."""

from __future__ import annotations

import csv
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reward import Outcome, RewardPool
from reward.child.equivalence import equivalent

TABLE = Path(__file__).parent / "math_cases.tsv"


def read_table() -> dict[str, list[tuple[str, str, str]]]:
    with TABLE.open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    topics = defaultdict(list)
    for topic, label, gold, answer in rows:
        topics[topic].append((label, gold, answer))
    return topics


CASES = read_table()


@pytest.mark.parametrize("topic", CASES)
def test_verdicts_agree_with_the_labels_both_ways_round(pool: RewardPool, topic: str) -> None:
    wrong = []
    for label, gold, answer in CASES[topic]:
        for reference, stated in ((gold, answer), (answer, gold)):
            verdict = pool.score("math", f"\\boxed{{{stated}}}", {"answer": reference})
            if (verdict.outcome is Outcome.CORRECT) != (label == "same"):
                wrong.append(f"{reference!r} answered {stated!r}: labelled {label}, judged {verdict.outcome}")
    assert not wrong, "\n".join(wrong)


def test_every_answer_of_the_table_is_the_same_as_itself(pool: RewardPool) -> None:
    texts = {text for cases in CASES.values() for _, gold, answer in cases for text in (gold, answer)}
    verdicts = {text: pool.score("math", f"\\boxed{{{text}}}", {"answer": text}) for text in texts}
    assert [text for text, verdict in verdicts.items() if verdict.reward != 1.0] == []


FRACTIONS = st.fractions(min_value=-1000, max_value=1000, max_denominator=500)


def spellings(value: Fraction) -> list[str]:
    """Ways to write a rational number that keep its value."""
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    whole, rest = divmod(top, bottom)
    found = [
        f"{value.numerator}/{bottom}",
        f"\\frac{{{value.numerator}}}{{{bottom}}}",
        f"{sign}\\dfrac{{{3 * top}}}{{{3 * bottom}}}",
        f"x = {sign}\\frac{{{top}}}{{{bottom}}}",
        f"\\frac{{{value.numerator} \\cdot 7}}{{7 \\cdot {bottom}}}",
        f"({value.numerator}) \\div {bottom}",
        f"{value.numerator * 100}/{bottom}\\%",
        f"{value - 1} + 1",
        f"\\sqrt{{{top * top}}}/{bottom}" if value >= 0 else f"-\\sqrt{{{top * top}}}/{bottom}",
    ]
    if whole and rest:
        found.append(f"{sign}{whole}\\frac{{{rest}}}{{{bottom}}}")
    if _prime_factors(bottom) <= {2, 5}:
        found.append(f"{sign}{_decimal(abs(value))}")
    return found


def _prime_factors(number: int) -> set[int]:
    return {prime for prime in range(2, number + 1) if number % prime == 0 and all(prime % q for q in range(2, prime))}


def _decimal(value: Fraction) -> str:
    return f"{value.numerator * 10**12 // value.denominator / 10**12:.12f}"


@settings(max_examples=150, deadline=None)
@given(FRACTIONS, st.data())
def test_a_number_is_itself_however_it_is_written(value: Fraction, data: st.DataObject) -> None:
    one, other = data.draw(st.sampled_from(spellings(value))), data.draw(st.sampled_from(spellings(value)))
    assert equivalent(one, other) is True


@settings(max_examples=150, deadline=None)
@given(FRACTIONS, FRACTIONS, st.data())
def test_two_numbers_are_never_the_same(value: Fraction, another: Fraction, data: st.DataObject) -> None:
    assume(another not in (value, value * 100, value / 100))
    assume(abs(value - another) > Fraction(1, 10**5))
    one, other = data.draw(st.sampled_from(spellings(value))), data.draw(st.sampled_from(spellings(another)))
    assert equivalent(one, other) is False


COEFFICIENTS = st.lists(st.integers(-9, 9), min_size=1, max_size=4)


def polynomial(coefficients: list[int]) -> str:
    return " + ".join(f"({c})x^{{{power}}}" for power, c in enumerate(coefficients))


@settings(max_examples=100, deadline=None)
@given(COEFFICIENTS, COEFFICIENTS, st.integers(0, 5))
def test_a_product_is_the_polynomial_that_convolution_gives(left: list[int], right: list[int], changed: int) -> None:
    product = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    factored = f"({polynomial(left)})({polynomial(right)})"
    assert equivalent(factored, polynomial(product)) is True
    product[changed % len(product)] += 1
    assert equivalent(factored, polynomial(product)) is False


PIECES = st.sampled_from(
    [
        r"1",
        r"2",
        r"3.5",
        r"x",
        r"y",
        r"\pi",
        r"e",
        r"i",
        r"+",
        r"-",
        r"*",
        r"/",
        r"^",
        r"(",
        r")",
        r"[",
        r"]",
        r"{",
        r"}",
        r"\{",
        r"\}",
        r",",
        r";",
        r"=",
        r"<",
        r"\le",
        r"\cup",
        r"\infty",
        r"\frac{1}{2}",
        r"\sqrt{2}",
        r"\sqrt",
        r"\text{cm}",
        r"or",
        r"and",
        r"%",
        r"\pm",
        r"!",
        r"|",
        r":",
        r"_",
        r"\circ",
        r"\sin",
        r"\log_2",
        r"A",
    ]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=9).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS)
def test_any_two_texts_compare_the_same_both_ways_round(one: str, other: str) -> None:
    assert equivalent(one, other) is equivalent(other, one)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_any_text_is_the_same_as_itself(text: str) -> None:
    assert equivalent(text, text) is True
