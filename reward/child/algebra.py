"""Equivalence of two answers by math-verify, once per process.

Request: {"gold": str, "answer": str}. Reply: {"equal": bool, "gold_parsed": bool, "answer_parsed": bool} or
{"broken": str}.
"""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from reward.child import wire

logging.disable(logging.CRITICAL)
# Touching the parsers and comparisons that most answers need leaves them warm in the server for every fork.
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
]


def compare(gold: str, answer: str) -> dict[str, Any]:
    """Symmetric: both directions of math-verify must agree that the two are equal."""
    golds, answers = _parse(gold), _parse(answer)
    equal = bool(golds and answers) and _verify(golds, answers) and _verify(answers, golds)
    return {"equal": equal, "gold_parsed": bool(golds), "answer_parsed": bool(answers)}


def run(sockets: list[socket.socket]) -> None:
    channel = wire.Channel(sockets[0])
    nonce, payload = channel.recv()
    request = json.loads(payload)
    try:
        reply = compare(request["gold"], request["answer"])
    except RecursionError:
        reply = {"equal": False, "gold_parsed": True, "answer_parsed": False}
    except Exception as error:  # noqa: BLE001 - the parent counts it as a broken verifier
        reply = {"broken": f"{type(error).__name__}: {error}"[:300]}
    channel.send(nonce, json.dumps(reply).encode())


def _parse(text: str) -> list[Any]:
    # math-verify's own limits are SIGALRM, which the parent's kill replaces.
    return parse(
        f"\\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()],
        parsing_timeout=None,  # type: ignore[arg-type]
    )


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    return bool(verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None))


for _gold, _answer in _WARM_UP:
    compare(_gold, _answer)
