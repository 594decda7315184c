"""The tokens of an answer: numbers, names, commands, symbols, and what ordinary words among them mean."""

from __future__ import annotations

import re
from typing import NamedTuple

from reward.child.tables import ASCII_FUNCTIONS, CONSTANTS, FUNCTIONS, GREEK

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<repeating>\d*\.\d*(?:\\overline\s*\{\d+\}|\\bar\s*\{\d+\}|\\dot\s*\{\d\}|\(\d+\)))
    |(?P<number>\d+\.\d+|\d+|\.\d+)
    |\\text\s*\{(?P<text>[^{}]*)\}
    |\\mathbb\s*\{(?P<field>[A-Z])\}
    |\\(?:begin|end)\s*\{(?P<env>[a-z]+)\*?\}
    |(?P<command>\\[a-zA-Z]+|\\.)
    |(?P<word>[A-Za-z]+)
    |(?P<symbol>\*\*|<=|>=|!=|==|<|>|.)""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    kind: str
    text: str
    spaced: bool


def tokenize(text: str, depth: int = 0) -> list[Token]:
    tokens: list[Token] = []
    spaced = False
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind == "space":
            spaced = True
            continue
        value = match[kind]
        if kind == "text":
            tokens += _text_tokens(value, depth)
        elif kind == "env":
            tokens.append(Token(kind, "\\begin" if match[0].startswith("\\begin") else "\\end", spaced))
            tokens.append(Token("envname", value, False))
        elif kind == "word":
            tokens += _word_tokens(value, spaced)
        else:
            tokens.append(Token(kind, value, spaced))
        spaced = False
    return tokens


def _text_tokens(text: str, depth: int) -> list[Token]:
    words = text.strip(" .:").lower()
    if words in ("or", "and", ", and", ", or", "and/or"):
        return [Token("symbol", words.split()[-1].partition("/")[0], True)]
    if words in ("", "i.e", "so", "only"):
        return []
    if words == "in":
        return [Token("symbol", "in", True)]
    if depth == 0 and re.search(r"\d", text) and not re.search(r"[A-Za-z]{3}", text):
        return tokenize(text, 1)
    if words in ("e", "i", "pi"):
        return [Token("name", words, True)]
    if not words.isascii() or not re.search(r"[a-zA-Z]", words):
        return tokenize(text, 1) if depth == 0 else []
    return [Token("phrase", " ".join(text.lower().split()).strip(" .:"), True)]


def _word_tokens(word: str, spaced: bool) -> list[Token]:
    if word in ("or", "and", "in"):
        return [Token("symbol", word, spaced)]
    if word in CONSTANTS or word in GREEK or word in FUNCTIONS or word in ASCII_FUNCTIONS:
        return [Token("name", word, spaced)]
    if word.lower() in ("inf", "infinity"):
        return [Token("name", "inf", spaced)]
    if len(word) > 1 and word.isupper():
        return [Token("name", word, spaced)]
    for name in sorted(ASCII_FUNCTIONS.keys() | FUNCTIONS, key=len, reverse=True):
        if len(name) > 2 and word.endswith(name) and 0 < len(word) - len(name) <= 2:
            return [*_letters(word[: -len(name)], spaced), Token("name", name, False)]
        if len(name) > 2 and word.startswith(name) and len(word) - len(name) == 1:
            return [Token("name", name, spaced), *_letters(word[len(name) :], False)]
    if word.endswith("pi") and len(word) <= 4:
        return [*_letters(word[:-2], spaced), Token("name", "pi", False)]
    if word.startswith("pi") and len(word) <= 4:
        return [Token("name", "pi", spaced), *_letters(word[2:], False)]
    if len(word) > 4:
        return [Token("phrase", word.lower(), spaced)]
    return _letters(word, spaced)


def _letters(word: str, spaced: bool) -> list[Token]:
    return [Token("name", letter, spaced and index == 0) for index, letter in enumerate(word)]
