"""The memory plan (`rlpost.memory`) against the peak of a learner on CPU, one configuration per process.

    python -m benchmarks.learner_memory                      # all configurations, about 8 minutes on one core
    python -m benchmarks.learner_memory --only bfloat16-zero1 float32-zero2-critic

A learner of one rank takes two optimizer steps, of one and of two full micro-batches, and exports after each. The peak is
that of resident memory (VmHWM), from the moment when a learner of a tiny model has been through a whole step in the same
process and was closed: libraries, their code and their caches are loaded by then. glibc is told to give every tensor its
own mapping, so that freed memory leaves the process at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.common import ROOT
from rlpost.memory import Architecture, LearnerShape, peak

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ROW_TOKENS, PROMPT_TOKENS = 256, 32
MODEL = Architecture(hidden=512, intermediate=1408, layers=8, heads=8, kv_heads=8, head_size=64, vocabulary=16_384)
TINY = Architecture(hidden=64, intermediate=192, layers=1, heads=1, kv_heads=1, head_size=64, vocabulary=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    dtype: Literal["bfloat16", "float32"]
    zero_stage: Literal[1, 2, 3]
    tokens: int
    checkpointing: bool = False
    lora: bool = False
    reference: bool = False
    critic: bool = False
    optimizer: str = "adamw"
    subnetwork: float | None = None
    """Share of the linear layers' entries that are trained, the principal ones."""


CONFIGURATIONS = {
    "bfloat16-zero1": Configuration(dtype="bfloat16", zero_stage=1, tokens=1024),
    "bfloat16-zero1-checkpointing": Configuration(dtype="bfloat16", zero_stage=1, tokens=1024, checkpointing=True),
    "bfloat16-zero1-lion-reference": Configuration(
        dtype="bfloat16", zero_stage=1, tokens=768, optimizer="lion", reference=True
    ),
    "bfloat16-zero1-subnetwork": Configuration(dtype="bfloat16", zero_stage=1, tokens=1024, subnetwork=0.05),
    "bfloat16-zero2": Configuration(dtype="bfloat16", zero_stage=2, tokens=512),
    "bfloat16-zero3": Configuration(dtype="bfloat16", zero_stage=3, tokens=512),
    "bfloat16-lora-reference": Configuration(dtype="bfloat16", zero_stage=1, tokens=1024, lora=True, reference=True),
    "float32-zero1": Configuration(dtype="float32", zero_stage=1, tokens=2048),
    "float32-zero1-checkpointing": Configuration(dtype="float32", zero_stage=1, tokens=2048, checkpointing=True),
    "float32-zero1-subnetwork": Configuration(dtype="float32", zero_stage=1, tokens=2048, subnetwork=0.05),
    "float32-zero2": Configuration(dtype="float32", zero_stage=2, tokens=2048),
    "float32-zero2-sgd": Configuration(dtype="float32", zero_stage=2, tokens=1024, optimizer="sgd"),
    "float32-zero2-critic": Configuration(dtype="float32", zero_stage=2, tokens=1024, critic=True),
    "float32-zero3": Configuration(dtype="float32", zero_stage=3, tokens=1024),
}


def write_model(path: Path, model: Architecture) -> int:
    """A Llama of these sizes with random weights, as a Hugging Face directory; returns how many it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        tie_word_embeddings=model.tied,
    )
    policy = LlamaForCausalLM(config)
    policy.to(torch.bfloat16).save_pretrained(path)  # pyright: ignore[reportArgumentType]
    return policy.num_parameters()


def exercise(path: Path, config: Configuration, *, vocabulary: int, tokens: int) -> int:
    """Two steps of a learner, as a worker takes them; returns how many parameters its adapter has, if it has one."""
    import torch

    from rlpost.core.critic import Critic
    from rlpost.core.objective import PolicyGradient, StageSpec
    from rlpost.core.optimizers import OPTIMIZERS
    from rlpost.core.subnetwork import PrincipalEntries
    from rlpost.engines.deepspeed_learner import DeepSpeedLearner
    from rlpost.engines.lora_layers import LoraSpec
    from rlpost.types import Prompt, Rollout, RolloutGroup, VersionSpan
    from rlpost.workers.learner_service import LearnerService

    kind = OPTIMIZERS[config.optimizer]
    engine = DeepSpeedLearner(
        path,
        dtype=getattr(torch, config.dtype),
        zero_stage=config.zero_stage,
        micro_batch_tokens=tokens,
        serve_dtype=torch.bfloat16,
        rank=0,
        world_size=1,
        gradient_checkpointing=config.checkpointing,
        lora=LoraSpec(rank=16, alpha=32.0) if config.lora else None,
        optimizer=kind,
    )
    learner = LearnerService(engine)
    objective = PolicyGradient(
        kl_coef=0.1 if config.reference else 0.0, advantage=Critic(lr=1e-5) if config.critic else "group_std"
    )
    subnetwork = None if config.subnetwork is None else PrincipalEntries(rank=8, density=config.subnetwork)
    learner.begin_stage(StageSpec(objective=objective, optimizer=kind(), subnetwork=subnetwork, num_threads=1))
    mask = torch.arange(ROW_TOKENS) >= PROMPT_TOKENS
    spans = (VersionSpan(version=0, start=0, end=ROW_TOKENS - PROMPT_TOKENS),)
    prompt = Prompt(id="0", token_ids=(), task="math", reference={})
    for step, num_micro_batches in enumerate((1, 2)):
        rollouts = tuple(
            Rollout(
                token_ids=torch.randint(0, vocabulary, (ROW_TOKENS,)),
                loss_mask=mask,
                sampler_logprobs=torch.where(mask, -9.7, 0.0),
                temperature=1.0,
                spans=spans,
                finish_reason="stop",
                text="",
            )
            for _ in range(num_micro_batches * tokens // ROW_TOKENS)
        )
        advantages = [(-1.0) ** index for index in range(len(rollouts))]
        group = RolloutGroup(prompt=prompt, rollouts=rollouts)
        learner.accumulate([group], [advantages], learner_version=step, max_staleness=2)
        learner.step(denominator=1000.0, lr=1e-5)
        learner.export(step + 1)
    adapter = engine.adapter()
    engine.close()
    return 0 if adapter is None else sum(tensor.numel() for tensor in adapter.tensors.values())


def measure(config: Configuration) -> dict[str, int]:
    """Bytes of the peak above what a tiny learner leaves behind, in this process; and the learner's size."""
    from rlpost.engines.deepspeed_learner import init_distributed

    with tempfile.TemporaryDirectory() as folder:
        tiny, model = Path(folder, "tiny"), Path(folder, "model")
        write_model(tiny, TINY)
        parameters = write_model(model, MODEL)
        init_distributed(rank=0, world_size=1, master_port=0)
        exercise(tiny, config, vocabulary=TINY.vocabulary, tokens=ROW_TOKENS)
        gc.collect()
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again here
        adapter = exercise(model, config, vocabulary=MODEL.vocabulary, tokens=config.tokens)
        return {"peak": resident_bytes("VmHWM") - before, "parameters": parameters, "trained": adapter or parameters}


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def shape_of(config: Configuration, parameters: int, trained: int) -> LearnerShape:
    return LearnerShape(
        parameters=parameters,
        trained=trained,
        width=2 if config.dtype == "bfloat16" else 4,
        ranks=1,
        zero_stage=config.zero_stage,
        optimizer=config.optimizer,
        micro_batch_tokens=config.tokens,
        gradient_checkpointing=config.checkpointing,
        architecture=MODEL,
        on_gpu=False,
        adapter=config.lora,
        reference=config.reference,
        critic=config.critic,
        subnetwork=config.subnetwork,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--child", choices=list(CONFIGURATIONS), help="measure this one here, and print bytes as JSON")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(CONFIGURATIONS[options.child])))
        return
    print(f"{'configuration':<32} {'plan MiB':>9} {'peak MiB':>9} {'plan / peak':>12}  largest moment of the plan")
    for name in options.only:
        command = [sys.executable, "-m", "benchmarks.learner_memory", "--child", name]
        environment = os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}
        output = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        measured = json.loads(output.splitlines()[-1])
        moment, parts = peak(shape_of(CONFIGURATIONS[name], measured["parameters"], measured["trained"]))
        planned, highest = sum(parts.values()) / 2**20, measured["peak"] / 2**20
        print(f"{name:<32} {planned:>9.0f} {highest:>9.0f} {planned / highest:>12.3f}  {moment}", flush=True)


if __name__ == "__main__":
    main()
