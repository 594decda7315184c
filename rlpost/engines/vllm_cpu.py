"""What vLLM on a CPU needs beside its arguments: weights that can be updated in place, compiled kernels, a cheap adapter.

With `vllm_sampler` the only file that imports vLLM, and like there only once an engine is built.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

PROVIDER = "vllm_c_on_cpu"


def inspect_in_process(model_path: Path) -> None:
    """Spare a machine's first start 8 s: vLLM would start a process only to look at the model's class."""
    from vllm import ModelRegistry

    for architecture in json.loads((model_path / "config.json").read_text()).get("architectures") or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


# -- live weights ------------------------------------------------------------------------------------------------------


@contextmanager
def live_weights() -> Iterator[None]:
    """While the engine is built, keep CPU layers reading `layer.weight` at every call.

    By default they pack a copy of it for oneDNN and drop the original, so that nothing could be updated in place.
    """
    from vllm.model_executor.layers import utils

    def keep(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = _linear  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    packing = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = keep
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing


def check_live(model: nn.Module) -> None:
    """Raises RuntimeError when a layer computes from anything but its own weight."""
    layers = {name: module.cpu_linear for name, module in model.named_modules() if hasattr(module, "cpu_linear")}
    packed = [name for name, function in layers.items() if function is not _linear]
    if packed or not layers:
        raise RuntimeError(f"vLLM packed the weights of {packed or 'every layer'}: an update would not reach them")


def _linear(input_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
    # vLLM's parameters are a tensor subclass, whose Python dispatch costs more than a small model's product.
    with torch._C.DisableTorchFunctionSubclass():
        return nn.functional.linear(input_NK, weight_MK, bias_M)


# -- compiled kernels --------------------------------------------------------------------------------------------------


@functools.cache
def use_compiled_kernels() -> dict[str, list[str]]:
    """Normalize and activate in vLLM's C++ kernels, which its CPU build has and, without a compiler, does not use.

    They take a seventh off the sampler's time on a small model. A process registers them once.

    Returns:
        The priority of implementations, for `EngineArgs.ir_op_priority`.
    """
    from vllm import ir
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    kernels = torch.ops._C

    def fits(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous()

    def fits_sum(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> bool:
        return x_residual.is_contiguous() and fits(x, weight, epsilon, variance_size)

    @ir.ops.rms_norm.register_impl(PROVIDER, supports_args=fits)
    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        output = torch.empty_like(x)
        kernels.rms_norm(output, x, weight, epsilon)
        return output

    @ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=fits_sum, inplace=True)
    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        kernels.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual

    @SiluAndMul.register_oot
    class CompiledSiluAndMul(SiluAndMul):
        def forward_oot(self, x: Tensor) -> Tensor:
            output = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype)
            kernels.silu_and_mul(output, x)
            return output

        forward_cpu = forward_oot

    return {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}


# -- the adapter -------------------------------------------------------------------------------------------------------


def add_adapter_in_two_products() -> None:
    """Every token has the one adapter, whose matrices vLLM's CPU operators would copy for each. For good in this process."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    def add_lora_linear(
        wrapper: PunicaWrapperCPU,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
    ) -> None:
        assert scale == 1.0 and not wrapper.no_lora and len(lora_a_stacked[0]) == 1
        parts = y.split(list(output_slices), dim=-1)
        for part, a_11RN, b_11MR in zip(parts, lora_a_stacked, lora_b_stacked, strict=True):
            part += nn.functional.linear(nn.functional.linear(x, a_11RN[0, 0]), b_11MR[0, 0])

    PunicaWrapperCPU.add_lora_linear = add_lora_linear  # pyright: ignore[reportAttributeAccessIssue]
