"""An answer taken apart: a tree of `grammar`, and the unit, currency or words beside it. It decides nothing."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from reward.child.grammar import parse
from reward.child.notation import canonical, join_thousands, trim, unbox, unwrapped
from reward.child.special import based_numeral
from reward.child.tables import FUNCTIONS, MULTIPLIERS, NEGATIONS, PERCENT_WORDS
from reward.child.tree import Node, Unreadable, number
from reward.child.units import known_unit, looks_like_a_word
from reward.child.wording import as_words, fraction_from_words, number_from_words

_TRAILING_WORD = re.compile(
    r"(?:\\text\s*\{([^{}]*)\}|(?<![A-Za-z\\_])([A-Za-z][A-Za-z'-]*(?:/[A-Za-z]+)?))\s*(?:\^\s*(?:\{\s*([23])\s*\}|([23])))?\s*[.,]?$"
)
_LEAD = re.compile(
    r"^(?:(?:so|thus|hence|therefore)[,\s]+)?(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|result|value|solution)s?(?:\s+is|\s+are|\s*[:=])+\s*"
    r"|^(?:approximately|approx\.?|about|roughly|exactly|nearly|around|is|equals?|a total of)\s+",
    re.IGNORECASE,
)
_TEXT_LEAD = re.compile(r"^\\text\s*\{([^{}]*)\}\s*(?=[^\s.,;:^_])")
# "42 (since 6 * 7 = 42)": an answer and, in parentheses, words about it.
_EXPLAINED = re.compile(r"(.*[^\s(,]),?\s*(?:\\text\s*\{\s*)?\((?:\\text\s*\{)?[^()]*[A-Za-z]{3}[^()]*\)\s*\}?")
_AFTER_A_WORD = re.compile(r"[A-Za-z]{4}\s+\Z")
_TEMPERATURE = re.compile(r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\text\s*\{\s*)?([CF])\s*\}?$")
_CURRENCY = re.compile(
    r"\\(dollar|euro|pound|yen|rupee|cents)(?![a-zA-Z])\s*|(?<![A-Za-z\\])(?:US\s*)?\$(?=\s*[\d.(-])"
    r"|(?<![A-Za-z\\])(?:USD|(EUR)|(Rs)\.?|(INR))\s*(?=\d)"
)
_COMPOUND_PART = re.compile(r"\s*(?:,|and)?\s*(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]{1,12})(?![a-z])")
_PARAMETER = re.compile(
    r",?\s*\(?(?:\\text\s*\{\s*(?:where|for|with)?(?: all| any| some)?\s*\}|where|for(?: all| any)?)?\s*(?:"
    r"([a-z])\s*\\in\s*\\mathbb\s*\{[ZN]\}|([a-z])\s*(?:\\text\s*\{)?\s*is an integer\}?)\)?$"
)
_KEPT = re.compile(r"(?:or|and|in|e|i|pi|inf|infinity|oo|infty)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """An answer taken apart.

    Attributes:
        plain: the text in one notation without spaces, for comparison as text.
        words: the text as lower-case words, if it has no mathematics.
        node: the tree, if all of it is mathematics but a unit.
        unit: the words beside the tree.
        dimension, factor: of a known unit; factor converts to the dimension's base unit.
        parameter: the symbol that ", k in Z" after the answer lets run over the integers.
    """

    plain: str
    words: str | None = None
    node: Node | None = None
    unit: str = ""
    dimension: str | None = None
    factor: Fraction = Fraction(1)
    parameter: str | None = None


@functools.lru_cache(maxsize=8)
def read(raw: str) -> Reading:
    text = canonical(unbox(raw)).strip()
    text = trim(text)
    # Space between two digits or letters has a meaning (a mixed number, two words); elsewhere it has none.
    plain = unwrapped(text).replace("$", "").replace("\\dollar ", "")
    plain = re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", plain)
    if match := _PARAMETER.search(text):
        node = _parsed(trim(text[: match.start()]))
        if node is not None:
            return Reading(plain=plain, node=node, parameter=match[1] or match[2])
    bare = _LEAD.sub("", trim(unwrapped(text)))
    if (words := as_words(bare)) is not None:
        value = number_from_words(words)
        if value is None and (fraction := fraction_from_words(words)) is not None:
            return Reading(plain=plain, node=Node("num", (), (fraction, "words")))
        if value is not None:
            return Reading(plain=plain, node=number(str(value)))
        first, _, rest = words.partition(" ")
        if rest and (value := number_from_words(first)) is not None:
            return Reading(plain=plain, words=words, node=number(str(value)), unit=rest)
        source = text if bare == trim(unwrapped(text)) else bare
        node = _parsed(source) if len(words.replace(" ", "")) <= 4 or " " not in words else None
        return Reading(plain=plain, words=words, node=node)
    if (compound := _compound(bare)) is not None:
        dimension, value = compound
        return Reading(plain=plain, node=Node("num", (), (value, "compound")), unit=dimension, dimension=dimension)
    if (numeral := based_numeral(bare)) is not None:
        return Reading(plain=plain, node=numeral)
    return _read_quantity(text, plain)


def _compound(text: str) -> tuple[str, Fraction] | None:
    """(dimension, value in its base unit) of "2 hours and 30 minutes" or "2h 30min"."""
    parts = _COMPOUND_PART.findall(text.lower())
    if len(parts) < 2 or _COMPOUND_PART.sub("", text.lower()).strip():
        return None
    found = [(known_unit(unit), Fraction(count)) for count, unit in parts]
    dimensions = {dimension for (dimension, _), _ in found}
    if len(dimensions) != 1 or None in dimensions:
        return None
    return str(dimensions.pop()), sum((factor * count for (_, factor), count in found), Fraction(0))


def _read_quantity(text: str, plain: str) -> Reading:
    """Mathematics with, perhaps, currency before it and a unit, a multiplier or an explanation after it."""
    text = _TEMPERATURE.sub(lambda m: " \\text{" + ("celsius" if m[1] == "C" else "fahrenheit") + "}", text)
    text, currency = _without_currency(text)
    text = _without_lead(text)
    ending = _TRAILING_WORD.search(text)
    has_unit = (
        ending is not None
        and ending.start()
        and len(ending[2] or "") > 1
        and known_unit(ending[2].lower())[0] is not None
    )
    if not has_unit and (node := _expression(text)) is not None:
        return _with_unit(plain, node, currency)
    if (match := _EXPLAINED.fullmatch(text)) and (node := _expression(match[1])) is not None:
        return _with_unit(plain, node, currency)
    stripped = _without_unit(text)
    if stripped is None:
        return Reading(plain=plain)
    text, unit, multiplier = stripped
    node = _expression(trim(text))
    if node is None:
        return Reading(plain=plain)
    if multiplier != 1:
        node = Node("mul", (node, number(str(multiplier))))
    return _with_unit(plain, node, unit or currency)


def _without_currency(text: str) -> tuple[str, str]:
    """The text without signs of money, and the name of the first one. A `$` on both sides is not money."""
    found = [match[match.lastindex] if match.lastindex else "dollar" for match in _CURRENCY.finditer(text)]
    if text.count("$") == 2 and "\\" not in text:
        found = []
    text = _CURRENCY.sub(" ", text) if found else text
    return trim(text.replace("$", " ")), found[0].lower() if found else ""


def _without_lead(text: str) -> str:
    """The text without "the answer is", "approximately", `\\text{Area: }` and the like before it."""
    text = trim(_LEAD.sub("", text))
    lead = _TEXT_LEAD.match(text)
    if lead is None or NEGATIONS & set(lead[1].lower().split()) or not re.fullmatch(r"[A-Za-z ,.:'-]*", lead[1]):
        return text
    rest = text[lead.end() :]
    return text if re.match(r"[=<>\\]", rest) else rest


def _without_unit(text: str) -> tuple[str, str, int] | None:
    """(the text before its trailing words, those words, the multiplier among them); None for words that deny or bound."""
    words: list[str] = []
    multiplier = 1
    for _ in range(12):
        match = _TRAILING_WORD.search(text)
        if match is None or not match.start():
            break
        word = (match[1] if match[1] is not None else match[2]).lower().strip(" .,()")
        if match[2] and not _is_unit_word(word, bool(words) or bool(_AFTER_A_WORD.search(text[: match.start()]))):
            break
        if NEGATIONS & set(word.split()) and word not in ("to", "from"):
            return None
        text = text[: match.start()].rstrip(" ,(")
        exponent = match[3] or match[4]
        pieces = ["percent"] if word == "per cent" else word.replace("-", " ").split()
        for place, piece in reversed(list(enumerate(pieces))):
            factor = None if words else MULTIPLIERS.get(piece) or MULTIPLIERS.get(piece.removesuffix("s"))
            if factor is not None:
                multiplier *= factor
            else:
                words.insert(0, f"{piece}^{exponent}" if exponent and place == len(pieces) - 1 else piece)
    if text.count("(") > text.count(")") and "]" not in text:
        text = re.sub(r"\((?=[^()]*$)", "", text)
    return text, " ".join(words), multiplier


def _is_unit_word(word: str, beside_words: bool) -> bool:
    if _KEPT.match(word) or (word in FUNCTIONS and known_unit(word)[0] is None):
        return False
    return looks_like_a_word(word) or (beside_words and len(word) > 1)


def _with_unit(plain: str, node: Node, unit: str) -> Reading:
    if unit in PERCENT_WORDS:
        return Reading(plain=plain, node=Node("percent", (node,)))
    dimension, factor = known_unit(unit)
    return Reading(plain=plain, node=node, unit=unit, dimension=dimension, factor=factor)


# "]0, 1[" is how "(0, 1)" is written in some countries; "0.666..." is 2/3, and "3.14159..." is a decimal.
_TURNED_BRACKETS = re.compile(r"^([\[\]])([^()\[\]]*,[^()\[\]]*)([\[\]])$")
_ENDLESS = re.compile(r"(?<![\d.])(\d*\.\d*?)(\d{1,6}?)(\2+)(?:\\ldots|\.\.\.)|(?<![\d.])(\d*\.\d+)(?:\\ldots|\.\.\.)")


def _with_period(match: re.Match[str]) -> str:
    return match[4] if match[4] else f"{match[1]}\\overline{{{match[2]}}}"


def _parsed(text: str) -> Node | None:
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup ", text)
    text = _TURNED_BRACKETS.sub(lambda m: ("(" if m[1] == "]" else "[") + m[2] + (")" if m[3] == "[" else "]"), text)
    text = _ENDLESS.sub(_with_period, text)
    if text.replace(" ", "") == "{}":
        return Node("set")
    try:
        return parse(join_thousands(text))
    except Unreadable:
        return None


def _expression(text: str) -> Node | None:
    """The tree of a text that is not words."""
    node = _parsed(text)
    return None if node is not None and node.head == "phrase" else node
