"""Answers in words: when a text is words alone, what counts as the same words, and the numbers that words name."""

from __future__ import annotations

import re
from fractions import Fraction

from reward.child.tables import MULTIPLIERS, NUMBER_WORDS, PARTS, SAME_WORDS, SHORT_NAMES


def as_words(text: str) -> str | None:
    """The text as lower-case words without articles and punctuation; None if it is not words alone."""
    if not re.fullmatch(
        r"[^\W\d_]+(?:(?:[ .:!?'\"&]+|(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})| \(|\) )[^\W\d_]+)*[ .!?'\")]*", text.strip()
    ):
        return None
    labels = re.findall(r"\w+", text)
    if len(labels) > 1 and all(label in ("and", "or") or (label.isupper() and len(label) <= 4) for label in labels):
        return None  # "A and C" is a list
    if re.fullmatch(r"\W*\w\s*!\W*", text):
        return None  # "n!" is a factorial
    words = re.sub(r"[^\w ]", "", text.replace("-", " ").replace("/", " ")).casefold().split()
    while len(words) > 1 and words[0] in ("the", "a", "an"):
        words = words[1:]
    return " ".join(words) or None


def word_key(words: str) -> str:
    """One key for different words of one meaning."""
    words = SAME_WORDS.get(words, words)
    if words in SHORT_NAMES:
        return SHORT_NAMES[words]
    pieces = [str(value) if (value := NUMBER_WORDS.get(word)) is not None else word for word in words.split()]
    return " ".join(
        piece.removesuffix("s") if len(piece) > 3 and not piece.endswith("ss") else piece for piece in pieces
    )


def number_from_words(words: str) -> int | None:
    """The integer that words such as "forty two" or "three hundred and five" name, None if they name none."""
    total, group, seen = 0, 0, False
    sign = 1
    pieces = words.split()
    if pieces and pieces[0] in ("minus", "negative"):
        sign, pieces = -1, pieces[1:]
    for word in pieces:
        if word == "and" and seen:
            continue
        if word in NUMBER_WORDS:
            value = NUMBER_WORDS[word]
            if group % 100 and not (group % 10 == 0 and group % 100 >= 20 and value < 10):
                return None
            group += value
        elif word == "hundred":
            group = (group or 1) * 100
        elif word in MULTIPLIERS:
            total += (group or 1) * MULTIPLIERS[word]
            group = 0
        else:
            return None
        seen = True
    return sign * (total + group) if seen else None


def fraction_from_words(words: str) -> Fraction | None:
    """The value of "half", "one third", "three quarters", None for other words."""
    count, _, part = words.rpartition(" ")
    below = PARTS.get(part.replace("halves", "half").removesuffix("s"))
    above = number_from_words(count) if count else 1 if part == "half" else None
    return Fraction(above, below) if above is not None and below is not None else None
