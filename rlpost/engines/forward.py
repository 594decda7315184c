"""How likely a Hugging Face causal language model finds given tokens. Axes: B rows, T positions, N scored tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlpost.core.logprobs import token_logprobs
from rlpost.engines.packing import PACKED_ATTENTION, Packing, check_rows_are_alone, packed_hidden_states


def load_policy(model_path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a Hugging Face directory, every dropout off: it must score tokens as the sampler drew them.

    Raises:
        ValueError: when the directory holds a model that cannot be trained here; see `_check`.
    """
    config = AutoConfig.from_pretrained(model_path)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and name.endswith(("dropout", "pdrop", "_drop")):
            setattr(config, name, 0.0)
    transformers_logging.disable_progress_bar()
    policy = AutoModelForCausalLM.from_pretrained(
        model_path, config=config, dtype=dtype, attn_implementation=PACKED_ATTENTION
    )
    _check(policy, model_path)
    return policy


def copy_policy(model_path: Path, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Another model like that of the directory, holding `weights` under their checkpoint names (tied ones once)."""
    copy = load_policy(model_path, dtype)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(weights[name])
    return copy


def linear_layers(policy: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer but the output layer, by its name in the model."""
    output_layer = policy.get_output_embeddings()
    return {
        name: module
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear) and module is not output_layer
    }


class OutputLayer(nn.Module):
    """The policy's output layer, from hidden states straight to log-probs (`core.logprobs`); it shares its weights.

    A module of its own, because ZeRO-3 gathers a weight when the module that holds it is called.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear), f"the output layer is a {type(layer).__name__}, not linear"
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, hidden_NH: Tensor, token_ids_N: Tensor, temperatures_N: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden_NH, self.weight, self.bias, token_ids_N, temperatures_N=temperatures_N)


class Scorer(nn.Module):
    """Scores only the tokens asked for: hidden states are gathered before the output layer, whose logits live for one
    chunk of tokens at a time."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy
        self.output_layer = OutputLayer(_output_layer(policy))

    def forward(
        self, token_ids_BT: Tensor, lengths_B: Tensor, mask_BT: Tensor, temperatures_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of each token on the mask, given the tokens before it in its row.

        Args:
            token_ids_BT: int64, rows padded on the right.
            lengths_B: int64: real tokens per row.
            mask_BT: bool; never the first position, which nothing precedes.
            temperatures_B: float: what divides the logits of each row.

        Returns:
            logprobs_BT (differentiable) and entropies_BT in nats (not differentiable), float32, 0 off the mask.
        """
        packing = Packing.of(lengths_B, token_ids_BT.shape[1])
        hidden_NH = packed_hidden_states(self.policy.base_model, token_ids_BT, packing)
        rows_N, positions_N = mask_BT.nonzero(as_tuple=True)
        before_NH = packing.states_before(hidden_NH, rows_N, positions_N)
        token_ids_N = token_ids_BT[rows_N, positions_N]
        logprobs_N, entropies_N = self.output_layer(before_NH, token_ids_N, temperatures_B[rows_N])
        zeros_BT = torch.zeros(token_ids_BT.shape, device=token_ids_BT.device)
        index = (rows_N, positions_N)
        return zeros_BT.index_put(index, logprobs_N), zeros_BT.index_put(index, entropies_N)


def _output_layer(policy: PreTrainedModel) -> nn.Module:
    layer = policy.get_output_embeddings()
    assert layer is not None, "a causal language model has an output layer"
    return layer


def weight_names(policy: nn.Module) -> list[str]:
    """Checkpoint names of the weights, tied ones once, in a fixed order."""
    return [name for name, _ in policy.named_parameters()]


def _check(policy: PreTrainedModel, model_path: Path) -> None:
    """Refuse what `Scorer` or publishing would get silently wrong.

    Raises:
        ValueError: when the model transforms its logits after the output layer (soft-capping, scaling), holds its
            weights under other names than its checkpoint, or lets packed rows see each other.
    """
    stored: set[str] = set()
    for file in sorted(model_path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            stored.update(tensors.keys())
    if unknown := [name for name in weight_names(policy) if name not in stored]:
        raise ValueError(
            f"{model_path}: {type(policy).__name__} holds {unknown[0]!r} ({len(unknown)} such weights), which its"
            " checkpoint does not: samplers load weights by checkpoint name, so this architecture cannot be published"
        )
    check_rows_are_alone(policy)
    token_ids_BT = torch.tensor([[0, 1]])
    with torch.no_grad():
        expected = policy(input_ids=token_ids_BT, use_cache=False).logits
        hidden = policy.base_model(input_ids=token_ids_BT, use_cache=False).last_hidden_state
        logits = _output_layer(policy)(hidden)
    if not torch.equal(expected, logits):
        raise ValueError(
            f"{model_path}: {type(policy).__name__} changes its logits after the output layer (soft-capping or scaling)"
            ", which the learner does not reproduce: use a model without"
        )
