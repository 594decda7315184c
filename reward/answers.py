"""Final answers of math responses: where they are stated, and which are the same for certain. No evaluation of text.

Everything here runs in the trusted process on hostile text, so every step is linear in its length or works on a bounded
piece of it.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 1000
"""Longer "answers" are not answers; nothing downstream sees them."""
_MAX_NUMBER_CHARS = 100
_TAIL_CHARS = 4000
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASH = re.compile(r"^[ \t]*####[ \t]*([^\n]*)", re.MULTILINE)
_TAG = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_PHRASE = re.compile(r"\banswer\b[^\S\n]{0,3}(?:is|:|=)[^\S\n]{0,3}:?([^\n]*)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)")
_HEDGE = re.compile(r"[\s$,.]*(?:\\text\{)?\s*or\b[\s}$]*\Z", re.IGNORECASE)

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_REMOVED = re.compile(
    r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\\[!,;: ]|~|\\\$|\$|\^\{?\\circ\}?|\\\(|\\\)|\\\[|\\\]"
)
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")
_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}|(-?\d+)/(\d+)")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z \-']*")


def final_answer(response: str) -> str | None:
    """The last stated final answer, or None if the response states none.

    The last `\\boxed{}` decides; without a box an <answer> tag, then "#### ...", then "answer is ...". Only what follows
    a thinking part counts, and a thinking part that never ends has no answer. A last box that is cut off, empty, too
    long, or one of two joined by "or" is not an answer either.
    """
    before, end, after = response.rpartition("</think>")
    text = after if end else before + after
    if not end and "<think>" in response:
        return None
    opening = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    answer = _last_box(text, opening) if opening >= 0 else _stated(text[-_TAIL_CHARS:])
    answer = answer.strip() if answer else ""
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def _last_box(text: str, opening: int) -> str | None:
    box = _BOX.match(text, opening)
    if box is None:
        return None
    answer = _box_content(text, box.end())
    before = text[max(0, opening - MAX_ANSWER_CHARS) : opening]
    if answer is not None and _HEDGE.search(before[-40:]):
        other = _BOX.search(before)
        while other is not None and (later := _BOX.search(before, other.end())) is not None:
            other = later
        if other is not None and _box_content(before, other.end()) not in (None, answer):
            return None
    return answer


def _box_content(text: str, start: int) -> str | None:
    """What stands in the braces that open at `start`, balanced; or the one token there without braces."""
    if text[start : start + 1] != "{":
        bare = re.compile(r"[^\s$\\{}.,;]+").match(text, start)
        return bare[0] if bare else None
    depth = 0
    for brace in _BRACE.finditer(text, start, start + MAX_ANSWER_CHARS + 2):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()]
    return None


def _stated(text: str) -> str | None:
    for pattern in (_TAG, _HASH, _PHRASE):
        if found := pattern.findall(text):
            answer: str = found[-1]
            if pattern is _PHRASE and (stop := _SENTENCE_END.search(answer)):
                answer = answer[: stop.start()]
            return answer.strip().strip("*_ ")
    return None


def normalize(answer: str) -> str:
    """The answer without what never changes its value: delimiters, spacing, text wrappers, a full stop at the end."""
    answer = _TEXT.sub(r"\1", answer.strip())
    answer = answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\u2212", "-").replace("{,}", ",")
    answer = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", _REMOVED.sub("", answer))
    # Space between two digits has a meaning (a mixed number, a list); elsewhere it has none.
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer.strip())
    return answer[:-1] if answer.endswith(".") else answer


def exact_number(text: str) -> Fraction | None:
    """The value of a plainly written number, already normalized: integer, decimal, fraction; None for anything else."""
    if len(text) > _MAX_NUMBER_CHARS or not text.isascii():
        return None
    if match := _FRACTION.fullmatch(text):
        sign = -1 if match[1] else 1
        numerator, denominator = int(match[2] or match[4]), int(match[3] or match[5])
        return sign * Fraction(numerator, denominator) if denominator else None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return Fraction(text) if _DECIMAL.fullmatch(text) else None


def same_for_certain(gold: str, answer: str) -> bool | None:
    """True or False where plain comparison decides it, None where mathematics is needed. Symmetric.

    Two plainly written numbers are equal or they are not, in exact arithmetic, up to one freedom: next to a number
    without a percent sign, 50% is 1/2 and is also 50, because problems that ask "what percentage" are answered both ways.
    """
    left, right = normalize(gold), normalize(answer)
    if left == right:
        return True
    left_bare, right_bare = left.removesuffix("%").removesuffix("\\"), right.removesuffix("%").removesuffix("\\")
    left_value, right_value = exact_number(left_bare), exact_number(right_bare)
    if left_value is None or right_value is None:
        both_words = _WORDS.fullmatch(left) and _WORDS.fullmatch(right)
        return True if both_words and left.casefold() == right.casefold() and len(left) > 3 else None
    if (left_bare == left) == (right_bare == right):
        return _equal_or_close(left_value, right_value)
    percent, plain = (right_value, left_value) if left_bare == left else (left_value, right_value)
    return plain in (percent, percent / 100)


def _equal_or_close(left: Fraction, right: Fraction) -> bool | None:
    """None for numbers so close that one may be a rounding of the other: how close is enough is math-verify's to say."""
    if left != right and abs(left - right) * 10_000 <= max(abs(left), abs(right)):
        return None
    return left == right


def unwrap_equation(answer: str, other: str) -> str:
    """`x = 5` as `5` next to an answer without an equals sign; for other equations the text itself.

    Done to both sides before math-verify, which unwraps in one direction only. The left side must be a name, a function
    of a name, or free of names: "2x + z = 1" does not state that something is 1.
    """
    if "=" in other or answer.count("=") < 1 or re.search(r"[<>!]=|\\[lgn]eq?\b|\\neq", answer):
        return answer
    left = answer.partition("=")[0].strip(" $")
    value = answer.rpartition("=")[2].strip()
    named = re.fullmatch(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\s*\([A-Za-z, ]*\))?", left)
    numeric = not re.search(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+", "", left)) and re.search(r"\d", left)
    return value if value and (named or numeric) else answer
