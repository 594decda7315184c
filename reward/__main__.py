"""Score a JSONL file of {task, response, reference}: one verdict per line, in order, on standard output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from reward import RewardPool, check_reference


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reward", description=__doc__)
    parser.add_argument("file", type=Path, help='lines such as {"task": "math", "response": "...", "reference": {...}}')
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds per response")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        try:
            check_reference(row["task"], row["reference"])
        except (KeyError, ValueError) as error:
            sys.stderr.write(f"{arguments.file}, line {number}: {error}\n")
            return 2
    with RewardPool(num_workers=arguments.workers, deadline_s=arguments.deadline) as pool:
        for verdict in pool.score_many([(row["task"], row["response"], row["reference"]) for row in rows]):
            sys.stdout.write(json.dumps(dataclasses.asdict(verdict)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
