"""Rollouts trained per second with an observer of every version against without: what watching a run costs.

    python -m benchmarks.observer

The quickstart's math stage from its warm model, asynchronous, on two cores that are both busy: a step takes half a second,
so this is the dearest case. Runs alternate, one of each kind per seed; the rate is that of `benchmarks.async_vs_sync`.
"""

from __future__ import annotations

import argparse

from benchmarks.async_vs_sync import run
from benchmarks.common import RUNS, describe, rows, warm_model

OBSERVED, ALONE = "publish={observer={}}", "publish={}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    arguments = parser.parse_args()
    model_path = warm_model()
    ratios = []
    for seed in range(arguments.seeds):
        alone, observed = (
            run("asynchronous", model_path, seed, arguments.steps, [publish])["rollouts_per_s"]
            for publish in (ALONE, OBSERVED)
        )
        ratios.append(observed / alone)
        measured = rows(RUNS / f"asynchronous-{seed}" / "analysis.jsonl")
        print(
            f"seed {seed}: {observed:.0f} against {alone:.0f} rollouts/s, {len(measured)} of {arguments.steps} versions measured",
            flush=True,
        )
    print(describe("with an observer / without", ratios))


if __name__ == "__main__":
    main()
