"""How much memory one rank of the learner takes, by part and by moment, from shapes alone.

Read off DeepSpeed's optimizers (BF16_Optimizer, stage_1_and_2.py, stage3.py), PyTorch's AdamW and the forward pass of a
dense decoder with gated feed-forward layers and RMSNorm (Llama, Mistral, Qwen2 and 3): every term is one tensor or one
set of tensors. `benchmarks/learner_memory.py` holds the sum against the measured peak.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

WORKSPACE_ELEMENTS = 2**26
"""As in `core.logprobs`, which this must not import: it would bring PyTorch into the driver's first second."""
MAX_BUCKET_ELEMENTS = 200_000_000
"""As in `engines.deepspeed_learner`."""
ZERO3_LIVE_PARAMETERS = 10**9
"""Weights that DeepSpeed keeps gathered at most (its default `stage3_max_live_parameters`)."""
MOMENTS = {"adamw": 2, "lion": 1, "sgd": 1}
"""float32 tensors of state per master weight."""
TEMPORARIES = {"adamw": 2, "lion": 1, "sgd": 0}
"""float32 tensors of a master's size while it is updated. AdamW: sqrt(v), and its quotient."""

PARTS = ("weights", "gradients", "optimizer", "activations", "workspace", "reference", "critic", "image")
Moment = Literal["backward", "reduction", "step", "export"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A dense decoder's sizes.

    Example:
        Architecture(hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, head_size=64, vocabulary=151936)
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    """The output layer is the embedding."""

    @classmethod
    def of_directory(cls, path: Path) -> Architecture | None:
        """That of a Hugging Face directory; None when its config.json has not all of the sizes, or is not JSON."""
        try:
            config = json.loads((path / "config.json").read_text())
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                hidden=hidden,
                intermediate=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_size=config.get("head_dim") or hidden // heads,
                vocabulary=config["vocab_size"],
                tied=config.get("tie_word_embeddings", False),
            )
        except (KeyError, json.JSONDecodeError):
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerShape:
    """What one rank holds.

    Example:
        LearnerShape(parameters=7_000_000_000, trained=7_000_000_000, width=2, ranks=8, zero_stage=2, optimizer="adamw",
            micro_batch_tokens=8192, gradient_checkpointing=True, architecture=None, on_gpu=True)
    """

    parameters: int
    """Of the model, without an adapter."""
    trained: int
    """All of them, or the adapter's."""
    width: Literal[2, 4]
    """Bytes of a working weight."""
    ranks: int
    zero_stage: Literal[1, 2, 3]
    optimizer: str
    micro_batch_tokens: int
    gradient_checkpointing: bool
    architecture: Architecture | None
    """None: not known yet, and activations are left out."""
    on_gpu: bool
    adapter: bool = False
    reference: bool = False
    critic: bool = False
    serve_width: Literal[2, 4] = 2
    serves_adapter: bool = False
    """Beside the weights, not merged."""
    subnetwork: float | None = None
    """Share of the weights that a stage changes at most; None: no stage trains a subnetwork."""


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes that belong to the weights of one engine: held from step to step, and what comes and goes with a moment."""

    weights: float
    gradients: float
    """Once the second micro-batch of a step has begun."""
    optimizer: float
    """Masters, moments, and a subnetwork's masks."""
    reduction: float
    """More while gradients are reduced: in a backward pass, whenever a bucket is full."""
    bucket_share: float
    """Of the gradients, how many fill a bucket: as many of the activations are gone by then."""
    step: float
    """More while the optimizer works."""


NO_STATES = States(weights=0.0, gradients=0.0, optimizer=0.0, reduction=0.0, bucket_share=1.0, step=0.0)


def states(shape: LearnerShape, trained: int, frozen: int = 0, subnetwork: float | None = None) -> States:
    """Of an engine that trains `trained` parameters, or this share of them, beside `frozen` ones."""
    width, ranks, stage = shape.width, shape.ranks, shape.zero_stage
    bucket = min(trained, MAX_BUCKET_ELEMENTS)
    whole, part = 4 * trained, 4 * trained / ranks
    if subnetwork is None:
        moments, masks, update = MOMENTS[shape.optimizer] * part, 0.0, TEMPORARIES[shape.optimizer] * part
    else:
        # Masks are whole for gradients, in parts for masters. Entries and their gradients are copied, while their
        # places are listed in 8 bytes each, before a step and after it.
        moments, masks = MOMENTS[shape.optimizer] * subnetwork * part, trained + trained / ranks
        update = 4 * subnetwork * part
    weights = width * (trained + frozen)
    if stage == 3:
        # The float32 bucket is allocated for good; a reduction flattens it once more, and so does gloo.
        gathered = 0.0 if ranks == 1 else width * min(trained + frozen, ZERO3_LIVE_PARAMETERS)
        weights = weights / ranks + gathered
        gradients, reduction, step = part + 4 * bucket, (4 if shape.on_gpu else 8) * bucket, part + update
    elif stage == 2 and width == 2:
        # A bucket in bfloat16, flattened, and its float32 copy that is communicated.
        gradients, reduction, step = part, 8 * bucket, update
    elif stage == 2:
        # A bucket and the partition it is copied to, before it is added to the accumulated one.
        gradients, reduction, step = part, 4 * bucket + part, max(part, update)
    elif width == 2:
        # BF16_Optimizer: .grad stays until the step, and the float32 sum is whole on every rank.
        gradients, reduction, step = whole + 2 * trained, 0.0, update
    else:
        # .grad is reduced at the step, where the flat partition replaces it.
        gradients, reduction, step = whole, 0.0, max(part - whole + update, part)
    return States(
        weights=weights,
        gradients=gradients,
        optimizer=part + moments + masks,
        reduction=reduction,
        bucket_share=bucket / trained,
        step=step,
    )


def layer_bytes_per_token(model: Architecture, *, width: int, on_gpu: bool, adapter: bool) -> float:
    """What autograd saves of one decoder layer per token."""
    hidden, query, key = model.hidden, model.heads * model.head_size, model.kv_heads * model.head_size
    # RMSNorm: its input in float32, the normalized input (for the norm's own gradient), and the next layers' input.
    norm = (4 + (width if adapter else 2 * width)) * hidden
    # Rows are gathered for attention: q, k, v and the output, in float32 on CPU; log-sum-exp; the output, packed again.
    attended = width if on_gpu else 4
    attention = attended * (2 * query + 2 * key) + 4 * model.heads + width * query
    feed_forward = 4 * width * model.intermediate  # gate, up, silu(gate) and their product
    return 2 * norm + attention + feed_forward


def activation_bytes(shape: LearnerShape) -> float:
    """Saved by one forward pass of the backbone over a full micro-batch; with checkpointing, the layers' inputs."""
    model, tokens = shape.architecture, shape.micro_batch_tokens
    if model is None:
        return 0.0
    ends = (4 + 2 * shape.width) * model.hidden * tokens  # the last norm, and the scored hidden states
    if shape.gradient_checkpointing:
        return ends + tokens * model.layers * shape.width * model.hidden
    return ends + tokens * model.layers * _layer(shape, model)


def layer_workspace_bytes(shape: LearnerShape) -> float:
    """More while backward is in one layer: gradients inside its feed-forward part, and what checkpointing computes again."""
    model, tokens = shape.architecture, shape.micro_batch_tokens
    if model is None:
        return 0.0
    again = _layer(shape, model) if shape.gradient_checkpointing else 0.0
    return tokens * (again + 3 * shape.width * model.intermediate)


def _layer(shape: LearnerShape, model: Architecture) -> float:
    return layer_bytes_per_token(model, width=shape.width, on_gpu=shape.on_gpu, adapter=shape.adapter)


def logits_workspace_bytes(shape: LearnerShape) -> float:
    """`core.logprobs` at its largest, over a micro-batch whose every token is scored."""
    model, width = shape.architecture, shape.width
    if model is None:
        return 0.0
    vocabulary = model.vocabulary
    chunk = max(1, min(shape.micro_batch_tokens, WORKSPACE_ELEMENTS // vocabulary))
    # While a chunk is worked on, the one before is still named: logits and log-softmax, or logits and their gradient.
    before = chunk < shape.micro_batch_tokens
    narrow = 2 if width == 2 else 0
    forward = (4 + max(4, narrow) + (4 + narrow if before else 0)) * chunk * vocabulary
    head = 0 if shape.adapter else vocabulary * model.hidden
    product = (narrow + 4) * head  # its float32 sum, and in bfloat16 each chunk's share
    again = (8 + 2 * narrow) * chunk * vocabulary if before else 0
    backward = max((4 + narrow) * chunk * vocabulary + product, again + 4 * head)
    return max(forward, backward + width * shape.micro_batch_tokens * model.hidden)  # the hidden states' gradient


def learner_memory(shape: LearnerShape) -> Mapping[Moment, Mapping[str, float]]:
    """Bytes of one rank by moment and part; the learner's peak is the largest sum.

    On CPU all of it. On a GPU that of the GPU: the image of what was published, `serve_width` bytes for each of the rank's
    weights and of what it serves beside them, is in the host's memory, as is what changed while it is exported.
    """
    policy = states(shape, shape.trained, shape.parameters if shape.adapter else 0, shape.subnetwork)
    model = shape.architecture
    without_head = shape.parameters - (0 if model is None or model.tied else model.vocabulary * model.hidden)
    critic = states(shape, without_head) if shape.critic else NO_STATES
    published = shape.parameters + (shape.trained if shape.serves_adapter else 0)
    image = 0.0 if shape.on_gpu else shape.serve_width * published / shape.ranks
    activations, layer = activation_bytes(shape), layer_workspace_bytes(shape)
    held = {
        "weights": policy.weights,
        "gradients": policy.gradients,
        "optimizer": policy.optimizer,
        "reference": float(shape.width * shape.parameters) if shape.reference and not shape.adapter else 0.0,
        "critic": critic.weights + critic.gradients + critic.optimizer,
        "image": image,
    }
    # The critic runs forward and backward before the policy's backward pass, whose activations wait.
    critics = max(activations + layer, critic.reduction) if shape.critic else 0.0
    workspace = max(logits_workspace_bytes(shape), layer, critics)
    moments: dict[Moment, dict[str, float]] = {
        "backward": {**held, "activations": activations, "workspace": workspace},
        "reduction": {
            **held,
            "activations": activations * (1 - policy.bucket_share),
            "workspace": policy.reduction,
        },
        "step": {**held, "workspace": max(policy.step, critic.step)},
        "export": {**held, "image": 2 * image},  # beside it what changed, in as many bytes at most
    }
    return moments


def observer_bytes(parameters: int, *, served: int, compared: int, adapter: int = 0) -> float:
    """Of the driver while its observer takes a version in.

    Args:
        parameters: of the model.
        served, compared: bytes of a weight, as it is published and as it is compared.
        adapter: parameters of one that is published beside the weights.
    """
    per_weight = compared + 1  # the start of the stage, and whether an entry ever moved
    rounds = compared != served
    if adapter:  # versions share the base; merged are the last, this one, and this one before it is rounded
        per_weight += served + 2 * compared + served * rounds
    else:  # the last and this one, and the last one rounded
        per_weight += 2 * served + compared * rounds
    return per_weight * parameters + 2 * served * adapter


def peak(shape: LearnerShape) -> tuple[Moment, Mapping[str, float]]:
    """The moment that takes most, and its parts."""
    moments = learner_memory(shape)
    largest = max(moments, key=lambda moment: sum(moments[moment].values()))
    return largest, moments[largest]
