"""Rollouts trained per second: asynchronous (max_staleness = 2) against synchronous (0), at equal final accuracy.

    python -m benchmarks.async_vs_sync

The quickstart's math stage from its warm model, one sampler and one learner on a core each. Runs alternate, one of each
kind per seed. The rate is taken from the end of the tenth step to the end of the last: engines are warm then, and the
evaluation, which happens after the stage, is outside.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from benchmarks.common import RUNS, describe, rows, train, warm_model

FIRST_STEP = 10
STALENESS = {"asynchronous": 2, "synchronous": 0}


def run(kind: str, model_path: Path, seed: int, num_steps: int, overrides: list[str]) -> dict[str, float]:
    run_dir = RUNS / f"{kind}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    steps = train(
        run_dir,
        f"model={{path='{model_path}'}}",
        f"stage=[{{name='math', data='math', steps={num_steps}}}]",
        "eval=[{name='math', data='math_heldout', num_prompts=256, samples=2, max_response_tokens=32}]",
        f"defaults.algo.max_staleness={STALENESS[kind]}",
        f"seed={seed}",
        "tracking.wandb='disabled'",
        *overrides,
    )
    timed = steps[FIRST_STEP:]
    seconds = timed[-1]["time"] - steps[FIRST_STEP - 1]["time"]
    trained = sum(row["perf/rollouts_per_s"] * row["timing_s/step"] for row in timed)
    last = rows(run_dir / "eval.jsonl")[-1]
    return {
        "rollouts_per_s": trained / seconds,
        "accuracy": last["accuracy"],
        "learner_waited": sum(row["timing_s/wait_for_rollouts"] for row in timed) / seconds,
        "sampler_waited": sum(row.get("time/sampler-0/wait", 0.0) for row in timed) / seconds,
        "staleness": sum(row["staleness/group_mean"] for row in timed) / len(timed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    model_path = warm_model()
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in STALENESS}
    for seed in range(arguments.seeds):
        for kind in STALENESS:
            results[kind].append(run(kind, model_path, seed, arguments.steps, arguments.overrides))
            print(f"seed {seed} {kind}: {results[kind][-1]}", flush=True)
    for kind in STALENESS:
        for figure in results[kind][0]:
            print(describe(f"{kind}: {figure}", [result[figure] for result in results[kind]]))
    pairs = zip(results["asynchronous"], results["synchronous"], strict=True)
    print(describe("asynchronous / synchronous", [a["rollouts_per_s"] / b["rollouts_per_s"] for a, b in pairs]))


if __name__ == "__main__":
    main()
