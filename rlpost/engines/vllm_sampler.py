"""vLLM as a `SamplerEngine`: in this process, one request per rollout, weights changed in place and proved.

vLLM is imported only once an engine is built: it reads its environment on import and changes the process it lives in
(thread settings, torch.distributed), so it gets a process of its own with `environment` set first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

from torch import nn
from transformers import AutoConfig, AutoTokenizer

from rlpost.core.patch import WeightPatch
from rlpost.engines.base import RolloutRequest
from rlpost.engines.lora_layers import LoraSpec, target_shapes, zero_adapter
from rlpost.engines.pretrained import write_adapter
from rlpost.engines.sampling import Holding, check_request, end_token_ids, make_rollout
from rlpost.engines.vllm_cpu import (
    add_adapter_in_two_products,
    check_live,
    inspect_in_process,
    live_weights,
    use_compiled_kernels,
)
from rlpost.engines.weight_map import WeightMap
from rlpost.types import Rollout, VersionSpan

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput

CPU_PREFILL_TOKENS = 2048
"""Prompt tokens of one step on CPU, unless one prompt alone is longer."""
CPU_BLOCK_TOKENS = 32
"""Only whole blocks of a prompt are shared by the rollouts of a group, and vLLM's 128 on CPU exceed many a prompt."""


def environment(device: str, *, num_threads: int = 1) -> dict[str, str]:
    """Variables that must be set in a sampler's process before anything imports vLLM.

    Args:
        device: "cpu" or "cuda".
        num_threads: CPU threads of the sampler; on a GPU, of its host side.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}: samplers run on 'cpu' or 'cuda'")
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": str(num_threads),
    }
    if device == "cpu":
        # Without it the first token waits 3 to 18 s for a compiler whose code is no faster here.
        variables |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return variables


class VllmSampler:
    """One vLLM engine, stepped by its caller's thread.

    Raises:
        RuntimeError: if this process was started without `environment`.
        ValueError: if the model directory names no end token.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "bfloat16",
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        lora: LoraSpec | None = None,
    ) -> None:
        """
        Args:
            max_model_len: tokens of the longest sequence, prompt and response together.
            max_num_seqs: sequences decoded at once; more wait their turn.
            kv_cache_bytes: size of the key-value cache; required on CPU. On a GPU, None takes what
                `gpu_memory_utilization` (a share of the device's memory, weights included) leaves.
            gpu_memory_utilization: this share must be free at the start, whatever `kv_cache_bytes` is.
            enforce_eager: no CUDA graphs. Always so on CPU.
            lora: the adapter that versions have beside the weights; None: versions are plain weights.
        """
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        on_cpu = current_platform.is_cpu()
        _check_environment("cpu" if on_cpu else "cuda")
        if on_cpu and kv_cache_bytes is None:
            raise ValueError("kv_cache_bytes must be given on CPU: the default would take a share of all host memory")
        path = Path(model_path)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._end_ids = sorted(end_token_ids(path))
        self._max_model_len = max_model_len
        on_this_device = {"ir_op_priority": use_compiled_kernels()} if on_cpu else {}
        shapes = {} if lora is None else target_shapes(AutoConfig.from_pretrained(path), lora)
        args = EngineArgs(
            model=str(path),
            skip_tokenizer_init=True,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=kv_cache_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager or on_cpu,
            # vLLM 0.32 rewinds the seeded generator of a prompt prefilled in pieces, which CPU generators cannot do.
            enable_chunked_prefill=not on_cpu,
            max_num_batched_tokens=max(CPU_PREFILL_TOKENS, max_model_len, max_num_seqs) if on_cpu else None,
            distributed_executor_backend="uni",
            # A step in flight across `update` would mix two versions in one token.
            async_scheduling=False,
            enable_prefix_caching=True,
            block_size=CPU_BLOCK_TOKENS if on_cpu else None,
            generation_config="vllm",
            # The distribution that was sampled, temperature included; vLLM's default reports the one before it.
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **({} if lora is None else _adapter_arguments(lora, shapes)),  # pyright: ignore[reportArgumentType]
            **on_this_device,  # pyright: ignore[reportArgumentType]
        )
        if on_cpu:
            inspect_in_process(path)
        if on_cpu and lora is not None:
            add_adapter_in_two_products()
        with live_weights() if on_cpu else nullcontext():
            self._engine = LLMEngine.from_engine_args(args)
        if on_cpu:
            self._engine.apply_model(check_live)
        self._adapter = None if lora is None else self._begin_adapter(lora, shapes)
        self._running: dict[str, RolloutRequest] = {}
        self._holding = Holding()
        self._engine.set_weight_version(str(self._holding.version))
        self._weight_map: WeightMap | None = None

    @property
    def version(self) -> int:
        return self._holding.version

    @property
    def held(self) -> int | None:
        return self._holding.held

    def add(self, request: RolloutRequest) -> None:
        from vllm.inputs import tokens_input

        check_request(request, max_model_len=self._max_model_len, running=self._running)
        self._engine.add_request(
            request.id,
            tokens_input(list(request.prompt_ids)),
            _sampling_params(request, self._end_ids),
            lora_request=self._adapter,
        )
        self._running[request.id] = request

    def has_work(self) -> bool:
        return bool(self._running)

    def stats(self) -> dict[str, int]:
        """Requests that are being decoded, and those that wait for a place or for cache."""
        running, waiting = self._engine.engine_core.engine_core.scheduler.get_request_counts()  # pyright: ignore[reportAttributeAccessIssue]
        return {"running": running, "waiting": waiting}

    def step(self) -> list[tuple[str, Rollout]]:
        self._holding.check()
        finished = []
        for output in self._engine.step():
            assert output.finished, output.request_id
            request = self._running.pop(output.request_id)
            finished.append((request.id, self._rollout(request, output.outputs[0])))  # pyright: ignore[reportIndexIssue]
        return finished

    def update(self, patch: WeightPatch) -> None:
        with self._holding.updating(patch):
            if not self._engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("vLLM did not drop its key-value cache")
            self._engine.apply_model(lambda model: self._change(model, patch))
            self._engine.set_weight_version(str(patch.version))

    def _begin_adapter(self, lora: LoraSpec, shapes: Mapping[str, tuple[int, int]]) -> LoRARequest:
        """vLLM loads an adapter, once: zeros, of one layer, as it keeps what it has loaded, and zeroes the places of all others.
        Updates write into these places; the request that is returned names the adapter for good."""
        from vllm.lora.request import LoRARequest

        name = next(iter(shapes))
        with TemporaryDirectory() as directory:
            path = Path(directory) / "adapter"
            write_adapter(zero_adapter(name, shapes[name], lora.rank), path)
            request = LoRARequest("policy", 1, str(path))
            self._engine.add_lora(request)
        return request

    def _change(self, model: nn.Module, patch: WeightPatch) -> None:
        if self._weight_map is None:
            self._weight_map = WeightMap(model, patch.tensors)
        self._weight_map.apply(patch)
        self._weight_map.prove(patch)

    def _rollout(self, request: RolloutRequest, output: CompletionOutput) -> Rollout:
        assert output.logprobs is not None and output.weight_versions is not None and output.finish_reason is not None
        token_ids = list(output.token_ids)
        return make_rollout(
            request,
            token_ids,
            [position[token].logprob for position, token in zip(output.logprobs, token_ids, strict=True)],  # pyright: ignore[reportOptionalSubscript]
            [VersionSpan(version=int(s.version), start=s.start, end=s.end) for s in output.weight_versions],
            finish_reason=output.finish_reason,
            tokenizer=self._tokenizer,
        )


def _adapter_arguments(lora: LoraSpec, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """One adapter, on no layer that vLLM does not fuse with a target, in the least rank vLLM has room for."""
    from vllm.config.lora import MaxLoRARanks

    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= lora.rank),
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
    }


def _sampling_params(request: RolloutRequest, end_ids: list[int]) -> SamplingParams:
    """The request's own distribution and nothing on top: no penalty, no truncation, no hidden end token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1,
        seed=request.seed,
        temperature=request.temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        max_tokens=request.max_tokens,
        min_tokens=0,
        ignore_eos=True,  # of the tokenizer: the ends are listed
        stop_token_ids=end_ids,
        logprobs=0,  # of the sampled token only
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _check_environment(device: str) -> None:
    decisive = ("VLLM_ENABLE_V1_MULTIPROCESSING", "TORCHDYNAMO_DISABLE")
    for name, value in environment(device).items():
        if name in decisive and os.environ.get(name) != value:
            raise RuntimeError(
                f"{name} is {os.environ.get(name)!r} and must be {value!r}: start the sampler's process with the"
                f" variables of vllm_sampler.environment({device!r})"
            )
