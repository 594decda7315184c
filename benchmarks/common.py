"""What the benchmarks share: a warm model, runs of recipes as a user starts them, and ratios of paired figures."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmarks"
QUICKSTART = ROOT / "recipes" / "quickstart.toml"


def train(run_dir: Path, *overrides: str, recipe: Path = QUICKSTART) -> list[dict[str, Any]]:
    """`rlpost train` in a process of its own; returns the rows of its metrics.jsonl.

    Raises:
        RuntimeError: with the end of its output, when it fails.
    """
    command = [sys.executable, "-m", "rlpost.cli", "train", str(recipe), f"run_dir={run_dir}", *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-3000:]}")
    return rows(run_dir / "metrics.jsonl")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def warm_model() -> Path:
    """The quickstart's model after its warm-up stage, made on first use (about two minutes on 2 cores)."""
    run_dir = RUNS / "warm"
    export = run_dir / "exports" / "warmup"
    if not (export / "config.json").exists():
        stage = "stage=[{name='warmup', data='mixture', algo={name='sft'}, steps=400, prompts_per_step=96, lr=2e-3,"
        stage += " lr_warmup_steps=40, lr_schedule='linear'}]"
        train(run_dir, stage, "tracking.wandb='disabled'")
    return export


def describe(name: str, values: Sequence[float], unit: str = "") -> str:
    """One line: the median, and the range it lies in."""
    middle = statistics.median(values)
    return f"{name:<44} {middle:10.3g} {unit:<12} (min {min(values):.3g}, max {max(values):.3g}, n = {len(values)})"
