"""Rows laid end to end (`engines.packing`) against padded rows, a fixed number at a time: learner steps, long-tailed lengths.

    python -m benchmarks.packing

Lengths are lognormal, cut to [16, 1024], prompt included. Both forms get the same rollouts, the same learner (DeepSpeed, one
rank, CPU, float32) and the same token memory: the padded form takes rows as they come, as many as fit the budget when all
are of the greatest length, and computes each as long as the longest of its micro-batch. Tokens are counted without padding.
The balance over ranks is arithmetic: the tokens the busiest rank computes over the ranks' mean of real ones.
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import describe
from rlpost.core.batching import plan_micro_batches
from rlpost.core.objective import PolicyGradient, StageSpec
from rlpost.core.optimizers import AdamW
from rlpost.engines.deepspeed_learner import DeepSpeedLearner, init_distributed
from rlpost.engines.packing import Packing
from rlpost.engines.scratch import build_model
from rlpost.types import Rollout, VersionSpan

SHORTEST, LONGEST = 16, 1024
Plan = Callable[..., list[list[int]]]


def draw_lengths(count: int, *, seed: int, median: float = 150.0, sigma: float = 1.0) -> list[int]:
    """Tokens per rollout, prompt included."""
    generator = random.Random(seed)
    drawn = (round(median * generator.lognormvariate(0.0, sigma)) for _ in range(count))
    return [min(LONGEST, max(SHORTEST, length)) for length in drawn]


def make_rollout(length: int, seed: int) -> Rollout:
    """A quarter of it prompt."""
    generator = torch.Generator().manual_seed(seed)
    num_prompt = length // 4
    mask = torch.arange(length) >= num_prompt
    return Rollout(
        token_ids=torch.randint(0, 250, (length,), generator=generator),
        loss_mask=mask,
        sampler_logprobs=torch.where(mask, -5.0, 0.0),
        temperature=1.0,
        spans=(VersionSpan(version=0, start=0, end=length - num_prompt),),
        finish_reason="stop",
        text="",
    )


def make_learner(model_path: Path, micro_batch_tokens: int) -> DeepSpeedLearner:
    """On one rank and one thread, with a model of 4 layers of 128 that it writes to `model_path`."""
    build_model(model_path, hidden_size=128, num_layers=4, num_heads=4, vocab_size=448, seed=0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    init_distributed(rank=0, world_size=1, master_port=port)
    learner = DeepSpeedLearner(
        model_path,
        dtype=torch.float32,
        zero_stage=1,
        micro_batch_tokens=micro_batch_tokens,
        serve_dtype=torch.float32,
        rank=0,
        world_size=1,
    )
    learner.begin_stage(StageSpec(objective=PolicyGradient(), optimizer=AdamW(), num_threads=1))
    return learner


def step_seconds(learner: DeepSpeedLearner, rollouts: Sequence[Rollout]) -> float:
    """Of one step, forward to update."""
    advantages = [1.0 if index % 2 else -1.0 for index in range(len(rollouts))]
    started = time.perf_counter()
    learner.accumulate(rollouts, advantages, learner_version=0, max_staleness=0)
    learner.step(denominator=float(sum(int(r.loss_mask.sum()) for r in rollouts)), lr=1e-6)
    return time.perf_counter() - started


def in_arrival_order(lengths: Sequence[int], *, max_tokens: int, num_ranks: int = 1) -> list[list[int]]:
    """What one writes first: the next few rows, as many as always fit; ranks take turns."""
    rows = max(1, max_tokens // LONGEST)
    batches = [list(range(start, min(start + rows, len(lengths)))) for start in range(0, len(lengths), rows)]
    return batches + [[] for _ in range(-len(batches) % num_ranks)]


def _as_long_as_the_longest(lengths_B: Tensor, num_positions: int) -> Packing:
    return Packing.of(torch.full_like(lengths_B, num_positions), num_positions)


@contextmanager
def padded() -> Iterator[None]:
    """While it holds, a learner of this process computes padded rows, padding included."""
    with (
        mock.patch("rlpost.engines.deepspeed_learner.plan_micro_batches", in_arrival_order),
        mock.patch("rlpost.engines.forward.Packing", SimpleNamespace(of=_as_long_as_the_longest)),
    ):
        yield


def throughput(options: argparse.Namespace) -> None:
    forms = {"padded": padded, "end to end": nullcontext}
    rates: dict[str, list[float]] = {name: [] for name in forms}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        learner = make_learner(Path(folder) / "model", options.micro_batch_tokens)
        step_seconds(learner, [make_rollout(LONGEST, 0)] * 2)  # warm
        for seed in range(options.rounds):
            lengths = draw_lengths(options.rows, seed=seed)
            rollouts = [make_rollout(length, row) for row, length in enumerate(lengths)]
            took = {}
            for name in sorted(forms, reverse=bool(seed % 2)):
                with forms[name]():
                    took[name] = step_seconds(learner, rollouts)
                rates[name].append(sum(lengths) / took[name])
            ratios.append(took["padded"] / took["end to end"])
        learner.close()
    for name, values in rates.items():
        print(describe(name, values, "tokens/s"))
    print(describe("padded / end to end, time of a step", ratios))


def balance(options: argparse.Namespace) -> None:
    print(f"{'ranks':>5} {'rows':>5}   busiest rank / mean of real tokens: padded, end to end (median of 50 draws)")
    for num_ranks in (1, 2, 8):
        for rows in (16, 128, 512):
            before, after = (
                statistics.median(_busiest(plan, rows, num_ranks, seed, options) for seed in range(50))
                for plan in (in_arrival_order, plan_micro_batches)
            )
            print(f"{num_ranks:5} {rows:5} {before:39.2f} {after:11.2f}")


def _busiest(plan: Plan, rows: int, num_ranks: int, seed: int, options: argparse.Namespace) -> float:
    lengths = draw_lengths(rows, seed=seed)
    batches = plan(lengths, max_tokens=options.micro_batch_tokens, num_ranks=num_ranks)
    if plan is in_arrival_order:
        tokens = [len(batch) * max((lengths[row] for row in batch), default=0) for batch in batches]
    else:
        tokens = [sum(lengths[row] for row in batch) for batch in batches]
    return max(sum(tokens[rank::num_ranks]) for rank in range(num_ranks)) * num_ranks / sum(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="rollouts of a timed step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    options = parser.parse_args()
    balance(options)
    throughput(options)


if __name__ == "__main__":
    main()
