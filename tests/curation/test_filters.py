"""What the text of a problem gives away, and what it only seems to."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from rlpost.curation.filters import CODE_FILTERS, first_found, math_filters

MATH = math_filters(min_words=4, max_answer_chars=100, max_foreign=0.1)


def found(problem: str, answer: str = "7") -> str | None:
    """Name of the filter that leaves it out."""
    hit = first_found(MATH, problem, answer)
    return None if hit is None else hit[0]


@pytest.mark.parametrize(
    ("name", "problem", "answer"),
    [
        ("too_short", "Simplify $\\sqrt{180}$.", "6\\sqrt5"),
        ("not_english", "Сколько существует двузначных чисел, кратных 7?", "13"),
        ("not_english", "已知等差数列的前三项和为 12 求公差 Find it in the end.", "2"),
        ("not_english", "Un triángulo rectángulo tiene catetos de 3 y 4 metros: calcula la hipotenusa de este triángulo.", "5"),
        ("figure", "What is the area of the shaded region in the figure?", "7"),
        ("figure", "The graph of $f$ is shown below. What is $f(2)$?", "7"),
        ("figure", "Find $x$. [asy] draw((0,0)--(1,1)); [/asy]", "7"),
        ("figure", "Find the angle marked there ![](https://cdn.example.org/a.png)", "7"),
        ("multiple_choice", "What is $1+6$? $\\textbf{(A)}\\ 6\\qquad\\textbf{(B)}\\ 7\\qquad\\textbf{(C)}\\ 8$", "7"),
        ("multiple_choice", "Which is the largest of these?\nA. $1$\nB. $6$\nC. $7$", "7"),
        ("true_false", "True or false: every square is a rhombus.", "7"),
        ("true_false", "Is $91$ a prime number, or is it not?", "\\text{No}"),
        ("proof", "Let $n$ be odd. Prove that $n^2 - 1$ is divisible by $8$.", "7"),
        ("proof", "Let $n$ be odd, and show that $n^2 - 1$ is divisible by $8$.", "7"),
        ("multi_part", "A die is rolled twice. (a) Find the mean. (b) What is the variance?", "7"),
        ("multi_part", "Let $f(x)=x^2$.\n(i) Find $f(2)$.\n(ii) Determine $f(3)$.", "7"),
        ("multi_part", "Given $a_1 = 1$: (1) Find $a_2$; (2) Find $a_{10}$.", "7"),
        ("long_answer", "Find every value of $x$ that there is.", "x = 1 when the number of terms is even"),
        ("long_answer", "Find the whole of the matrix $A$.", "1, " * 40),
    ],
)  # fmt: skip
def test_a_filter_knows_its_problems(name: str, problem: str, answer: str) -> None:
    assert found(problem, answer) == name


@pytest.mark.parametrize(
    "problem",
    [
        "Évaluer: find the value of $\\alpha + \\beta$ where $\\beta = 2\\alpha$ and $\\alpha = 3$.",
        "A figure is created by connecting $A$ to $B$ and $B$ to $C$. What is the area of the figure with the vertices $A,B,C$?",
        "If $f(a) = 3$, $f(b) = 4$ and $f(c) = 5$, what is $f(a) + f(b)$?",
        "Find the number of functions $f$ such that (i) $f(0) = 0$ and (ii) $f(1) = 1$ and (iii) $f(f(x)) = x$.",
        "Events have $P(A) = 1/2$, $P(B) = 1/3$ and $P(C) = 1/4$. Find the probability of all three.",
        "Three dice are rolled. What is the probability that all of them show the same number?",
        "We are able to show that the series converges. Find what it converges to.",
        "A test has 7 multiple choice and 5 true/false questions. How many questions are there?",
        "For how many integers $n$ is it true that $n^2 < 50$?",
        "A table gives Row 1 & 2 \\hline and as in the figure: \\begin{tabular}{c} 1 \\end{tabular} What comes next?",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_is_kept(problem: str) -> None:
    assert found(problem) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("interactive", "This is an interactive problem. Guess the number."),
        ("many_solutions", "Find such a permutation. If there are multiple answers, print any of them."),
        ("many_solutions", "Return the pairs in any order."),
        ("figure", "The tree is <image> and you cut it."),
        (None, "Cut the tree.\n\nExamples\n\nInput\n1\n\nNote\n\n<image> is the tree of the first example"),
        (None, "Print the number of ways; if there are several paths, print the length of the shortest."),
    ],
)
def test_code_that_no_fixed_test_can_judge(name: str | None, problem: str) -> None:
    hit = first_found(CODE_FILTERS, problem, "")
    assert (hit and hit[0]) == name


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "every", "counts"),
    [
        ("gsm8k_train", 5, {}),
        ("aime_1983_2023", 1, {"figure": 88}),
        ("math_train", 1, {"too_short": 11, "figure": 701, "multiple_choice": 105, "long_answer": 4}),
    ],
)
def test_what_they_take_of_known_data(data_dir: Path, file: str, every: int, counts: dict[str, int]) -> None:
    """Read by eye: of 105 with options one has conditions labelled so, of AIME's 88 with figures none."""
    with gzip.open(data_dir / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][::every]
    assert Counter(name for row in rows if (name := found(row["problem"], row["answer"]))) == counts
