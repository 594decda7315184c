"""What a response can earn beside being right. Each part is a number of its own, so that a rising reward can be told from
rising accuracy; the reward is their weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def thinking_format(response: str) -> float:
    r"""1 for exactly one "\n</think>\n", else 0. Tina's format reward (https://arxiv.org/abs/2504.15777)."""
    return float(response.count("\n</think>\n") == 1)


def cosine_length(
    num_tokens: int,
    *,
    correct: bool,
    max_tokens: int,
    correct_range: tuple[float, float],
    wrong_range: tuple[float, float],
) -> float:
    """Falls along half a cosine from the first value of the range, at no tokens, to the second, at `max_tokens`.

    "Demystifying Long Chain-of-Thought Reasoning in LLMs", section 4 (https://arxiv.org/abs/2502.03373). Length is in
    tokens and ends at `max_tokens`, so that it never wraps.
    """
    start, end = correct_range if correct else wrong_range
    return end + (start - end) * (1 + math.cos(math.pi * min(num_tokens / max_tokens, 1.0))) / 2


def overlong(num_tokens: int, *, max_tokens: int, buffer_tokens: int) -> float:
    """0 until the last `buffer_tokens` before `max_tokens`, then falling linearly to -1.

    "DAPO", eq. 13, soft overlong punishment (https://arxiv.org/abs/2503.14476).
    """
    over = num_tokens - (max_tokens - buffer_tokens)
    return -min(max(over / buffer_tokens, 0.0), 1.0)


def repetition(response: str, *, ngram_words: int) -> float:
    """Minus the share of word n-grams that have occurred before in the response: 0 when all differ, towards -1 in a loop.

    "Demystifying Long Chain-of-Thought Reasoning in LLMs", section 5.2 (https://arxiv.org/abs/2502.03373), as a share of the
    whole response instead of a penalty per token.
    """
    words = response.lower().split()
    ngrams = [tuple(words[i : i + ngram_words]) for i in range(len(words) - ngram_words + 1)]
    return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0


def shape(
    parts: Mapping[str, float], response: str, *, num_tokens: int, table: Mapping[str, Any]
) -> tuple[float, dict[str, float]]:
    """The reward of a judged response, and all its parts, those of the verdict included.

    Args:
        parts: of the verdict; has "accuracy" and "format".
        num_tokens: response tokens.
        table: the recipe's [stage.reward] (`rlpost.config.RewardConfig`) and its "max_tokens".
    """
    found = dict(parts)
    weights: dict[str, float] = {name: table[name] for name in ("accuracy", "format")}
    if table["thinking_format"]:
        weights["thinking_format"], found["thinking_format"] = table["thinking_format"], thinking_format(response)
    if cosine := table["cosine_length"]:
        weights["cosine_length"] = cosine["weight"]
        found["cosine_length"] = cosine_length(
            num_tokens,
            correct=parts["accuracy"] == 1.0,
            max_tokens=table["max_tokens"],
            correct_range=cosine["correct"],
            wrong_range=cosine["wrong"],
        )
    if soft := table["overlong"]:
        weights["overlong"] = soft["weight"]
        found["overlong"] = overlong(num_tokens, max_tokens=table["max_tokens"], buffer_tokens=soft["buffer_tokens"])
    if repeated := table["repetition"]:
        weights["repetition"] = repeated["weight"]
        found["repetition"] = repetition(response, ngram_words=repeated["ngram_words"])
    return sum(weight * found[name] for name, weight in weights.items()), found
