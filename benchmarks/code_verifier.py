"""How fast the code verifier judges, and whether it stays the same size.

    python -m benchmarks.code_verifier --data <folder with mbpp.jsonl.gz>

Judges 1,024 MBPP reference solutions with full isolation, then the same over and over, counting memory, descriptors and
processes.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from reward import RewardPool, TaskLimits, gold_response


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--num-responses", type=int, default=1024)
    parser.add_argument("--num-runs", type=int, default=5000, help="of the second part")
    arguments = parser.parse_args()
    with gzip.open(arguments.data / "mbpp.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    items = [("code", gold_response("code", record), record) for record in records]
    wanted = list(itertools.islice(itertools.cycle(items), arguments.num_responses))
    with RewardPool(code=TaskLimits(workers=arguments.workers, deadline_s=10.0)) as pool:
        started = time.perf_counter()
        verdicts = pool.score_many(wanted)
        wall_s = time.perf_counter() - started
        seconds = sorted(verdict.seconds for verdict in verdicts)
        say(
            f"{len(verdicts)} MBPP solutions in {wall_s:.1f} s with {arguments.workers} workers in tier {pool.tier}:"
            f" {len(verdicts) / wall_s:.0f}/s, {sum(verdict.reward for verdict in verdicts):.0f} right,"
            f" p50 {1000 * seconds[len(seconds) // 2]:.1f} ms, p95 {1000 * seconds[len(seconds) * 95 // 100]:.1f} ms"
        )
        # Problems that compute for seconds say nothing about size.
        quick = [item for item, verdict in zip(wanted, verdicts, strict=True) if verdict.seconds < 0.5]
        num_done = 0
        say(f"{'runs':>6} {'RSS MiB':>9} {'servers MiB':>12} {'descriptors':>12} {'processes':>10}")
        while True:
            say("{:>6} {:>9.1f} {:>12.1f} {:>12} {:>10}".format(num_done, *size()))
            if num_done >= arguments.num_runs:
                return 0
            batch = list(itertools.islice(itertools.cycle(quick), min(1000, arguments.num_runs - num_done)))
            pool.score_many(batch)
            num_done += len(batch)


def size() -> tuple[float, float, int, int]:
    """Resident MiB of this process and of its descendants, its descriptors, and its descendants."""
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    below.remove(os.getpid())
    return resident("self"), sum(resident(pid) for pid in below), len(os.listdir("/proc/self/fd")), len(below)


def resident(pid: Any) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
