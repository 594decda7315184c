"""Whether every method learns: held-out accuracy before and after the quickstart's math stage, from one warm model.

    python -m benchmarks.learning [--seeds 3] [--methods GRPO GSPO ...]

The methods are the rows of docs/algorithms.md, with the settings written there; rows of the preference table are trained
online, on pairs of their own rollouts.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, RUNS, rows, train, warm_model

ROW = re.compile(r"^\| (?P<method>[^|]+) \| `(?P<settings>[a-z_]+ = [^`]*)` \|.*https?://", re.MULTILINE)


def methods() -> dict[str, dict[str, Any]]:
    """Method to its `algo` settings, as docs/algorithms.md has them."""
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    return {m["method"]: tomllib.loads(f"algo = {{ {m['settings']} }}")["algo"] for m in ROW.finditer(text)}


def toml(value: Any) -> str:
    """An inline table, from plain data; TOML's scalars are JSON's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(value)


def run(method: str, settings: dict[str, Any], model_path: Path, seed: int, num_steps: int) -> tuple[float, float]:
    """Held-out accuracy before and after."""
    run_dir = RUNS / "learning" / f"{re.sub(r'[^a-z0-9]+', '-', method.lower())}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    name = "online_dpo" if "loss" in settings else "ppo" if "critic" in settings else "grpo"
    algo = {"name": name, "group_size": 8, "max_staleness": 2, **settings}
    train(
        run_dir,
        f"model={{path='{model_path}'}}",
        f"stage=[{{name='math', data='math', steps={num_steps}, algo={toml(algo)}}}]",
        "eval=[{name='math', data='math_heldout', num_prompts=512, max_response_tokens=32}]",
        f"seed={seed}",
        "tracking.wandb='disabled'",
    )
    accuracies = [row["accuracy"] for row in rows(run_dir / "eval.jsonl")]
    return accuracies[0], accuracies[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--methods", nargs="*", help="rows of docs/algorithms.md; all by default")
    arguments = parser.parse_args()
    known = methods()
    model_path = warm_model()
    print(f"{'method':<28} {'before':>8} {'after':>24} {'gain':>8}", flush=True)
    for method in arguments.methods or known:
        results = [run(method, known[method], model_path, seed, arguments.steps) for seed in range(arguments.seeds)]
        before, after = statistics.fmean(b for b, _ in results), [a for _, a in results]
        shown = ", ".join(f"{100 * a:.1f}" for a in after)
        print(
            f"{method:<28} {100 * before:>8.1f} {shown:>24} {100 * (statistics.fmean(after) - before):>8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
