"""Score a JSONL file of {task, response, reference}: one verdict per line, in order, on standard output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from reward import RewardPool, TaskLimits, check_reference
from reward.pool import CODE_LIMITS, MATH_LIMITS
from reward.sandbox import TIERS, Tier, TierError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reward", description=__doc__)
    parser.add_argument("file", type=Path, help='lines such as {"task": "math", "response": "...", "reference": {...}}')
    parser.add_argument("--workers", type=int, default=1, help="responses of each task judged at a time")
    parser.add_argument("--math-deadline", type=float, default=MATH_LIMITS.deadline_s, help="seconds per response")
    parser.add_argument("--code-deadline", type=float, default=CODE_LIMITS.deadline_s, help="seconds per response")
    parser.add_argument("--min-tier", choices=[str(tier) for tier in TIERS[:-1]], default=str(Tier.LANDLOCK))
    parser.add_argument(
        "--unsafe-allow-rlimits-only",
        action="store_true",
        help="run programs even where this machine cannot keep them from reading its files",
    )
    parser.add_argument("--regrade-share", type=float, default=0.0, help="share judged by a second path as well")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        try:
            check_reference(row["task"], row["reference"])
        except (KeyError, ValueError) as error:
            sys.stderr.write(f"{arguments.file}, line {number}: {error}\n")
            return 2
    try:
        pool = RewardPool(
            math=TaskLimits(workers=arguments.workers, deadline_s=arguments.math_deadline),
            code=TaskLimits(workers=arguments.workers, deadline_s=arguments.code_deadline),
            min_tier=arguments.min_tier,
            unsafe_allow_rlimits_only=arguments.unsafe_allow_rlimits_only,
            regrade_share=arguments.regrade_share,
        )
    except (TierError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    with pool:
        for verdict in pool.score_many([(row["task"], row["response"], row["reference"]) for row in rows]):
            sys.stdout.write(json.dumps(dataclasses.asdict(verdict)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
