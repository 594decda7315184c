"""Seconds from the command to the first optimizer step of RL, with a warm model on disk.

    python -m benchmarks.time_to_first_step

The quickstart's math stage from its warm model, without evaluation. A new process each time: interpreter, Ray, vLLM,
DeepSpeed, verifiers, one step of 128 rollouts.
"""

from __future__ import annotations

import argparse
import shutil
import time

from benchmarks.common import RUNS, describe, rows, train, warm_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    model_path = warm_model()
    first_step, ready = [], []
    for _ in range(arguments.runs):
        run_dir = RUNS / "first-step"
        shutil.rmtree(run_dir, ignore_errors=True)
        started = time.time()
        steps = train(
            run_dir,
            f"model={{path='{model_path}'}}",
            "stage=[{name='math', data='math', steps=1}]",
            "eval=[]",
            "tracking.wandb='disabled'",
        )
        first_step.append(steps[0]["time"] - started)
        events = rows(run_dir / "events.jsonl")
        ready.append(next(row["time"] for row in events if row["event"] == "ready") - started)
    print(describe("workers started", ready, "s"))
    print(describe("first optimizer step done", first_step, "s"))


if __name__ == "__main__":
    main()
