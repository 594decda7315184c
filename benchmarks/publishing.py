"""What a version costs: bytes at several learning rates, and how long samplers stand still, up to 1.5 B parameters.

    python -m benchmarks.publishing             # the quickstart's math stage in bfloat16, by learning rate
    python -m benchmarks.publishing --growth    # vLLM models of growing size: seconds without a token per update

The first runs `rlpost train` and reads metrics.jsonl. The second feeds one `VllmSampler` per size with versions of which 1 %
changed, as patches, and with complete ones; each update proves by checksum every value the model holds. Random weights,
bfloat16, one thread.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import ROOT, RUNS, describe, train, warm_model

LEARNING_RATES = (1e-6, 1e-5, 1e-4, 1e-3)
SIZES = {"10 M": (320, 8), "100 M": (896, 10), "500 M": (1536, 18), "1.5 B": (2048, 30)}
"""Hidden size and layers of Llama models, with three times the hidden size inside MLPs."""
UPDATES = 5
DENSITY = 0.01


def by_learning_rate(num_steps: int) -> None:
    for lr in LEARNING_RATES:
        run_dir = RUNS / f"publishing-{lr:g}"
        shutil.rmtree(run_dir, ignore_errors=True)
        rows = train(
            run_dir,
            f"model={{path='{warm_model()}'}}",
            f"stage=[{{name='math', data='math', steps={num_steps}, lr={lr}}}]",
            "eval=[]",
            "sampler.dtype='bfloat16'",
            "learner.dtype='bfloat16'",
            "tracking.wandb='disabled'",
        )
        changes = {row["publish/version"]: row for row in rows if "publish/unchanged_fraction" in row}.values()
        print(f"lr {lr:g}")
        print(
            describe(
                "  bit-identical to the version before", [100 * r["publish/unchanged_fraction"] for r in changes], "%"
            )
        )
        smaller = [row["publish/full_bytes"] / max(row["publish/bytes"], 1) for row in changes]
        print(describe("  bytes, times smaller than complete", smaller, "x"))
        for name, key in (("export", "publish/export_seconds"), ("update", "time/sampler-0/update")):
            print(describe(f"  {name}", [1e3 * row[key] for row in changes if key in row], "ms"), flush=True)


def build(size: str, path: Path) -> None:
    """A model directory with random bfloat16 weights and the warm model's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    hidden, layers = SIZES[size]
    tokenizer = AutoTokenizer.from_pretrained(warm_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def grow(size: str) -> None:
    """In a process of its own: one sampler of this size, updated by changes and by complete versions."""
    import torch

    from rlpost.core.patch import diff
    from rlpost.core.weights import bits
    from rlpost.engines.pretrained import StoredTensors
    from rlpost.engines.vllm_sampler import VllmSampler
    from rlpost.types import WeightImage

    torch.set_num_threads(1)
    path = RUNS / "publishing-models" / size.replace(" ", "")
    if not (path / "config.json").exists():
        build(size, path)
    sampler = VllmSampler(path, max_model_len=256, max_num_seqs=16, kv_cache_bytes=256 << 20)
    stored = StoredTensors(path)
    tensors = {name: stored.tensor(name).clone() for name in stored.names}
    num_values = sum(tensor.numel() for tensor in tensors.values())
    generator = torch.Generator().manual_seed(0)
    complete = diff(None, WeightImage(version=0, tensors=tensors))
    whole, changed = [], []
    for _ in range(3):
        started = time.perf_counter()
        sampler.update(complete)
        whole.append(time.perf_counter() - started)
    del complete
    for version in range(1, UPDATES + 1):
        after = {}
        for name, tensor in tensors.items():
            after[name] = tensor.clone()
            count = max(round(DENSITY * tensor.numel()), 1)
            bits(after[name]).view(-1)[torch.randint(tensor.numel(), (count,), generator=generator)] += 1
        patch = diff(WeightImage(version=version - 1, tensors=tensors), WeightImage(version=version, tensors=after))
        tensors = after
        started = time.perf_counter()
        sampler.update(patch)
        changed.append(time.perf_counter() - started)
    print(
        f"{size:>6} ({num_values / 1e6:,.0f} M)   1 % changed {1e3 * statistics.median(changed):8.1f} ms"
        f"   complete {1e3 * statistics.median(whole):8.1f} ms   the first, with the map {1e3 * whole[0]:8.1f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.size:
        grow(arguments.size)
    elif arguments.growth:
        from rlpost.engines.vllm_sampler import environment

        for size in SIZES:
            command = [sys.executable, "-m", "benchmarks.publishing", "--size", size]
            subprocess.run(command, cwd=ROOT, env=os.environ | environment("cpu"), check=True)
    else:
        by_learning_rate(arguments.steps)


if __name__ == "__main__":
    main()
