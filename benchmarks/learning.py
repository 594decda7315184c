"""Whether every method learns: held-out accuracy before and after the quickstart's math stage, from one warm model.

    python -m benchmarks.learning [--seeds 0 1 2] [--methods GRPO GSPO ...]

The methods are the rows of docs/algorithms.md, with the settings written there (rows of the preference table are trained
online, on their own rollouts; critics are given a learning rate for so small a model), and what can be combined
with any of them: an adapter, a subnetwork, rounds. Last, what staleness costs: samplers that decode nine steps' groups at
once, so that a group is as old as it may be when it is trained.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, RUNS, rows, train, warm_model

ROW = re.compile(r"^\| (?P<method>[^|]+) \| `(?P<settings>[a-z_]+ = [^`]*)` \|.*https?://", re.MULTILINE)
CRITIC_LR = 3e-4
STALE = {"name": "grpo", "max_staleness": 8}
AHEAD = ("sampler.max_num_seqs=1152", "sampler.kv_cache_mib=512")
"""Room for the groups of nine steps, 16 x 8 rollouts each, at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    algo: dict[str, Any]
    stage: dict[str, Any] = field(default_factory=dict)
    """Other keys of the stage."""
    num_rounds: int = 1
    """Stages that the steps are divided among."""
    overrides: tuple[str, ...] = ()


def methods() -> dict[str, dict[str, Any]]:
    """Method to its `algo` settings, as docs/algorithms.md has them."""
    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    return {m["method"]: tomllib.loads(f"algo = {{ {m['settings']} }}")["algo"] for m in ROW.finditer(text)}


def variants(model_path: Path, seed: int) -> dict[str, Variant]:
    """By name, each after those whose export it begins from."""
    listed = {name: Variant(algo=_named(settings)) for name, settings in methods().items()}
    grpo, dpo = {"name": "grpo"}, {"name": "online_dpo", "loss": "dpo", "beta": 0.1}
    updated = {
        "select": "update",
        "before": str(model_path),
        "after": str(run_directory("GRPO", seed) / "exports" / "math_0"),
    }
    principal = {"select": "principal", "rank": 32, "density": 0.05}
    return listed | {
        "LoRA, rank 8": Variant(algo=grpo, stage={"lr": 1e-3}, overrides=("learner.lora={rank = 8, alpha = 16}",)),
        "the entries GRPO changed": Variant(algo=grpo, stage={"subnetwork": updated}),
        "principal entries, 5 %": Variant(algo=grpo, stage={"subnetwork": principal, "lr": 1e-3}),
        "their complement": Variant(algo=grpo, stage={"subnetwork": principal | {"control": "complement"}, "lr": 1e-3}),
        "DPO, two rounds": Variant(algo=dpo, num_rounds=2),
        "staleness 8, uncorrected": Variant(
            algo=STALE | {"proximal": "learner", "weight_low": 1.0, "weight_high": 1.0}, overrides=AHEAD
        ),
        "staleness 8, clipped": Variant(algo=STALE, overrides=AHEAD),
        "staleness 8, TIS": Variant(algo=STALE | {"proximal": "learner", "weight_high": 2.0}, overrides=AHEAD),
    }


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    if "critic" in settings:
        return {"name": "ppo", **settings, "critic": settings["critic"] | {"lr": CRITIC_LR}}
    return {"name": "online_dpo" if "loss" in settings else "grpo", **settings}


def run_directory(method: str, seed: int) -> Path:
    return RUNS / "learning" / f"{re.sub(r'[^a-z0-9]+', '-', method.lower())}-{seed}"


def toml(value: Any) -> str:
    """An inline table, from plain data; TOML's scalars are JSON's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(entry)}" for key, entry in value.items()) + "}"
    return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value)


def run(method: str, variant: Variant, model_path: Path, seed: int, num_steps: int) -> tuple[float, float]:
    """Held-out accuracy before and after."""
    run_dir = run_directory(method, seed)
    shutil.rmtree(run_dir, ignore_errors=True)
    algo = {"group_size": 8, "max_staleness": 2, **variant.algo}
    stages = [
        {
            "name": f"math_{index}",
            "data": "math",
            "steps": num_steps // variant.num_rounds,
            "algo": algo,
            **variant.stage,
        }
        for index in range(variant.num_rounds)
    ]
    train(
        run_dir,
        f"model={{path='{model_path}'}}",
        f"stage={toml(stages)}",
        "eval=[{name='math', data='math_heldout', num_prompts=512, max_response_tokens=32}]",
        f"seed={seed}",
        "tracking.wandb='disabled'",
        *variant.overrides,
    )
    accuracies = [row["accuracy"] for row in rows(run_dir / "eval.jsonl")]
    return accuracies[0], accuracies[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--methods", nargs="*", help="all by default")
    arguments = parser.parse_args()
    model_path = warm_model()
    print(f"{'method':<28} {'before':>8} {'after':>24} {'gain':>8}", flush=True)
    for method in arguments.methods or variants(model_path, 0):
        results = [
            run(method, variants(model_path, seed)[method], model_path, seed, arguments.steps)
            for seed in arguments.seeds
        ]
        before, after = statistics.fmean(b for b, _ in results), [a for _, a in results]
        shown = ", ".join(f"{100 * a:.1f}" for a in after)
        print(
            f"{method:<28} {100 * before:>8.1f} {shown:>24} {100 * (statistics.fmean(after) - before):>8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
