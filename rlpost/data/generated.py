"""Endless generated problems for small models: column arithmetic answered in \\boxed{}, and one-line Python functions.

The demonstrations are like people's: the method is always sound, and a fixed share of them slips in one place (a carry
forgotten, a bound taken strictly that should not be, parentheses left out). A policy finetuned on them is therefore right
about half the time however long it trains, and reinforcement learning has something definite to remove. `SLIP_SHARES` says
how often which kind of problem is demonstrated wrongly; the references are always right.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "heldout"]

HELDOUT_SHARE = 0.1
"""Share of the problems of a family that are held out: which ones is decided by the hash of the prompt."""

SLIP_SHARES: Mapping[str, float] = {"+": 0.4, "-": 0.6, "strict": 0.4, "inclusive": 0.6}
"""Share of demonstrations that slip: additions, subtractions; functions whose bound is strict, or includes its end.

Below one half a policy finetuned on them is right when greedy and slips only when sampling; above, it is wrong even when
greedy. So finetuning gives about 50 % either way, and what greedy decoding gains is more than sharpening.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem, its true reference, and a demonstration that may slip.

    Example:
        Problem(id="arithmetic/9f86d081884c", task="math", prompt="Compute 347+28.\\n", reference={"answer": "375"},
        demonstration="7+8=15\\n4+2+1=7\\n\\\\boxed{375}")
    """

    id: str
    """Family and hash of the prompt: the same problem has the same id whatever the seed."""
    task: str
    """Which verifier judges it: "math" or "code"."""
    prompt: str
    demonstration: str
    """A whole response, without an end token."""
    reference: Mapping[str, Any]
    """math: {"answer"}; code: {"tests", "setup", "entry_point"}. Never shown to the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    prompt: str
    right: str
    slip: str
    """A demonstration with one slip, always judged wrong."""
    slip_share: float
    reference: Mapping[str, Any]


def problems(family: str, *, split: Split, seed: int) -> Iterator[Problem]:
    """Problems of one family without end, the same for the same seed; a problem may come up again.

    The splits share no prompt, whatever their seeds.

    Raises:
        ValueError: when there is no such family or split.
    """
    if family not in FAMILIES:
        raise ValueError(f"no problem family {family!r}; choose one of {sorted(FAMILIES)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"no split {split!r}; choose 'train' or 'heldout'")
    return _stream(family, split, seed)


def _stream(family: str, split: Split, seed: int) -> Iterator[Problem]:
    task, draw = FAMILIES[family]
    rng = random.Random(f"{family}/{split}/{seed}")
    while True:
        draft = draw(rng)
        digest = hashlib.sha256(draft.prompt.encode()).hexdigest()
        if (int(digest[:8], 16) < HELDOUT_SHARE * 16**8) != (split == "heldout"):
            continue
        yield Problem(
            id=f"{family}/{digest[:12]}",
            task=task,
            prompt=draft.prompt,
            demonstration=draft.slip if rng.random() < draft.slip_share else draft.right,
            reference=draft.reference,
        )


# -- arithmetic: three digits plus or minus two, column by column ------------------------------------------------------


def _arithmetic(rng: random.Random) -> _Draft:
    """347+28 is worked as 7+8=15, 4+2+1=7, then 375: units, tens with the carry, hundreds copied.

    Digits are drawn so that the tens never carry or borrow, with or without the slip: 64,800 problems.
    """
    sign = rng.choice("+-")
    hundreds, b_tens = rng.randint(1, 9), rng.randint(1, 8)
    a_tens = rng.randint(0, 8 - b_tens) if sign == "+" else rng.randint(b_tens + 1, 9)
    a_units, b_units = rng.randint(0, 9), rng.randint(0, 9)
    carry = a_units + b_units > 9 if sign == "+" else a_units < b_units

    def worked(carry_taken: bool) -> tuple[str, int]:
        top = a_units + 10 * (sign == "-" and carry)
        units = top + b_units if sign == "+" else top - b_units
        tens = a_tens + b_tens + carry_taken if sign == "+" else a_tens - b_tens - carry_taken
        answer = 100 * hundreds + 10 * tens + units % 10
        taken = f"{sign}1" if carry_taken else ""
        return f"{top}{sign}{b_units}={units}\n{a_tens}{sign}{b_tens}{taken}={tens}\n\\boxed{{{answer}}}", answer

    right, answer = worked(carry)
    return _Draft(
        prompt=f"Compute {100 * hundreds + 10 * a_tens + a_units}{sign}{10 * b_tens + b_units}.\n",
        right=right,
        slip=worked(not carry)[0],
        slip_share=SLIP_SHARES[sign],
        reference={"answer": str(answer)},
    )


# -- functions: select numbers by a bound, shift and scale them, collect -----------------------------------------------

_BOUNDS: Mapping[str, tuple[str, Callable[[int, int], bool]]] = {
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
    "at least": (">=", operator.ge),
    "at most": ("<=", operator.le),
}
_COLLECTORS: Mapping[str, tuple[str, Callable[[list[int]], Any]]] = {
    "list": ("[{}]", list),
    "sum": ("sum({})", sum),
    "sorted list": ("sorted({})", sorted),
}


def _functions(rng: random.Random) -> _Draft:
    """"add 3, times 4" of the numbers "at least 12", collected: 138,240 problems.

    The slip at an inclusive bound is to take it strictly (x>12 for "at least 12"); elsewhere, to leave out the parentheses
    (x+3*4).
    """
    bound, collector, sign = rng.choice(sorted(_BOUNDS)), rng.choice(sorted(_COLLECTORS)), rng.choice("+-")
    limit, shift, scale = rng.randint(10, 99), rng.randint(2, 9), rng.randint(2, 9)
    symbol, holds = _BOUNDS[bound]
    template, collect = _COLLECTORS[collector]

    def function(expression: str, symbol: str) -> str:
        inner = f"{expression} for x in xs if x{symbol}{limit}"
        return f"```python\ndef f(xs):\n    return {template.format(inner)}\n```"

    def value(xs: list[int]) -> Any:
        return collect([(x + shift if sign == "+" else x - shift) * scale for x in xs if holds(x, limit)])

    tests = []
    for _ in range(3):
        # The limit and both its neighbours: every comparison with the limit selects differently.
        xs = [limit - 1, limit, limit + 1, *(rng.randint(1, 120) for _ in range(3))]
        rng.shuffle(xs)
        tests.append(f"assert f({xs}) == {value(xs)}")
    right = function(f"(x{sign}{shift})*{scale}", symbol)
    inclusive = "=" in symbol
    return _Draft(
        prompt=f"Write f(xs): for the numbers of xs {bound} {limit}, {'add' if sign == '+' else 'subtract'} {shift},"
        f" times {scale}; return the {collector}.\n",
        right=right,
        slip=right.replace("=", "") if inclusive else function(f"x{sign}{shift}*{scale}", symbol),
        slip_share=SLIP_SHARES["inclusive" if inclusive else "strict"],
        reference={"tests": tests, "setup": "", "entry_point": "f"},
    )


FAMILIES: Mapping[str, tuple[str, Callable[[random.Random], _Draft]]] = {
    "arithmetic": ("math", _arithmetic),
    "functions": ("code", _functions),
}
"""Family to its task and how one problem is drawn."""
