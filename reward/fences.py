"""Where the program of a response is."""

from __future__ import annotations

import re

MAX_PROGRAM_CHARS = 60_000
_PYTHON_TAGS = ("python", "py", "python3", "python3.11", "")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w.+#-]*)[^\n]*$", re.MULTILINE)


def extract_program(response: str) -> tuple[str, bool] | None:
    """The program of a response and whether it stood in a fence; None if there is none.

    The last fenced block that is Python by its tag or has no tag, else the last of any tag, after the thinking part. A
    fence that is never closed runs to the end. Without a fence, the whole text: whether it is Python the child will say.
    """
    before, end, after = response.rpartition("</think>")
    if not end and "<think>" in response:
        return None
    text = after if end else before + after
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            blocks.append((opening[2].lower(), text[opening.end() + 1 : fence.start()]))
            opening = None
    if opening is not None:
        blocks.append((opening[2].lower(), text[opening.end() + 1 :]))
    tagged = [body for tag, body in blocks if tag and tag in _PYTHON_TAGS]
    untagged = [body for tag, body in blocks if not tag]
    program = (tagged or untagged or [body for _, body in blocks] or [text])[-1]
    return (program, bool(blocks)) if program.strip() and len(program) <= MAX_PROGRAM_CHARS else None
