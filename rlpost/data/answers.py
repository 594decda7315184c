"""What a response states as its answer, in a form that votes."""

from __future__ import annotations

from reward.answers import exact_value, normalize
from reward.extraction import final_answer
from rlpost.types import Prompt


def stated_answer(prompt: Prompt, response: str) -> str | None:
    """The final answer of a math response as it votes: a plainly written number by its value, all else by its text.

    None where it states none, and for code: programs have no majority.
    """
    answer = final_answer(response) if prompt.task == "math" else None
    if answer is None:
        return None
    text = normalize(answer)
    value = exact_value(text)
    return text if value is None else f"{value.kind} {value.rational}".strip()
