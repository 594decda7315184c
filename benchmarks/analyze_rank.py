"""The numerical rank of an update, and its spectrum: `core.rank` and `core.spectrum` against `torch.linalg`, same results.

    python -m benchmarks.analyze_rank
    python -m benchmarks.analyze_rank --sizes 1024 --rounds 5

Square float32 updates of four kinds; the rounds of the two sides alternate, and a ratio is of the two medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from rlpost.core.rank import numerical_rank


def updates(size: int) -> dict[str, Tensor]:
    """Of a weight of spread 0.02: of every entry, of 1 % of them, of 16 directions, and of as small steps as RL makes, stored in
    bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dense, stored = 1e-3 * normal(size, size), (0.02 * normal(size, size)).bfloat16()
    return {
        "dense": dense,
        "1 % of the entries": dense * (torch.rand(size, size, generator=generator) < 0.01),
        "rank 16": 1e-3 * normal(size, 16) @ normal(16, size),
        "absorbed": (stored.float() + 1e-5 * normal(size, size)).bfloat16().float() - stored.float(),
    }


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'size':>5} {'update':<20} {'rank':>5} {'matrix_rank':>12} {'numerical_rank':>15} {'ratio':>6}")
    for size in options.sizes:
        for name, update in updates(size).items():
            found = numerical_rank(update)
            assert found == int(torch.linalg.matrix_rank(update))
            pairs = [
                (seconds(lambda: torch.linalg.matrix_rank(update)), seconds(lambda: numerical_rank(update)))  # noqa: B023
                for _ in range(options.rounds)
            ]
            theirs, ours = (median(times) for times in zip(*pairs, strict=True))
            print(f"{size:5} {name:<20} {found:5} {theirs:10.2f} s {ours:13.2f} s {theirs / ours:6.1f}", flush=True)


if __name__ == "__main__":
    main()
