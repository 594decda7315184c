"""Where a math response states its final answer.

Everything here runs in the trusted process on hostile text: every step is linear in its length or works on a bounded piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_ANSWER_CHARS = 1000
"""Longer "answers" are not answers; nothing downstream sees them."""
_TAIL_CHARS = 4000
_MAX_GAP_CHARS = 60
_MAX_BOXES = 12
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_THINKING = re.compile(r"</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>|\[/THINK\]", re.IGNORECASE)
_THINKING_OPENS = re.compile(r"<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>|\[THINK\]", re.IGNORECASE)
_END_MARKS = re.compile(r"(?:</s>|<eos>|<\|[a-z_]{1,20}\|>|\s){1,50}\Z")
_BOLD = re.compile(r"\*\*([^*\n$]{1,100})\*\*(?=[.\s]*\Z)")
_TAG = re.compile(r"<answer>([^<]{0,2000}(?:<(?!/?answer>)[^<]{0,2000}){0,50})</answer>", re.IGNORECASE)
_HASH = re.compile(r"^[ \t]*####[ \t]*([^\n]*)", re.MULTILINE)
# "the answer is ...", "**Final Answer:** ...", "answer: (B)"; the statement ends with the line.
_VERB = r"(?:is|are|would be|should be|must be|equals|becomes|comes out to be|=)[^\S\n]{0,3}:?|[:\uff1a]"
_PHRASE = re.compile(
    rf"\b(?:answer|option|choice)\b[*_ ]{{0,4}}(?:{_VERB})[*_]{{0,3}}([^\n]*)"
    r"|\u7b54\u6848(?:[\u662f\u4e3a:\uff1a]+)([^\n\u3002]*)",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"(?:^|\n)[#*_ \t]{0,6}(?:the )?(?:final answer|answer)[*_:. \t]{0,6}\n\s{0,20}([^\n]+)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<!\b[ap]\.m)(?<!\bapprox)\.(?=[*_\"')]{0,3}(?:\s|$))(?!\s*[ap]\.?m\b)")
_REASON = re.compile(
    r",?\s+(?:because|since|so that|which|where|as required|as desired)\b.*", re.IGNORECASE | re.DOTALL
)
_FILLER = re.compile(
    r"^(?:(?:indeed|therefore|thus|hence|simply|just|then|clearly|definitely|exactly|either|given by|equal to|option|choice"
    r"|number|that)\b[\s,:]*)+",
    re.IGNORECASE,
)
_OR = re.compile(r"(?:\b(?:or|alternatively|otherwise|maybe|perhaps|possibly)\b)", re.IGNORECASE)
_SAME = re.compile(
    r"\b(?:equivalent|equivalently|i\.e|that is|approximately|in other words|simplif\w+|same)\b", re.IGNORECASE
)
_AND = re.compile(r"[\s$]*(?:,|;|and|\\text\{\s*,?\s*and\s*\}|,\s*and)[\s$\\(\[]*(?:\$?[a-zA-Z](?:_\{?\w\}?)?\s*=\s*)?")
_MATHS = re.compile(
    r"\$\$([^$]{1,1000})\$\$|\$([^$]{1,1000})\$|\\\(((?:(?!\\\)).){1,1000})\\\)|\\\[((?:(?!\\\]).){1,1000})\\\]",
    re.DOTALL,
)
_PLACEHOLDER = re.compile(
    r"[\s.?_\\$-]*|\\l?dots|(?:your |the |final )*(?:answer|ans|result|number|value)(?: here)?|\.\.\."
    r"|i (?:do not|don't) know|unclear|not (?:clear|known)",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"^\W*(?:therefore|thus|hence|so|consequently|in conclusion|finally|we (?:get|have|obtain|find|conclude))\b",
    re.IGNORECASE,
)
_BARE = re.compile(
    r"\\[a-zA-Z]+|[-+$\d.,/%^*(){}\[\]\s\\:=<>|!&_]|\b(?:[a-zA-Z]|pi|sqrt|exp|sin|cos|tan|ln|log|oo|inf|infinity)\b"
)


def final_answer(response: str) -> str | None:
    """The last stated final answer, or None if the response states none.

    The last `\\boxed{}` decides; without a box the last <answer> tag, "#### ..." or "answer is ...", and without those a
    closing line or sentence that holds one expression alone. Only what follows a thinking part counts, and a thinking part
    that never ends has no answer. A last box that is cut off, empty, too long, or one of several joined by "or" is not an
    answer; boxes joined by "and" are one answer of several values.
    """
    text = _after_thinking(response)
    if text is None:
        return None
    text = text[:-_TAIL_CHARS] + _END_MARKS.sub("", text[-_TAIL_CHARS:])
    if tags := list(_TAG.finditer(text[-_TAIL_CHARS * 4 :])):
        inside = tags[-1][1]
        if "\\boxed" not in text or "\\boxed" in inside:
            text = inside
            if "\\boxed" not in inside:
                return _usable(_stated(inside[-_TAIL_CHARS:]) or _only_maths(inside) or inside)
    opening = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if opening >= 0:
        return _usable(_last_box(text, opening))
    tail = text[-_TAIL_CHARS:]
    stated = _stated(tail)
    return _usable(_lone_expression(text, tail) if stated is None else stated)


def _after_thinking(response: str) -> str | None:
    """What follows the last thinking part; None if one never ends."""
    ends = [match.end() for match in _THINKING.finditer(response)]
    if ends:
        return response[ends[-1] :]
    return None if _THINKING_OPENS.search(response) else response


def _usable(answer: str | None) -> str | None:
    answer = answer.strip() if answer else ""
    if not 0 < len(answer) <= MAX_ANSWER_CHARS or _PLACEHOLDER.fullmatch(answer):
        return None
    return answer


# -- boxes


def _last_box(text: str, opening: int) -> str | None:
    """The content of the last box, with those of the boxes that "and" joins to it; None if "or" joins another to it."""
    box = _BOX.match(text, opening)
    if box is None:
        return None
    answer = _box_content(text, box.end())
    if answer is None:
        return None
    answers = [answer[0]]
    start = opening
    for content, box_start, box_end in _boxes_before(text, opening):
        gap = text[box_end:start]
        if len(gap) > _MAX_GAP_CHARS or "\n\n" in gap:
            break
        if _OR.search(gap) and not _SAME.search(gap) and "." not in gap:
            if content != answers[0]:
                return None
        elif not _AND.fullmatch(gap):
            break
        else:
            answers.insert(0, content)
        start = box_start
    return ", ".join(answers) if len(set(answers)) > 1 else answer[0]


def _boxes_before(text: str, end: int) -> Iterator[tuple[str, int, int]]:
    """(content, start, end) of the boxes before a place, last first."""
    for _ in range(_MAX_BOXES):
        begin = max(0, end - MAX_ANSWER_CHARS - 100)
        start = max(text.rfind("\\boxed", begin, end), text.rfind("\\fbox", begin, end))
        box = _BOX.match(text, start) if start >= 0 else None
        content = _box_content(text, box.end()) if box else None
        if content is None or content[1] > end:
            return
        yield content[0], start, content[1]
        end = start


def _box_content(text: str, start: int) -> tuple[str, int] | None:
    """What stands in the braces that open at `start`, balanced, or the one token there without braces; and where it ends."""
    if text[start : start + 1] != "{":
        bare = re.compile(r"[^\s$\\{}.,;]+").match(text, start)
        return (bare[0], bare.end()) if bare else None
    depth = 0
    for brace in _BRACE.finditer(text, start, start + MAX_ANSWER_CHARS + 2):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()], brace.end()
    return None


# -- statements without a box


def _stated(text: str) -> str | None:
    """The last "#### ..." or "answer is ..."; empty if the last one states nothing."""
    last: tuple[int, str] | None = None
    previous_end, previous = 0, ""
    for match in _HASH.finditer(text):
        last = match.start(), match[1]
    for match in _PHRASE.finditer(text):
        rest = match[1] if match[1] is not None else match[2]
        answer = _phrase_value(rest if rest.strip("*_ $") else _next_lines(text, match.end()))
        if inner := _PHRASE.search(answer):
            answer = "" if _OR.search(answer[: inner.start()]) else _phrase_value(inner[1] or inner[2] or "")
        if last is None or match.start() > last[0]:
            hedged = _OR.search(text[previous_end : match.start()][-30:]) and previous and previous != answer
            last = match.start(), "" if hedged else answer
        previous_end, previous = match.end(), answer
    for match in _HEADING.finditer(text):
        if last is None or match.start() >= last[0] - 20:
            last = match.start(), _phrase_value(match[1])
    return last[1].strip().strip("*_ ") if last else None


def _next_lines(text: str, start: int) -> str:
    """The display or the line that follows a statement which ends with its line."""
    following = text[start : start + MAX_ANSWER_CHARS].lstrip()
    display = _MATHS.match(following)
    return display[0] if display else following.partition("\n")[0]


def _phrase_value(text: str) -> str:
    """The value in what follows "answer is": up to the end of the sentence, without the reason that may follow."""
    text = text.strip().strip("*_ ")
    if match := _MATHS.match(text):
        rest = text[match.end() :]
        if not re.match(r"\s*(?:,|and|or|\\text|[=<>+]|\$)", rest):
            unit = re.match(r"\s*(?:[a-zA-Z%]+|[°%])(?=[\s.]*$)", rest)
            return (match[1] or match[2] or match[3] or match[4]) + (unit[0] if unit else "")
    if stop := _SENTENCE_END.search(text):
        text = text[: stop.start()]
    text = _FILLER.sub("", _REASON.sub("", text).strip().strip("*_ "))
    found = _MATHS.findall(text)
    if len(found) == 1 and not re.search(r"\d", _MATHS.sub("", text)):
        before = _MATHS.split(text)[0].strip()
        return next(filter(None, found[0])) if not before or before[-1].isalpha() or before[-1] in ":=" else text
    return text.strip().strip("*_ ")


def _only_maths(text: str) -> str | None:
    found = [next(filter(None, groups)) for groups in _MATHS.findall(text)]
    return found[0] if len(found) == 1 else None


def _lone_expression(text: str, tail: str) -> str | None:
    """The answer of a response that is one expression, or whose last line or concluding sentence holds one alone."""
    stripped = tail.strip().strip("*_ ")
    if len(text.strip()) <= 200 and "\n" not in stripped and _is_expression(stripped):
        return _without_dollars(stripped)
    if not stripped:
        return None
    stripped = _BOLD.sub(lambda bold: f"${bold[1]}$" if _is_expression(bold[1]) else bold[0], tail.strip())
    found = list(_MATHS.finditer(stripped))
    line = stripped.rpartition("\n")[2].strip().strip("*_ ").removesuffix(".")
    if found and stripped.removesuffix(".").rstrip("*_ ").endswith(found[-1][0]):
        value = next(filter(None, found[-1].groups()))
        before = stripped[: found[-1].start()]
        sentence = re.split(r"(?<=[.!?:])\s+|\n", before)[-1]
        alone = not sentence.strip("*_ ")
        if alone or (_CONCLUSION.match(sentence) and not _MATHS.search(sentence)):
            return value
        return None
    if "\n" in stripped and len(line) <= 100 and _is_expression(line) and not line.endswith(("=", "+", "-", "*", "/")):
        return _without_dollars(line) if not re.match(r"\d+[.)]\s", line) else None
    return None


def _is_expression(text: str) -> bool:
    """Whether it is mathematics without prose, so that all of it can be the answer."""
    if not re.search(r"[\dA-Za-z]", text):
        return False
    if len(text) <= MAX_ANSWER_CHARS and _MATHS.fullmatch(text):
        return True
    rest = _BARE.sub("", text[:300])
    return len(text) <= 300 and not rest.strip(" '\"{}_^") and not re.search(r"[a-zA-Z]\s+[a-zA-Z]\s+[a-zA-Z]", text)


def _without_dollars(text: str) -> str:
    match = _MATHS.fullmatch(text)
    return next(filter(None, match.groups())) if match else text
