"""Equivalence of two answers: by our own reading of both, and by math-verify where that is not certain.

Request: {"by": "reading" | "math-verify", "gold": str, "answer": str}. Reply: {"equal": bool | None, "gold_parsed": bool} or
{"broken": str}.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import sys
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from reward.child import wire
from reward.child.equivalence import equivalent
from reward.child.reading import read
from reward.child.tables import NEGATIONS

logging.disable(logging.CRITICAL)
sys.setrecursionlimit(3000)
_WARM_UP = [
    (r"\frac{1}{2}", "0.5"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"[0,\infty)", r"x\ge 0"),
    (r"\sqrt{12}+\pi", r"2\sqrt{3}+\pi"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{5}"),
    (r"\sin x + \log_2 y", r"e^{x} - y!"),
    ("p - q", "(p, q)"),
    ("x = 2y + 1", "x = 2y"),
    ("x > 3", "(4, 5]"),
    (r"5\text{ cm}", r"1:2"),
    ("3:30 PM", "October 30"),
]
# What neither we nor math-verify reads as a whole; two such texts are equal as texts or not at all.
_UNFINISHED = re.compile(r"\\[lcdv]?dots|\.\.\.|\u2026|\\forall|\\exists")


def run(sockets: list[socket.socket]) -> None:
    """Answer one question after another until the parent closes the channel."""
    channel = wire.Channel(sockets[0])
    with contextlib.suppress(wire.ChannelClosedError):
        while True:
            nonce, payload = channel.recv()
            request = json.loads(payload)
            compare = compare_by_reading if request["by"] == "reading" else compare_by_math_verify
            try:
                reply = compare(request["gold"], request["answer"])
            except RecursionError:
                reply = {"equal": False, "gold_parsed": True}
            except Exception as error:  # noqa: BLE001 - the parent counts it as a broken verifier
                reply = {"broken": f"{type(error).__name__}: {error}"[:300]}
            # Nothing of a question may be there when the next one comes.
            read.cache_clear()
            channel.send(nonce, json.dumps(reply).encode())


def compare_by_reading(gold: str, answer: str) -> dict[str, Any]:
    """Parsing and arithmetic; "equal" is None where that decides nothing."""
    equal = equivalent(gold, answer)
    if equal is None and any(_only_as_text(text) for text in (gold, answer)):
        equal = False
    return {"equal": equal, "gold_parsed": True}


def _only_as_text(text: str) -> bool:
    """Whether a text that is not all mathematics can be compared as text alone: words, open ends, "at least 5"."""
    reading = read(text)
    bounded = reading.node is None and NEGATIONS & set(re.findall(r"[a-z]+", text.lower()))
    return reading.words is not None or bool(bounded) or _UNFINISHED.search(text) is not None


def compare_by_math_verify(gold: str, answer: str) -> dict[str, Any]:
    """Both directions must agree. It parses by evaluation: the process must end with it."""
    golds, answers = _parse(gold), _parse(answer)
    equal = bool(golds and answers) and _verify(golds, answers) and _verify(answers, golds)
    return {"equal": equal, "gold_parsed": bool(golds) or read(gold).node is not None}


def _parse(text: str) -> list[Any]:
    """What math-verify reads in the text; nothing if it reads only a part, since two texts can share a part."""
    # math-verify's own limits are SIGALRM, which the parent's kill replaces.
    found = parse(
        f"\\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()],
        parsing_timeout=None,  # type: ignore[arg-type]
    )
    whole = bool(found) and len(_characters(str(found[-1]))) >= 0.9 * len(_characters(text))
    return found if whole else []


def _characters(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z]", "", text)


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    return bool(verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None))


# Touching the parsers and comparisons that most answers need leaves them warm in the server for every fork.
for _gold, _answer in _WARM_UP:
    equivalent(_gold, _answer)
    compare_by_math_verify(_gold, _answer)
read.cache_clear()
