"""Endless generated problems for small models: column arithmetic and chains of additions answered in \\boxed{}, and one-line
Python functions.

The demonstrations are like people's: the method is always sound, and a fixed share of them slips in one place (a carry
forgotten, a bound taken strictly that should not be, parentheses left out). A policy finetuned on them is therefore
right about half the time however long it trains, and reinforcement learning has something definite to remove.
`SLIP_SHARES` says how often which kind of problem is demonstrated wrongly; the references are always right.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "heldout"]

HELDOUT_SHARE = 0.1
"""Share of the problems of a family that are held out: which ones is decided by the hash of the prompt."""

SLIP_SHARES: Mapping[str, float] = {"+": 0.4, "-": 0.6, "strict": 0.4, "inclusive": 0.6, "chain": 0.5}
"""Share of demonstrations that slip: additions, subtractions; functions whose bound is strict, or includes its end; chains.

Below one half a policy finetuned on them is right when greedy and slips only when sampling; above, it is wrong even
when greedy. So finetuning gives about 50 % either way, and what greedy decoding gains is more than sharpening.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem, its true reference, and a demonstration that may slip.

    Example:
        Problem(id="arithmetic/9f86d081884c", task="math", prompt="Compute 347+28.\\n", reference={"answer": "375"},
        demonstration="7+8=5, carry 1\\n4+2+1=7\\n\\\\boxed{375}")
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
    """347+28 is worked as "7+8=5, carry 1", "4+2+1=7", then 375: units, tens with the carry, hundreds copied.

    A slip forgets the carry, or takes one that is not there. Digits are drawn so that the tens never carry or borrow,
    with or without the slip: 64,800 problems, all equally likely, all written in the same columns.
    """
    sign, hundreds = rng.choice("+-"), rng.randint(1, 9)
    low, high = sorted(rng.sample(range(1, 10), 2))
    a_tens, b_tens = (low - 1, high - low) if sign == "+" else (high, low)
    a_units, b_units = rng.randint(0, 9), rng.randint(0, 9)
    units = a_units + b_units if sign == "+" else a_units - b_units
    carry = int(not 0 <= units <= 9)

    def worked(taken: int) -> tuple[str, int]:
        tens = a_tens + b_tens + taken if sign == "+" else a_tens - b_tens - taken
        answer = 100 * hundreds + 10 * tens + units % 10
        lines = (
            f"{a_units}{sign}{b_units}={units % 10}, {'carry' if sign == '+' else 'borrow'} {carry}",
            f"{a_tens}{sign}{b_tens}{sign}{taken}={tens}",
            f"\\boxed{{{answer}}}",
        )
        return "\n".join(lines), answer

    right, answer = worked(carry)
    return _Draft(
        prompt=f"Compute {100 * hundreds + 10 * a_tens + a_units}{sign}{10 * b_tens + b_units}.\n",
        right=right,
        slip=worked(1 - carry)[0],
        slip_share=SLIP_SHARES[sign],
        reference={"answer": str(answer)},
    )


# -- chains: five or six digits added up, one or two at a time, the rest copied; once, or all of it twice ------------------


def _worked_chain(numbers: list[int], pace: int, slips_at: int | None) -> tuple[list[str], int, list[int]]:
    """The lines, what they come to, and which of them carry. A slip forgets a carry: its line and all after it are 10 too low."""
    head, rest = numbers[0], numbers[1:]
    lines: list[str] = []
    carries: list[int] = []
    while rest:
        total = head + sum(rest[:pace])
        if total // 10 > head // 10:
            carries.append(len(lines))
        head, rest = total - 10 * (len(lines) == slips_at), rest[pace:]
        lines.append("+".join(map(str, (head, *rest))))
    return lines, head, carries


def _chain(rng: random.Random, ways: Sequence[tuple[int, int]]) -> _Draft:
    """Worked in one of the ways: numbers added per line, times that all lines are written."""
    numbers = [rng.randint(2, 9) for _ in range(rng.randint(5, 6))]
    pace, times = rng.choice(ways)

    def worked(slips_at: int | None) -> tuple[str, list[int]]:
        lines, head, carries = _worked_chain(numbers, pace, slips_at)
        return "\n".join((*lines * times, f"\\boxed{{{head}}}")), carries

    right, carries = worked(None)
    return _Draft(
        prompt=f"Compute {'+'.join(map(str, numbers))}.\n",
        right=right,
        slip=worked(rng.choice(carries))[0],
        slip_share=SLIP_SHARES["chain"],
        reference={"answer": str(sum(numbers))},
    )


def _chains(rng: random.Random) -> _Draft:
    """7+5+9+4+8 is worked as "12+9+4+8", "21+4+8", "25+8", 33, or in steps of two as "21+4+8", 33.

    Either way is right, and half of the demonstrations take each, so that a policy finetuned on them has responses of 23 to 39
    tokens and of 11 to 21 for the same problems. Length is work: a step of two is the harder one.
    """
    return _chain(rng, [(1, 1), (2, 1)])


def _repeated_chains(rng: random.Random) -> _Draft:
    """Chains in steps of one, half of the demonstrations with every line a second time before the answer, slips included.

    So responses have 23 to 39 tokens, or 43 to 74, for the same problems, and length is waste.
    """
    return _chain(rng, [(1, 1), (1, 2)])


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
    """Numbers "at least 12", "add 3, times 4", collected: 138,240 problems, all equally likely.

    The slip at an inclusive bound is to take it strictly (x>12 for "at least 12"); elsewhere, to leave out the
    parentheses (x+3*4).
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

    prompt = (
        f"Write f(xs): for the numbers of xs {bound} {limit}, {'add' if sign == '+' else 'subtract'} {shift},"
        f" times {scale}; return the {collector}.\n"
    )
    numbers = random.Random(prompt)
    tests = []
    for _ in range(3):
        # The limit and both its neighbours: every comparison with the limit selects differently.
        xs = [limit - 1, limit, limit + 1, *(numbers.randint(1, 120) for _ in range(3))]
        numbers.shuffle(xs)
        tests.append(f"assert f({xs}) == {value(xs)}")
    right = function(f"(x{sign}{shift})*{scale}", symbol)
    inclusive = "=" in symbol
    return _Draft(
        prompt=prompt,
        right=right,
        slip=right.replace("=", "") if inclusive else function(f"x{sign}{shift}*{scale}", symbol),
        slip_share=SLIP_SHARES["inclusive" if inclusive else "strict"],
        reference={"tests": tests, "setup": "", "entry_point": "f"},
    )


FAMILIES: Mapping[str, tuple[str, Callable[[random.Random], _Draft]]] = {
    "arithmetic": ("math", _arithmetic),
    "chains": ("math", _chains),
    "repeated_chains": ("math", _repeated_chains),
    "functions": ("code", _functions),
}
"""Family to its task and how one problem is drawn."""
