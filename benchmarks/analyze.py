"""How sparse the update between two checkpoints is: `rlpost analyze` against the paper's way, which has both models in memory.

    python -m benchmarks.analyze                    # Qwen2.5-1.5B's shape, pairs of both ways
    python -m benchmarks.analyze --shape 8b         # Llama-3-8B's, `rlpost analyze` alone: 32 GB on disk
    python -m benchmarks.analyze --shape 8b --clean # and the checkpoints are deleted

Random bfloat16 weights of spread 0.02, of which 2 % are one bfloat16 step larger in the second checkpoint; both are written
in pieces, and kept. The paper's way (arXiv 2505.11711; `core.sparsity`) is as lean as it can be in plain torch: a weight at a
time is subtracted and compared with zero, exactly and at five tolerances, while its code keeps every difference. All counts
have to be the same. Each run is a process of its own, and its time includes its start.

Memory is the largest that was seen, twice: `anonymous` is without pages of files that are mapped into memory, which the
operating system takes back when it needs them, and `resident` with them. The paper's way reads the models into memory of
their own; with `--mapped` it maps them, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import ROOT, RUNS, describe
from rlpost.core.sparsity import TOLERANCES
from rlpost.core.weights import bits
from rlpost.engines.pretrained import INDEX, StoredTensors, stream_tensors

SIGMA, DENSITY = 0.02, 0.02
POOL = 1 << 26
"""Normal numbers that are drawn; a weight takes them from a place of its own on, again and again."""
PAUSE = 0.01
"""Seconds between two looks at a process's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    biases: bool
    layers_per_file: int
    head_size: int = 128

    def files(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """The shapes of each file's weights."""
        hidden, inner = self.hidden, self.intermediate
        sizes = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for name, heads in sizes.items():
                shapes[f"{prefix}self_attn.{name}.weight"] = (heads * self.head_size, hidden)
                if self.biases:
                    shapes[f"{prefix}self_attn.{name}.bias"] = (heads * self.head_size,)
            shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, self.heads * self.head_size)
            shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
            shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
            shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
            if (layer + 1) % self.layers_per_file == 0 and layer + 1 < self.layers:
                yield shapes
                shapes = {}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, hidden)
        yield shapes


SHAPES = {
    "1.5b": Model(
        hidden=1536,
        layers=28,
        heads=12,
        kv_heads=2,
        intermediate=8960,
        vocabulary=151_936,
        tied=True,
        biases=True,
        layers_per_file=28,
    ),
    "8b": Model(
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        intermediate=14_336,
        vocabulary=128_256,
        tied=False,
        biases=False,
        layers_per_file=8,
    ),
}
"""Qwen2.5-1.5B's and Llama-3-8B's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Seconds by the clock and of the process's own, and the largest MiB."""

    wall: float
    cpu: float
    anonymous: float
    resident: float


def weight(pool_N: Tensor, seed: int, shape: tuple[int, ...], *, moved: bool) -> Tensor:
    """The same values for the same seed, of which `moved` moves some."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(shape, dtype=torch.bfloat16)
    start, flat = int(torch.randint(POOL, (), generator=generator)), values.view(-1)
    for low in range(0, len(flat), POOL):
        piece = flat[low : low + POOL]
        first = pool_N[start : start + len(piece)]
        piece[: len(first)] = first
        piece[len(first) :] = pool_N[: len(piece) - len(first)]
    if moved:
        bits(flat)[torch.randint(len(flat), (round(DENSITY * len(flat)),), generator=generator)] += 1
    return values


def write_checkpoint(model: Model, path: Path, *, moved: bool) -> None:
    """In files as large models have them, with an index, one weight in memory at a time; `path` is never half there."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pool_N = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(SIGMA).bfloat16()
    files = list(model.files())
    places: dict[str, str] = {}
    seeds: dict[str, int] = {}
    for number, shapes in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        seeds |= {name: len(seeds) + i for i, name in enumerate(shapes)}
        layout = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        stream_tensors(
            layout,
            lambda name: weight(pool_N, seeds[name], shapes[name], moved=moved),  # noqa: B023 - used at once
            partial / file,
        )
        places |= dict.fromkeys(shapes, file)
    (partial / INDEX).write_text(json.dumps({"weight_map": places}))
    partial.rename(path)


def papers_way(before: Path, after: Path, *, mapped: bool) -> dict[str, int]:
    """Entries whose difference is close to zero by each tolerance, and that are zero."""
    old, new = (load(path, mapped=mapped) for path in (before, after))
    counts = dict.fromkeys([*map(str, TOLERANCES), "zero"], 0)
    for name in old:
        delta = new[name] - old[name]
        zero = torch.zeros_like(delta)
        for tolerance in TOLERANCES:
            counts[str(tolerance)] += int(torch.isclose(delta, zero, atol=tolerance).sum())
        counts["zero"] += int((delta == 0).sum())
    return counts


def load(path: Path, *, mapped: bool) -> Mapping[str, Tensor]:
    stored = StoredTensors(path)
    return {name: stored.tensor(name) if mapped else stored.tensor(name).clone() for name in stored.names}


def measured(command: list[str]) -> tuple[Run, str]:
    """Runs it; what it prints, too.

    Raises:
        RuntimeError: when it fails.
    """
    started, anonymous, resident = time.perf_counter(), 0, 0
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "RssAnon" in fields:  # not of one that is ending
            anonymous = max(anonymous, int(fields["RssAnon"].split()[0]))
            resident = max(resident, int(fields["VmHWM"].split()[0]))
        time.sleep(PAUSE)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(code)
    assert process.stdout is not None
    with process.stdout as stream:
        printed = stream.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    run = Run(wall=wall, cpu=usage.ru_utime + usage.ru_stime, anonymous=anonymous / 1024, resident=resident / 1024)
    return run, printed


def analyzed(before: Path, after: Path) -> tuple[Run, dict[str, int]]:
    output = before.parent / "analysis.json"
    run, _ = measured(["-m", "rlpost.cli", "analyze", str(before), str(after), "-o", str(output)])
    counts = json.loads(output.read_text())["updates"][str(after)]["kinds"]["all"]
    within = {str(float(tolerance)): count for tolerance, count in counts["within"].items()}
    return run, within | {"zero": counts["bit_equal"]}


def show(name: str, runs: list[Run]) -> None:
    print(name)
    for field, unit in {"wall": "s", "cpu": "s", "anonymous": "MiB", "resident": "MiB"}.items():
        print(describe(f"  {field}", [getattr(run, field) for run in runs], unit), flush=True)


def compare(before: Path, after: Path, rounds: int, *, mapped: bool) -> None:
    """Pairs, each in the other order than the one before."""
    ways = {"rlpost analyze": [], "the paper's way": []}
    for number in range(rounds):
        found = []
        for way in sorted(ways, reverse=number % 2 == 0):
            if way == "rlpost analyze":
                run, counts = analyzed(before, after)
            else:
                command = ["-m", "benchmarks.analyze", "--counts", str(before), str(after)]
                run, printed = measured(command + ["--mapped"] * mapped)
                counts = json.loads(printed)
            print(f"round {number + 1}, {way}: {run}", flush=True)
            ways[way].append(run)
            found.append(counts)
        assert found[0] == found[1], found
    for way, runs in ways.items():
        show(way, runs)
    ours, theirs = ways.values()
    for field in ("wall", "cpu", "anonymous", "resident"):
        pairs = zip(ours, theirs, strict=True)
        print(describe(f"{field}, times less", [getattr(t, field) / getattr(o, field) for o, t in pairs], "x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mapped", action="store_true", help="the paper's way maps the models into memory")
    parser.add_argument("--directory", type=Path, default=RUNS / "analyze")
    parser.add_argument("--clean", action="store_true", help="delete the checkpoints at the end")
    parser.add_argument("--counts", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.counts:
        print(json.dumps(papers_way(*options.counts, mapped=options.mapped)))
        return
    model, directory = SHAPES[options.shape], options.directory.resolve()
    before, after = (directory / f"{options.shape}-{name}" for name in ("before", "after"))
    for path in (before, after):
        if not path.is_dir():
            write_checkpoint(model, path, moved=path == after)
    if options.shape == "1.5b":
        compare(before, after, options.rounds, mapped=options.mapped)
    else:
        show("rlpost analyze", [analyzed(before, after)[0] for _ in range(options.rounds)])
    if options.clean:
        shutil.rmtree(before)
        shutil.rmtree(after)


if __name__ == "__main__":
    main()
