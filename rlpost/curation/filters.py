"""Problems that their text gives away: what a verifier of final answers cannot judge, or a reader cannot answer.

Each filter would rather keep a problem than leave out a good one; docs/curation.md says what each takes of known data sets.
The list is that of AceReason-Nemotron (https://arxiv.org/abs/2505.16400, its sections on data).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFilter:
    """One reason to leave a problem out."""

    name: str
    definition: str
    """For the data card: what it leaves out."""
    find: Callable[[str, str], str | None]
    """From problem and answer ("" for code) to what gives the problem away; None keeps it."""


def math_filters(*, min_words: int, max_answer_chars: int, max_foreign: float) -> tuple[TextFilter, ...]:
    """Those of math, in the order in which they are asked."""
    return (
        TextFilter(
            name="too_short",
            definition=f"the problem has fewer than {min_words} words, counting numbers and LaTeX commands",
            find=lambda problem, answer: too_short(problem, min_words),
        ),
        TextFilter(
            name="not_english",
            definition=f"more than {max_foreign:.0%} of its letters are neither Latin nor Greek, or 12 words and more"
            " hold none of the commonest English ones",
            find=lambda problem, answer: not_english(problem, max_foreign),
        ),
        TextFilter(
            name="figure",
            definition="it needs a figure: it draws one (Asymptote, TikZ), holds an image, or points to what is shown",
            find=lambda problem, answer: figure(problem),
        ),
        TextFilter(
            name="multiple_choice",
            definition="it offers options labelled A, B and C",
            find=lambda problem, answer: multiple_choice(problem),
        ),
        TextFilter(
            name="true_false",
            definition="it asks whether something is true, or its answer is true, false, yes or no: a guess is right half"
            " the time",
            find=true_false,
        ),
        TextFilter(
            name="proof",
            definition="it asks for a proof, which a final answer cannot show",
            find=lambda problem, answer: proof(problem),
        ),
        TextFilter(
            name="multi_part",
            definition="two labelled parts, (a) and (b), (i) and (ii), (1) and (2) or Part 1 and Part 2, each ask something",
            find=lambda problem, answer: multi_part(problem),
        ),
        TextFilter(
            name="long_answer",
            definition=f"the answer is longer than {max_answer_chars} characters or has more than {MAX_PROSE_WORDS} words of"
            " prose",
            find=lambda problem, answer: long_answer(answer, max_answer_chars),
        ),
    )


CODE_FILTERS = (
    TextFilter(
        name="interactive",
        definition="the program is to talk with a judge, for which tests have no other side",
        find=lambda problem, answer: interactive(problem),
    ),
    TextFilter(
        name="many_solutions",
        definition="more than one output is right, and tests know one",
        find=lambda problem, answer: many_solutions(problem),
    ),
    TextFilter(
        name="figure",
        definition="it needs a figure: before its examples it holds an image or points to what is shown",
        find=lambda problem, answer: figure(_EXAMPLES.split(problem)[0]),
    ),
)


def _any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE | re.MULTILINE | re.DOTALL)


MAX_PROSE_WORDS = 5
_WORD = re.compile(r"[^\W_]+")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_MATH = _any_of(r"\$\$.*?\$\$", r"\$.*?\$", r"\\\[.*?\\\]", r"\\\(.*?\\\)")
_DRAWING = _any_of(r"\[asy\].*?\[/asy\]")
_OUR_SCRIPTS = ("LATIN", "GREEK", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "FULLWIDTH LATIN")
_ENGLISH = _any_of(
    r"\b(?:and|are|as|be|each|find|for|from|given|has|have|her|his|how|if|is|its|let|many|more|much|of|one|she|than|that|the)\b",
    r"\b(?:their|then|there|they|to|was|what|when|where|which|with|compute|determine|evaluate|simplify|solve|express)\b",
)
"""The commonest words that are not words of other languages as well, which would prove nothing."""


def too_short(problem: str, min_words: int) -> str | None:
    count = len(_WORD.findall(problem))
    return f"{count} words" if count < min_words else None


def not_english(problem: str, max_foreign: float) -> str | None:
    if not problem.isascii():
        letters = [character for character in problem if character.isalpha()]
        foreign = [x for x in letters if not x.isascii() and not unicodedata.name(x, "").startswith(_OUR_SCRIPTS)]
        if len(foreign) > max_foreign * len(letters):
            return f"{len(foreign)} of {len(letters)} letters, as in {''.join(foreign[:20])!r}"
    prose = _prose(_MATH.sub(" ", problem))
    return " ".join(prose[:8]) if len(prose) >= 12 and not _ENGLISH.search(" ".join(prose)) else None


_PICTURE = r"(?:figure|diagram|picture|illustration)s?"
_FIGURE = _any_of(
    r"\[/?asy\]",
    r"\\begin\{(?:asy|tikzpicture|picture|figure)\}",
    r"\\includegraphics|!\[[^\]]*\]\(|<img\b|<image|https?://\S+\.(?:png|jpe?g|gif|svg)",
    rf"\b(?:in|from|see|using) the (?:(?:following|adjacent|accompanying|attached|given|first) )?{_PICTURE}\b"
    r"(?! (?:with|formed|of) )",
    r"\b(?:figure|diagram|picture|image|illustration|graph|chart|grid|spinner)s? (?:\S+ ){0,6}?(?:(?:is|are|as) )?"
    r"(?:shown|pictured|depicted|drawn) (?:here|above|below|to the (?:left|right))",
    rf"\b(?:{_PICTURE}|image) (?:above|below|to the (?:left|right))\b",
    r"\b(?:figure|fig\.) \d",
)
# A table that is written out can be read.
_TABLE = _any_of(r"\\begin\{(?:tabular|array|matrix)", r"\|\s*-{2,}", r"\\hline")
_DRAWN = _any_of(r"\[/?asy\]", r"\\begin\{(?:asy|tikz|picture|figure)", r"\\includegraphics|!\[|<im|https?://")


def figure(problem: str) -> str | None:
    found = _FIGURE.search(problem)
    if found is None or (_TABLE.search(problem) and not _DRAWN.search(problem)):
        return None
    return _quote(problem, found)


_CHOICES = re.compile(
    ".{1,400}?".join(
        rf"(?:(?<![\w}}])\(\s*{letter}\s*\)|(?:^|(?<=[\s${{])){letter}[).](?=[\s\\$~}}]))" for letter in "ABC"
    ),
    re.DOTALL | re.MULTILINE,
)


def multiple_choice(problem: str) -> str | None:
    found = _CHOICES.search(text := _DRAWING.sub(" ", problem))
    return None if found is None else _quote(text, found)


_TRUE_FALSE = _any_of(
    r"(?:^|[.:?!\n]\s*)\(?(?:true or false|true/false|T/F)\b",
    r"\btrue or false\s*[?:]",
    r"\b(?:state|determine|decide|say) (?:whether|if) (?:\S+ ){1,12}?(?:true|false)\b",
    r"\bis (?:this|the following|it) (?:statement |claim )?(?:true|correct)\?",
)
_HALF = re.compile(r"(?:\\(?:text|textbf|mathrm|textit)\{\s*)?(?:true|false|yes|no)\s*\}?\.?", re.IGNORECASE)


def true_false(problem: str, answer: str) -> str | None:
    if _HALF.fullmatch(answer.strip()):
        return f"answer {answer.strip()}"
    found = _TRUE_FALSE.search(problem)
    return None if found is None else _quote(problem, found)


_PROOF = _any_of(
    r"(?:^|[.,;:!?)$}\]\n]\s*|\b(?:and|then|please|to|can you|must) )(?:prove|show|demonstrate|justify) (?:that|the following)\b",
    r"(?:^|[.!?)$}\]\n]\s*|\b(?:and|then) )prove\b",
    r"\bgive a (?:rigorous |formal )?proof\b",
)
_IS_SHOWN = re.compile(r"\b(?:able|possible|easy|used|enough|order|known) to (?:prove|show)", re.IGNORECASE)


def proof(problem: str) -> str | None:
    found = _PROOF.search(_IS_SHOWN.sub(" ", problem))
    return None if found is None else found.group().strip()


_ASKS = _any_of(
    r"\?",
    r"\b(?:find|what|how (?:many|much|long|far)|determine|compute|calculate|evaluate|prove|show|explain|express|solve|sketch)\b",
)
_PART_LABELS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"(?:^|(?<=[\s*]))\(?(?P<label>[a-h])\)(?=[\s*$])",
        r"(?:^|(?<=[\s*]))\(?(?P<label>i{1,3}|iv|v)\)(?=[\s*$])",
        r"(?:^|(?<=[\s*]))\(?(?P<label>[1-6])\)(?=[\s*$])",
        r"\bPart\s+\(?(?P<label>[A-Ha-h1-6]|I{1,3}|IV)\)?\s*[.:)]",
    )
)


def multi_part(problem: str) -> str | None:
    """Labelled conditions are no parts: of these, at most the last one is followed by a question."""
    text = _DRAWING.sub(" ", problem)
    for pattern in _PART_LABELS:
        labels = list(pattern.finditer(text))
        ends = [*(label.start() for label in labels), len(text)][1:]
        asking = [label for label, end in zip(labels, ends, strict=False) if _ASKS.search(text, label.end(), end)]
        if len({label["label"] for label in asking}) >= 2:
            return _quote(text, asking[1])
    return None


def long_answer(answer: str, max_chars: int) -> str | None:
    if len(answer) > max_chars:
        return f"{len(answer)} characters"
    return f"{len(_prose(answer))} words" if len(_prose(answer)) > MAX_PROSE_WORDS else None


_EXAMPLES = re.compile(r"^\W*(?:Notes?|Examples?|Explanation)\b", re.MULTILINE)
_INTERACTIVE = _any_of(
    r"\binteractive (?:problem|task)\b",
    r"\binteractor\b",
    r"\bflush (?:the )?(?:output|stdout|standard output)\b",
    r"\bfflush\b",
)
_MANY = _any_of(
    r"\bif there (?:are|is|exist) (?:multiple|several|many|more than one) (?:\S+ ){0,3}?(?:answer|solution|way|output)s?\b"
    r"[^.]*\b(?:any|one of)\b",
    r"\b(?:print|output|return) any(?: one)? (?:of (?:them|these|the)|valid|such|suitable|correct|possible)\b",
    r"\b(?:multiple|several) (?:possible |correct |valid )?(?:answers|solutions), (?:you (?:may|can|should) )?"
    r"(?:print|output|return) any\b",
    r"\b(?:print|output|return) (?:\S+ ){1,4}?in any order\b",
    r"\bany (?:valid|correct) (?:answer|solution|output) (?:is|will be) accepted\b",
)


def interactive(problem: str) -> str | None:
    found = _INTERACTIVE.search(problem)
    return None if found is None else _quote(problem, found)


def many_solutions(problem: str) -> str | None:
    found = _MANY.search(problem)
    return None if found is None else _quote(problem, found)


def first_found(filters: Sequence[TextFilter], problem: str, answer: str) -> tuple[str, str] | None:
    """Name of the first filter that leaves the problem out, and what it found."""
    for item in filters:
        if (found := item.find(problem, answer)) is not None:
            return item.name, found
    return None


def _prose(text: str) -> list[str]:
    """Words that are no LaTeX commands, numbers or names of one letter."""
    return [word for word in _WORD.findall(_COMMAND.sub(" ", text)) if word.isalpha() and len(word) > 1]


def _quote(text: str, found: re.Match[str], around: int = 30) -> str:
    """What was found with its surroundings, on one line."""
    start, end = max(0, found.start() - around), min(len(text), found.start() + 2 * around)
    return " ".join(text[start:end].split())
