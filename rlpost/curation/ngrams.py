"""Texts that share runs of words: with evaluation sets, and with each other.

A run of n words is its 64-bit hash; a text of fewer words is one run, so that it is found when it is the same from end to end.
Two different runs share a hash once in 2^64 pairs: for 60 million runs against a million, one chance in 300,000 of a single
false hit.

S runs of one text, N texts, B bands.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_WORD = re.compile(r"[^\W_]+")
_WORD_OR_SIGN = re.compile(r"[^\W_]+|[^\w\s$.,;:?!]")
NUM_BANDS, NUM_ROWS = 24, 3


def words(text: str) -> list[str]:
    """Letters and digits in lower case; whatever stands between them counts for nothing."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def words_and_signs(text: str) -> list[str]:
    """As `words`, and every sign but punctuation and $: x + 1 and x - 1 are different."""
    return _WORD_OR_SIGN.findall(unicodedata.normalize("NFKC", text).lower())


def squeezed(text: str) -> int:
    """Hash of the text in lower case without white space and $: equal for texts that differ in layout alone."""
    return _hash("".join(unicodedata.normalize("NFKC", text).lower().replace("$", "").split()))


def runs(tokens: Sequence[str], n: int) -> Hashes:
    """Hashes of the distinct runs of n tokens, sorted: hashes_S."""
    last = max(len(tokens) - n, 0)
    grams = {_run_hash(tokens, i, n) for i in range(last + 1)}
    return np.sort(np.fromiter(grams, np.uint64, len(grams)))


def _run_hash(tokens: Sequence[str], start: int, n: int) -> int:
    return _hash(" ".join(tokens[start : start + n]))


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))


class Contamination:
    """Which evaluation problem shares a run of n words with a text.

    Competitions have phrases of their own ("m and n are relatively prime positive integers, find m + n" is in a quarter of
    AIME), which say nothing about who has seen what. A run that more than `max_stock` texts hold is such a phrase: it counts
    only where a text holds half the runs of one evaluation problem, as copies do, however many there are.

    Args:
        texts: id and text of every evaluation problem.
        max_stock: 0: no run is a phrase.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], n: int, *, max_stock: int = 0) -> None:
        self.n, self.max_stock = n, max_stock
        self.ids: list[str] = []
        hashes: list[Hashes] = [np.empty(0, np.uint64)]
        for name, text in texts:
            self.ids.append(name)
            hashes.append(runs(words(text), n))
        self._sizes = np.array([len(own) for own in hashes[1:]], np.int64)
        everything, owners = np.concatenate(hashes), np.repeat(np.arange(len(self.ids), dtype=np.uint32), self._sizes)
        order = np.argsort(everything, kind="stable")
        self._hashes, self._owners = everything[order], owners[order]
        self._num_texts = np.zeros(len(everything) + 1, np.uint32)
        """Of a run's first place: in how many texts it was counted. The last place is for runs after all of these."""

    def count(self, text: str) -> None:
        """Take note of a text's runs. Every text must be counted before the first is asked about."""
        first, last = self._places(runs(words(text), self.n))
        self._num_texts[first[last > first]] += 1

    def find(self, text: str) -> tuple[str, str] | None:
        """Id of an evaluation problem, and the first run of words that gives it away; None where there is none."""
        tokens = words(text)
        own = runs(tokens, self.n)
        first, last = self._places(own)
        shared = last > first
        if not shared.any():
            return None
        counts = shared & (self._num_texts[first] <= self.max_stock) if self.max_stock else shared
        if not counts.any():
            owners = np.concatenate([self._owners[a:b] for a, b in zip(first, last, strict=True)])
            num_shared = np.bincount(owners, minlength=len(self.ids))
            copied = 2 * num_shared >= self._sizes
            copied &= num_shared > 0
            if not copied.any():
                return None
            return self.ids[int(np.flatnonzero(copied)[0])], " ".join(tokens)[:200]
        owner_of = dict(zip(own[counts].tolist(), self._owners[first[counts]].tolist(), strict=True))
        start = next(i for i in range(len(tokens)) if _run_hash(tokens, i, self.n) in owner_of)
        return self.ids[owner_of[_run_hash(tokens, start, self.n)]], " ".join(tokens[start : start + self.n])

    def _places(self, own_S: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.searchsorted(self._hashes, own_S), np.searchsorted(self._hashes, own_S, side="right")


def jaccard(first_S: Hashes, second_S: Hashes) -> float:
    """Share of the runs of either text that are runs of both."""
    shared = len(np.intersect1d(first_S, second_S, assume_unique=True))
    return shared / (len(first_S) + len(second_S) - shared)


def band_keys(hashes_S: Hashes) -> Hashes:
    """MinHash signature of a text, folded into bands: keys_B.

    Two texts of Jaccard similarity J share a key of one band with probability J^r, so they share none of b with
    (1 - J^r)^b: at r = 3, b = 24 once in 24,000 for J = 0.7, once in 340 for 0.6, and for J = 0.2 five times of six
    ("Mining of Massive Datasets", 3.4.2; "On the resemblance and containment of documents", Broder 1997).
    """
    # Multiplying by an odd number and shifting the halves together is a cheap member of a family of mixing functions.
    mixed_RS = hashes_S[None] * _FACTORS_R[:, None]
    mixed_RS ^= mixed_RS >> np.uint64(32)
    mixed_RS *= _MIX
    smallest_BR = mixed_RS.min(axis=1).reshape(NUM_BANDS, NUM_ROWS)
    return np.array([xxhash.xxh3_64_intdigest(row.tobytes(), seed=b) for b, row in enumerate(smallest_BR)], np.uint64)


# Raw draws: NumPy guarantees these from one version to the next, and no others (NEP 19).
_FACTORS_R = np.random.PCG64(0).random_raw(NUM_BANDS * NUM_ROWS) | np.uint64(1)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def candidate_groups(keys_NB: Hashes) -> dict[int, list[int]]:
    """Of each text that shares a key with another one, the groups of texts it shares keys with, as numbers."""
    groups: dict[int, list[int]] = {}
    for band in range(keys_NB.shape[1]):
        _, inverse, counts = np.unique(keys_NB[:, band], return_inverse=True, return_counts=True)
        for text in np.flatnonzero(counts[inverse] > 1):
            groups.setdefault(int(text), []).append(int(inverse[text]) * keys_NB.shape[1] + band)
    return groups
