"""Every gold solution and many one-place mutations of each, judged by the verifier and by a plain interpreter.

    python -m benchmarks.code_mutations --data <folder with mbpp.jsonl.gz, mbpp_sanitized.jsonl.gz, humaneval.jsonl.gz>

Golds must score 1. A mutation must score 1 exactly where the plain interpreter runs its tests through.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reward import Outcome, RewardPool, TaskLimits, gold_response
from reward.pool import CODE_LIMITS
from tests.reward.mutations import mutants, passes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["mbpp", "mbpp_sanitized", "humaneval"])
    parser.add_argument("--per-problem", type=int, default=4, help="mutations of each gold")
    parser.add_argument(
        "--deadline", type=float, default=3.0, help="seconds for a mutation, in both ways of running it"
    )
    parser.add_argument(
        "--regrade-share", type=float, default=1.0, help="share of golds judged by the second path as well"
    )
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    code = 0
    for name in arguments.sets:
        with gzip.open(arguments.data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        code |= golds(name, records, arguments) | sweep(name, records, arguments)
    return code


def golds(name: str, records: list[dict[str, Any]], arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    limits = TaskLimits(workers=arguments.workers, deadline_s=CODE_LIMITS.deadline_s)
    with RewardPool(code=limits, regrade_share=arguments.regrade_share) as pool:
        verdicts = pool.score_many([("code", gold_response("code", record), record) for record in records])
    wrong = [r["id"] for r, v in zip(records, verdicts, strict=True) if v.outcome is not Outcome.CORRECT]
    say(
        f"{name}: {len(records) - len(wrong)} of {len(records)} golds score 1 at the default deadline of {limits.deadline_s:g} s"
        f" {wrong or ''}; slowest {max(v.seconds for v in verdicts):.1f} s; second path: "
        f"{dict(Counter(str(v.second_opinion) for v in verdicts))}; flags: {dict(Counter(f for v in verdicts for f in v.flags))};"
        f" {time.perf_counter() - started:.0f} s"
    )
    return bool(wrong)


def sweep(name: str, records: list[dict[str, Any]], arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    items = [
        (record, mutant)
        for seed, record in enumerate(records)
        for mutant in mutants(record["reference_solution"], limit=arguments.per_problem, seed=seed)
    ]
    with ThreadPoolExecutor(arguments.workers) as threads:
        truths = list(threads.map(lambda item: passes(item[1], item[0], limit_s=arguments.deadline), items))
    with RewardPool(code=TaskLimits(workers=arguments.workers, deadline_s=arguments.deadline)) as pool:
        verdicts = pool.score_many([("code", f"```python\n{mutant}\n```", record) for record, mutant in items])
    counts: Counter[str] = Counter()
    disagreements = []
    for (record, mutant), truth, verdict in zip(items, truths, verdicts, strict=True):
        fails = {True: "passes its tests", False: "fails its tests", None: "does not end"}[truth]
        counts[f"{fails}: {verdict.outcome}"] += 1
        if verdict.reward != float(truth is True):
            disagreements.append(
                {
                    "id": record["id"],
                    "truth": fails,
                    "verdict": str(verdict.outcome),
                    "detail": verdict.detail,
                    "program": mutant,
                }
            )
    took_s = time.perf_counter() - started
    say(f"{name}: {len(items)} mutations, {len(disagreements)} verdicts differ; {dict(counts)}; {took_s:.0f} s")
    for disagreement in disagreements[:20]:
        say(f"  {json.dumps(disagreement)}")
    return bool(disagreements)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
