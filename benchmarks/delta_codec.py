"""The codec of weight updates (`core.delta`): bytes of a version and speed on one core, against what else one could send.

    python -m benchmarks.delta_codec            # bytes and speed by density
    python -m benchmarks.delta_codec --model    # and the state dict of a model of 1.5 B parameters, at 0.5 %

Weights are bfloat16 roundings of float32 masters of spread 0.02; a step moves each master as Adam does, by lr times a number of
order 1, with lr such that the stated share of the roundings changes. `int32 + value` is an index and a new value per change, as
vLLM's sparse transfer engine and TRL send them. Time is this process's own (a shared machine's other work is not in it), and
a copy of the dense bytes, already in memory, is what applying competes with. Encoding computes the checksum of the result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from io import BytesIO

import torch
from torch import Tensor

from rlpost.core.delta import TensorPatch, apply_pieces, encode, encode_section
from rlpost.core.patch import PatchWriter, from_bytes
from rlpost.core.weights import bits

DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.2, 1.0)
NUM_ENTRIES = 1 << 25
SIGMA = 0.02


def masters(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Weights, and the direction and size of their step in units of lr, both float32."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=generator).mul_(SIGMA)
    return weights, torch.randn(shape, generator=generator).clamp_(-3, 3)


def changed_share(weights: Tensor, steps: Tensor, lr: float) -> float:
    return float((weights.bfloat16() != (weights + lr * steps).bfloat16()).float().mean())


def lr_for(density: float) -> float:
    """The lr at which this share of the roundings changes, by bisection; for 1.0, which no lr reaches, a large one."""
    weights, steps = masters((1 << 20,), seed=0)
    low, high = 1e-10, 1e-2
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if changed_share(weights, steps, middle) < density else (low, middle)
    return high


def rate(run: Callable[[], object], num_bytes: int, rounds: int) -> float:
    """GB/s of the best of some rounds, by the process's own time."""
    best = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        run()
        best = min(best, time.process_time() - started)
    return num_bytes / best / 1e9


def section(before: Tensor, after: Tensor) -> TensorPatch:
    """As a learner's rank encodes it, which knows the checksum of what it published last."""
    return encode_section(before, after, shape=tuple(after.shape), before_checksum="known")


def by_density(rounds: int) -> None:
    print(
        f"{NUM_ENTRIES:,} bfloat16 entries, {NUM_ENTRIES * 2 >> 20} MiB; sizes as full / size; speeds in GB/s of dense bytes"
    )
    print(
        f"{'changed':>8} {'lr':>8} {'int32 + value':>14} {'codec':>8} {'encode':>8} {'apply':>8} {'copy':>8}  encoding"
    )
    weights, steps = masters((NUM_ENTRIES,), seed=1)
    before = weights.bfloat16()
    for density in DENSITIES:
        lr = lr_for(density)
        after = (weights + lr * steps).bfloat16()
        pieces, held = section(before, after).pieces, before.clone()
        apply_pieces(pieces, held)
        assert torch.equal(bits(held), bits(after))
        full, changed = after.nbytes, sum(piece.num_changed for piece in pieces)
        size = sum(len(piece.payload) for piece in pieces)
        encoding = rate(lambda after=after: section(before, after), full, rounds)
        applying = rate(lambda pieces=pieces, held=held: apply_pieces(pieces, held), full, rounds)
        copying = rate(lambda after=after, held=held: held.copy_(after), full, rounds)
        print(
            f"{changed / len(after):8.2%} {lr:8.1e} {full / (6 * changed):14.1f} {full / size:8.1f} {encoding:8.2f}"
            f" {applying:8.2f} {copying:8.2f}  {', '.join(sorted({piece.encoding for piece in pieces}))}"
        )


def shapes_of_a_model() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Qwen2.5-1.5B's, 1.54 B parameters, the head tied to the embedding."""
    hidden, inner, kv = 1536, 8960, 256
    yield "model.embed_tokens.weight", (151_936, hidden)
    for layer in range(28):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.q_proj.bias", (hidden,)
        for name in ("k_proj", "v_proj"):
            yield prefix + f"self_attn.{name}.weight", (kv, hidden)
            yield prefix + f"self_attn.{name}.bias", (kv,)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            yield prefix + f"mlp.{name}.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def whole_model(density: float) -> None:
    lr, stream = lr_for(density), BytesIO()
    writer = PatchWriter(stream, version=1, base=0)
    full, parameters, seconds = 0, 0, 0.0
    for seed, (name, shape) in enumerate(shapes_of_a_model()):
        weights, steps = masters(shape, seed)
        before, after = weights.bfloat16(), (weights + lr * steps).bfloat16()
        started = time.process_time()
        writer.add(name, encode(before, after))
        seconds += time.process_time() - started
        full += after.nbytes
        parameters += after.numel()
    writer.finish()
    data = stream.getvalue()
    changed = from_bytes(data).num_changed
    print(
        f"{parameters:,} parameters, {changed / parameters:.2%} changed, lr {lr:.1e}: {full / 1e9:.2f} GB in"
        f" {len(data) / 1e6:.2f} MB, manifest included: {full / len(data):.0f} x (int32 + value {full / (6 * changed):.0f} x);"
        f" {full / seconds / 1e9:.2f} GB/s with both checksums"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", action="store_true", help="the state dict of 1.5 B parameters, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    by_density(options.rounds)
    if options.model:
        whole_model(0.005)


if __name__ == "__main__":
    main()
