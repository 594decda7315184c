"""The numerical rank of an update, and its spectrum: `core.rank` and `core.spectrum` against `torch.linalg.matrix_rank`, which
needs the spectrum; the ranks have to be the same.

    python -m benchmarks.analyze_rank
    python -m benchmarks.analyze_rank --sizes 1024 --rounds 5

Square float32 updates of four kinds; the three alternate, and a ratio is of two medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rlpost.core.rank import numerical_rank
from rlpost.core.spectrum import ranks, singular_values


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


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'size':>5} {'update':<18} {'rank':>5} {'matrix_rank':>12} {'numerical_rank':>21} {'singular_values':>21}")
    for size in options.sizes:
        for name, update in updates(size).items():
            expected, rounds = numerical_rank(update), []
            for _ in range(options.rounds):
                direct, theirs = timed(lambda: int(torch.linalg.matrix_rank(update)))  # noqa: B023
                counted, found = timed(lambda: numerical_rank(update))  # noqa: B023
                spectrum, sigma_R = timed(lambda: singular_values(torch.zeros(()), update))  # noqa: B023
                assert theirs == expected == found == ranks(sigma_R, (size, size)).numerical
                rounds.append((direct, counted, spectrum))
            direct, counted, spectrum = (median(times) for times in zip(*rounds, strict=True))
            print(
                f"{size:5} {name:<18} {expected:5} {direct:10.2f} s {counted:10.2f} s {direct / counted:5.1f} x"
                f" {spectrum:10.2f} s {direct / spectrum:5.1f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
