"""Log-probs of sampled tokens from hidden states: chunked (`core.logprobs`) against plain PyTorch, memory and time.

    python -m benchmarks.logprobs_memory                     # sizes of Qwen2.5-0.5B's output layer, 8,192 tokens, float32
    python -m benchmarks.logprobs_memory --device cuda --dtype bfloat16

Both forms give log-probs and entropies and run backward. The plain form is what one writes first: linear, float32,
log_softmax, gather, under autograd.

Memory on CUDA is the allocator's peak. Without it, it is counted and not measured: the forms run on meta tensors, which
have sizes and no contents, and the peak is that of the bytes of all live tensors (a kernel's inner scratch is not seen).
`--check-rss` runs both on real tensors in processes of their own and prints the peak resident memory beside the count.
Time is that of `--timed-tokens` tokens (two chunks), the least of `--repeats`: both forms are linear in tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlpost.core.logprobs import token_logprobs

Form = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    log_softmax_NV = torch.log_softmax(torch.nn.functional.linear(hidden_NH, weight_VH).float() / 0.8, dim=-1)
    with torch.no_grad():
        entropies_N = -(log_softmax_NV.exp() * log_softmax_NV).sum(-1)
    return log_softmax_NV.gather(-1, ids_N[:, None])[:, 0], entropies_N


def chunked(hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(
        hidden_NH, weight_VH, None, ids_N, temperatures_N=torch.full(ids_N.shape, 0.8, device=ids_N.device)
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage made while it is on, until the storage is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= num_bytes


def inputs(options: argparse.Namespace, num_tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    hidden_NH = torch.randn(num_tokens, options.hidden, device=device).to(dtype).requires_grad_()
    weight_VH = torch.randn(options.vocabulary, options.hidden, device=device).div_(options.hidden**0.5).to(dtype)
    ids_N = torch.randint(0, options.vocabulary, (num_tokens,), device=device)
    return hidden_NH, weight_VH.requires_grad_(), ids_N, torch.randn(num_tokens, device=device)


def forward_backward(form: Form, hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, upstream_N: Tensor) -> None:
    logprobs_N, _ = form(hidden_NH, weight_VH, ids_N)
    (logprobs_N * upstream_N).sum().backward()


def peak_bytes(form: Form, options: argparse.Namespace) -> int:
    """Of everything the form makes: logits, saved tensors, gradients; not of its inputs."""
    if options.device == "cuda":
        given = inputs(options, options.tokens, "cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(form, *given)
        return torch.cuda.max_memory_allocated() - before
    given = inputs(options, options.tokens, "meta")
    with LiveBytes() as live:
        forward_backward(form, *given)
    return live.peak


def seconds(form: Form, options: argparse.Namespace) -> float:
    times = []
    for _ in range(options.repeats):
        given = inputs(options, options.timed_tokens, options.device)
        _synchronize(options)
        started = time.perf_counter()
        forward_backward(form, *given)
        _synchronize(options)
        times.append(time.perf_counter() - started)
    return min(times)


def _synchronize(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def _resident_bytes(form: Form, options: argparse.Namespace, pipe: Any) -> None:
    given = inputs(options, options.tokens, "cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward_backward(form, *given)
    pipe.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def resident_bytes(form: Form, options: argparse.Namespace) -> int:
    """Growth of a fresh process's peak resident memory while the form runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_resident_bytes, args=(form, options, theirs))
    process.start()
    process.join()
    return ours.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--timed-tokens", type=int, default=882, help="0: no timing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check-rss", action="store_true")
    options = parser.parse_args()
    forms: dict[str, Form] = {"plain": plain, "chunked": chunked}
    print(f"{options.tokens} tokens, V = {options.vocabulary}, H = {options.hidden}, {options.dtype}, {options.device}")
    measures: dict[str, Callable[[Form], float]] = {"peak GiB": lambda form: peak_bytes(form, options) / 2**30}
    if options.check_rss:
        measures["resident GiB"] = lambda form: resident_bytes(form, options) / 2**30
    if options.timed_tokens:
        measures[f"s for {options.timed_tokens} tokens"] = partial(seconds, options=options)
    for name, measure in measures.items():
        values = {form_name: measure(form) for form_name, form in forms.items()}
        ratio = values["chunked"] / values["plain"]
        print(f"{name:>20}: plain {values['plain']:.3f}, chunked {values['chunked']:.3f}, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
