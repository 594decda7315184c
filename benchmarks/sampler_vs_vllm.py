"""Tokens per second of rlpost's sampler worker against bare vLLM (`LLM.generate`) on the same prompts.

    python -m benchmarks.sampler_vs_vllm

Two processes on one core each stay up and take turns, round by round, so that a noisy machine treats both alike. Bare
vLLM is timed twice: asked for what RL needs (the log-prob of each sampled token, a seed per request), and asked for text
only. The worker does more than either: it runs behind Ray, packs its groups for the object store and decodes their text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import ROOT, RUNS, describe, warm_model

PROMPTS, GROUP_SIZE, MAX_TOKENS, MAX_MODEL_LEN, MAX_NUM_SEQS = 32, 8, 48, 256, 256
KV_CACHE_MIB = 64


def prompts(model_path: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    from rlpost.config import GeneratedData
    from rlpost.data.sources import load_generated

    data = GeneratedData(source="generated", families=("arithmetic",))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return [list(prompt.token_ids) for prompt in load_generated(data, tokenizer, seed=0, limit=PROMPTS)]


def bare(model_path: Path, dtype: str) -> None:
    """Serve rounds on standard input: "rl" or "text"."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=str(model_path),
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        kv_cache_memory_bytes=KV_CACHE_MIB << 20,
        enforce_eager=True,
        disable_log_stats=True,
        distributed_executor_backend="uni",
        enable_chunked_prefill=False,
        max_num_batched_tokens=8192,
        logprobs_mode="processed_logprobs",
    )
    requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts(model_path) for _ in range(GROUP_SIZE)]
    for line in sys.stdin:
        rl = line.strip() == "rl"
        params = [
            SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS, seed=i if rl else None, logprobs=0 if rl else None)
            for i in range(len(requests))
        ]
        started = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        report(sum(len(output.outputs[0].token_ids) for output in outputs), seconds)


def worker(model_path: Path, dtype: str) -> None:
    """Serve rounds on standard input, through the worker process that a run would start."""
    import ray

    from rlpost.config import SamplerConfig
    from rlpost.pipeline.ports import GroupRequest
    from rlpost.types import Prompt
    from rlpost.workers.ray_workers import start_sampler

    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    config = SamplerConfig(dtype=dtype, max_num_seqs=MAX_NUM_SEQS, kv_cache_mib=KV_CACHE_MIB)  # pyright: ignore[reportArgumentType]
    sampler = start_sampler("sampler-0", model_path, config, max_model_len=MAX_MODEL_LEN, log_dir=RUNS / "logs")
    requests = [
        GroupRequest(
            prompt=Prompt(id=str(i), token_ids=tuple(ids), task="math", reference={}),
            seeds_G=tuple(range(i * GROUP_SIZE, (i + 1) * GROUP_SIZE)),
            temperature=1.0,
            max_tokens=MAX_TOKENS,
        )
        for i, ids in enumerate(prompts(model_path))
    ]

    async def round_trip() -> int:
        results = await asyncio.gather(*(sampler.sample(request) for request in requests))
        return sum(sum(summary.num_tokens_G) for _, summary in results)

    asyncio.run(round_trip())
    for _ in sys.stdin:
        started = time.perf_counter()
        num_tokens = asyncio.run(round_trip())
        report(num_tokens, time.perf_counter() - started)


def report(num_tokens: int, seconds: float) -> None:
    sys.stdout.write("FIGURE " + json.dumps([num_tokens, seconds]) + "\n")
    sys.stdout.flush()


class Side:
    """One of the two processes: give it a round, get its tokens per second."""

    def __init__(self, role: str, model_path: Path, dtype: str) -> None:
        from rlpost.engines.vllm_sampler import environment

        command = [
            sys.executable,
            "-m",
            "benchmarks.sampler_vs_vllm",
            "--role",
            role,
            "--model",
            str(model_path),
            "--dtype",
            dtype,
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment("cpu", num_threads=1)},
        )

    def round(self, what: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("FIGURE "):
                num_tokens, seconds = json.loads(line.removeprefix("FIGURE "))
                return num_tokens / seconds
        raise RuntimeError(f"the process ended with {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("bare", "worker"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="default: the quickstart's warm model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    model_path = arguments.model or warm_model()
    if arguments.role:
        {"bare": bare, "worker": worker}[arguments.role](model_path, arguments.dtype)
        return
    sides = {role: Side(role, model_path, arguments.dtype) for role in ("bare", "worker")}
    for side in sides.values():
        side.round("rl")
    figures: dict[str, list[float]] = {"worker": [], "bare, rl": [], "bare, text": []}
    for _ in range(arguments.rounds):
        figures["worker"].append(sides["worker"].round("rl"))
        figures["bare, rl"].append(sides["bare"].round("rl"))
        figures["bare, text"].append(sides["bare"].round("text"))
    for side in sides.values():
        side.close()
    for name, values in figures.items():
        print(describe(name, values, "tokens/s"))
    for name in ("bare, rl", "bare, text"):
        ratios = [a / b for a, b in zip(figures["worker"], figures[name], strict=True)]
        print(describe(f"worker / ({name})", ratios))


if __name__ == "__main__":
    main()
