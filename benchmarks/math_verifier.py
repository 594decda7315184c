"""Speed of the math verifier, and its agreement with labels next to math-verify on the same cases.

    python -m benchmarks.math_verifier --data FOLDER

Cases: the hand-labelled table of tests/reward/math_cases.tsv, and answers made from the golds of MATH and GSM8K by
rewritings that keep the value and by near misses that do not.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import logging
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from reward import Outcome, RewardPool

TABLE = Path(__file__).parents[1] / "tests" / "reward" / "math_cases.tsv"


class Case(NamedTuple):
    topic: str
    same: bool
    gold: str
    answer: str


def table_cases() -> list[Case]:
    with TABLE.open(encoding="utf-8") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)
        return [Case(topic, label == "same", gold, answer) for topic, label, gold, answer in rows]


def read_golds(data: Path) -> list[str]:
    golds = []
    for name in ("math500", "math_train", "gsm8k_test", "aime_1983_2023", "amc2023"):
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            golds += [json.loads(line)["answer"] for line in file]
    return golds


# Rewritings that keep the value; each returns its argument where it does not apply.
REWRITINGS: dict[str, Callable[[str], str]] = {
    "dollar signs": lambda gold: f"${gold}$",
    "display fraction": lambda gold: gold.replace("\\frac", "\\dfrac"),
    "fraction as division": lambda gold: re.sub(r"(?<![\w ])\\d?frac\{(\w+)\}\{(\d+)\}", r"(\1/\2)", gold),
    "short fraction": lambda gold: re.sub(r"\\d?frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", gold),
    "bare root sign": lambda gold: re.sub(r"\\sqrt\{(\d+)\}", "\u221a\\1", gold),
    "root as a function": lambda gold: re.sub(r"\\sqrt\{(\w+)\}", r"sqrt(\1)", gold),
    "root as a power": lambda gold: re.sub(r"(?<![\w ])\\sqrt\{(\w+)\}", r"\1^{1/2}", gold),
    "pi as a character": lambda gold: gold.replace("\\pi", "\u03c0"),
    "pi as a word": lambda gold: re.sub(r"(?<=\d)\s*\\pi(?![a-z])", "pi", gold),
    "no left and right": lambda gold: gold.replace("\\left", "").replace("\\right", ""),
    "left and right": lambda gold: re.sub(r"^\((.*)\)$", r"\\left(\1\\right)", gold),
    "a name before": lambda gold: f"x = {gold}" if re.fullmatch(r"-?\d+|-?\\frac\{\d+\}\{\d+\}", gold) else gold,
    "a degree sign less": lambda gold: (
        re.sub(r"\^\{?\\circ\}?", "", gold) if re.fullmatch(r"\d+\^\{?\\circ\}?", gold) else gold
    ),
    "thousands": lambda gold: f"{int(gold):,}" if re.fullmatch(r"\d{4,}", gold) else gold,
    "a decimal point": lambda gold: f"{gold}.0" if re.fullmatch(r"-?\d+", gold) else gold,
    "a unit less": lambda gold: (
        re.sub(r"\\(?:text|mbox)\{[ a-z]*\}$", "", gold) if re.match(r"[\d.]+\\", gold) else gold
    ),
    "turned list": lambda gold: (
        ", ".join(reversed(gold.split(","))) if re.fullmatch(r"-?\d{1,2}(?:, ?-?\d{1,2})+", gold) else gold
    ),
    "square brackets": lambda gold: gold.replace("pmatrix", "bmatrix"),
    "minus sign": lambda gold: gold.replace("-", "\u2212"),
    "spaces": lambda gold: re.sub(r"(?<=[\w})])([+=-])(?=[\w\\({])", r" \1 ", gold),
    "union letter": lambda gold: re.sub(r"\s*\\cup\s*", " U ", gold),
    "infinity sign": lambda gold: gold.replace("\\infty", "\u221e"),
    "text": lambda gold: f"\\text{{{gold}}}" if re.fullmatch(r"[A-Z]|-?\d+", gold) else gold,
    "stars": lambda gold: gold.replace("^", "**") if re.fullmatch(r"[\dx+\-^ ]+", gold) else gold,
    "a full stop": lambda gold: gold + ".",
}


def _another_number(gold: str, rng: random.Random) -> str:
    """The same text with one of its integers one larger."""
    spots = [match for match in re.finditer(r"(?<![\d.{,!])\d+(?![\d.,}!])|(?<=\{)\d+(?=\})", gold) if match[0] != "0"]
    if not spots or re.search(r"text|mbox|mathrm|_|\\!|,\d|:", gold):
        return gold
    spot = rng.choice(spots)
    return gold[: spot.start()] + str(int(spot[0]) + 1) + gold[spot.end() :]


NEAR_MISSES: dict[str, Callable[[str, random.Random], str]] = {
    "another number": _another_number,
    "the other sign": lambda gold, rng: gold[1:] if gold[0] == "-" else f"-{gold}" if re.fullmatch(r"[1-9]\d*", gold) else gold,
    "the inverse": lambda gold, rng: re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\\frac{\3}{\2}", gold),
    "ten times": lambda gold, rng: f"{gold}0" if re.fullmatch(r"[1-9]\d*", gold) else gold,
    "without pi": lambda gold, rng: re.sub(r"^(\d+)\s*\\pi$", r"\1", gold),
    "without the root": lambda gold, rng: re.sub(r"\\sqrt\{(\d+)\}$", r"\1", gold),
    "turned pair": lambda gold, rng: re.sub(r"^\((-?\d+), ?(?!\1\))(-?\d+)\)$", r"(\2,\1)", gold),
    "closed interval": lambda gold, rng: re.sub(r"^\(([^y]*?),([^y]*)\)$", r"[\1,\2]", gold) if gold.count(",") == 1 else gold,
    "one value less": lambda gold, rng: gold.rpartition(",")[0] if re.fullmatch(r"-?\d+(?:, ?-?\d+)+", gold) else gold,
    "an extra term": lambda gold, rng: f"{gold}+1" if re.fullmatch(r"[\dx+\-^ ]*x[\dx+\-^ ]*", gold) else gold,
    "rounded": lambda gold, rng: re.sub(r"^\\frac\{(\d+)\}\{(3|7|11|13)\}$", lambda m: f"{int(m[1]) / int(m[2]):.2f}", gold),
}  # fmt: skip


def made_cases(golds: list[str], count: int, seed: int = 0) -> Iterator[Case]:
    """At most `count` distinct cases of each rewriting and each near miss."""
    rng = random.Random(seed)
    golds = sorted(set(golds))
    for topic, rewrite in REWRITINGS.items():
        changed = [Case(f"made: {topic}", True, gold, new) for gold in golds if (new := rewrite(gold)) != gold]
        yield from rng.sample(changed, min(count, len(changed)))
    for topic, spoil in NEAR_MISSES.items():
        changed = [
            Case(f"made: {topic}", False, gold, new)
            for gold in golds
            if (new := spoil(gold, rng)) not in (gold, "", "-0")
        ]
        # A pair of equal numbers turned is the same pair, and 1/1 inverted is itself.
        yield from rng.sample(changed, min(count, len(changed)))


def judge_by_math_verify(case: Case) -> bool:
    """math-verify as its documentation says: the gold and the response parsed, then verified, gold first."""
    from math_verify import parse, verify

    try:
        return bool(verify(parse(f"\\boxed{{{case.gold}}}"), parse(f"\\boxed{{{case.answer}}}")))
    except Exception:  # noqa: BLE001 - another project's failure is its verdict here
        return False


def report(cases: list[Case], ours: list[bool], theirs: list[bool], show: bool) -> None:
    out = sys.stdout.write
    out(
        f"{'':28}{'cases':>7}{'ours':>9}{'false yes':>11}{'false no':>10}{'math-verify':>13}{'false yes':>11}{'false no':>10}\n"
    )
    groups: dict[str, list[int]] = {"hand-labelled": [], "made from golds": []}
    for index, case in enumerate(cases):
        groups["made from golds" if case.topic.startswith("made") else "hand-labelled"].append(index)
    for name, members in groups.items():
        cells = [f"{name:28}{len(members):>7}"]
        for verdicts, width in ((ours, 9), (theirs, 13)):
            right = sum(verdicts[index] == cases[index].same for index in members)
            wrong_yes = sum(verdicts[index] and not cases[index].same for index in members)
            share = 100 * right / max(1, len(members))
            cells.append(f"{share:>{width - 1}.2f}%{wrong_yes:>11}{len(members) - right - wrong_yes:>10}")
        out("".join(cells) + "\n")
    if show:
        for case, verdict in zip(cases, ours, strict=True):
            if verdict != case.same:
                out(f"disagrees with the label: {case}\n")


def speed(pool: RewardPool, golds: list[str], wanted: int = 1000) -> None:
    """Verdicts a second on a mix as in training: half rewritten golds, half the answers to other problems."""
    rng = random.Random(1)
    items = []
    for place in range(wanted):
        gold, other = rng.choice(golds), rng.choice(golds)
        rewrite = REWRITINGS[rng.choice(list(REWRITINGS))]
        answer = rewrite(gold) if place % 2 else other
        items.append(("math", f"We add the parts, so the total is $\\boxed{{{answer}}}$.", {"answer": gold}))
    start = time.perf_counter()
    verdicts = pool.score_many(items)
    elapsed = time.perf_counter() - start
    outcomes = dict(Counter(verdict.outcome.value for verdict in verdicts))
    sys.stdout.write(f"{len(items)} verdicts in {elapsed:.2f} s: {len(items) / elapsed:.0f} a second; {outcomes}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="the folder of the data sets; without it the hand-labelled table alone"
    )
    parser.add_argument("--count", type=int, default=60, help="cases of each rewriting and near miss")
    parser.add_argument("--show", action="store_true", help="print every case where the verdict is not the label")
    parser.add_argument("--only", choices=("speed", "agreement"))
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    golds = read_golds(arguments.data) if arguments.data else []
    cases = [*table_cases(), *made_cases(golds, arguments.count)]
    with RewardPool() as pool:
        pool.score("math", r"\boxed{\sqrt{3}+x}", {"answer": r"\sqrt{2}+x"})  # the server is warm
        if golds and arguments.only != "agreement":
            # MATH alone first: GSM8K and AIME are integers, the cheap half.
            speed(pool, [gold for gold in golds if not re.fullmatch(r"-?\d+", gold)])
            speed(pool, golds)
        if arguments.only != "speed":
            verdicts = [pool.score("math", f"\\boxed{{{case.answer}}}", {"answer": case.gold}) for case in cases]
            ours = [verdict.outcome is Outcome.CORRECT for verdict in verdicts]
            report(cases, ours, [judge_by_math_verify(case) for case in cases], arguments.show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
