"""Runs of words that texts share."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rlpost.curation.ngrams import (
    Contamination,
    band_keys,
    candidate_groups,
    jaccard,
    runs,
    squeezed,
    words,
    words_and_signs,
)

EVALUATION = "Ten apples cost as much as four pears and one plum; what does a pear cost?"


def test_a_run_of_n_words_gives_a_text_away_and_one_of_n_minus_1_does_not() -> None:
    evaluation = Contamination([("other", "What is the colour of a plum?"), ("apples", EVALUATION)], 9)
    nine = "He said: Ten Apples cost as much, as four *pears* and nothing else"
    assert evaluation.find(nine) == ("apples", "ten apples cost as much as four pears and")
    eight = "He said: Ten Apples cost as much, as four *pears*, nothing else and one plum"
    assert evaluation.find(eight) is None


def test_a_text_of_fewer_words_is_found_when_it_is_the_same() -> None:
    evaluation = Contamination([("short", "Compute $\\cos 60^\\circ$.")], 9)
    assert evaluation.find("compute \\( \\cos 60^\\circ \\)") == ("short", "compute cos 60 circ")
    assert evaluation.find("Compute $\\cos 60^\\circ$ and then a few more things of that kind") is None


def test_a_phrase_of_many_problems_counts_only_in_a_copy() -> None:
    """The phrase has 10 words, hence 2 runs of 9; the evaluation problem has 16 words, hence 8: half of them are 4."""
    phrase = "where m and n are relatively prime positive integers find"
    evaluation = [("aime", f"The ratio is {phrase} the sum mn")]
    texts = [f"Problem {i} asks about {i * i} {phrase} {i}" for i in range(5)]
    strict, lenient = Contamination(evaluation, 9), Contamination(evaluation, 9, max_stock=4)
    copies = [f"Copied {i}: {evaluation[0][1]}" for i in range(5)]
    for text in (*texts, *copies):
        lenient.count(text)
    assert all(strict.find(text) for text in texts)
    assert not any(lenient.find(text) for text in texts)
    assert all((found := lenient.find(text)) and found[0] == "aime" for text in copies)
    rare = Contamination(evaluation, 9, max_stock=4)
    for text in texts[:4]:
        rare.count(text)
    assert rare.find(texts[0]) == ("aime", "where m and n are relatively prime positive integers")


def test_without_evaluation_problems_nothing_is_contaminated() -> None:
    nothing = Contamination([], 9, max_stock=3)
    nothing.count(EVALUATION)
    assert nothing.find(EVALUATION) is None


def test_signs_tell_short_problems_apart_and_layout_does_not() -> None:
    assert words("$2+3$") == words("2 - 3") and words_and_signs("$2+3$") != words_and_signs("2 - 3")
    assert squeezed("Find  $x$ .") == squeezed("find x.") != squeezed("find -x.")


def test_jaccard_by_hand() -> None:
    """a b c d and b c d e share 2 of the 4 runs of two words: ab, bc, cd, de."""
    assert jaccard(runs(list("abcd"), 2), runs(list("bcde"), 2)) == 0.5


def test_pairs_above_the_threshold_share_a_band_and_strangers_rarely_do() -> None:
    """Chains of texts, each with a few words changed; all pairs by brute force. A pair at 0.6 is missed once in 340."""
    draw = random.Random(0)
    texts = []
    for _ in range(40):
        text = [f"w{draw.randrange(10**6)}" for _ in range(60)]
        for _ in range(4):
            texts.append(text)
            text = list(text)
            text[draw.randrange(60)] = "changed"
    hashes = [runs(text, 5) for text in texts]
    groups = candidate_groups(np.stack([band_keys(own) for own in hashes]))
    met = {(i, j) for i in range(len(texts)) for j in range(i) if set(groups.get(i, ())) & set(groups.get(j, ()))}
    shares = {(i, j): jaccard(hashes[i], hashes[j]) for i in range(len(texts)) for j in range(i)}
    similar = {pair for pair, share in shares.items() if share >= 0.6}
    assert len(similar) > 150 and len(similar - met) <= 2
    assert not {pair for pair in met if shares[pair] < 0.05}


@pytest.mark.data
def test_evaluation_problems_planted_in_real_training_data_are_found(data_dir: Path) -> None:
    def read(name: str) -> list[str]:
        with gzip.open(data_dir / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            return [json.loads(line)["problem"] for line in lines]

    test, train = read("gsm8k_test"), read("gsm8k_train")[:1000]
    evaluation = Contamination([(str(i), text) for i, text in enumerate(test)], 9, max_stock=10)
    # A sentence before it, and the copy cut off: as collections of problems have them.
    planted = [f"Question {i}. {' '.join(text.upper().split()[:30])}" for i, text in enumerate(test[::10])]
    for text in (*train, *planted):
        evaluation.count(text)
    assert all(evaluation.find(text) for text in planted)
    assert sum(evaluation.find(text) is not None for text in train) <= 10


def test_runs_are_those_of_the_text() -> None:
    tokens = words(EVALUATION)
    pairs = set(pairwise(tokens))
    assert len(runs(tokens, 2)) == len(pairs) and len(runs(tokens, 99)) == 1
