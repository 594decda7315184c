"""A learner's step against that of TRL's GRPOTrainer (1.16): same rollouts, model, loss, float32, one thread, one process.

    python -m benchmarks.learner_vs_trl                      # equal lengths, then long-tailed ones

Completions are given: TRL's trainer gets the tensors its own generation would leave, prompts padded on the left and
completions on the right to the longest of the whole step, cut into micro-batches of as many rows as fit the token budget. A
step is its `training_step` per micro-batch (loss, backward), then what its training loop does: clip, AdamW, zero.
Gradient checkpointing, TRL's default, is off, as it is in ours. Tokens are counted without padding.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.common import describe
from benchmarks.packing import draw_lengths, make_learner, make_rollout, step_seconds
from rlpost.types import Rollout

EQUAL_LENGTH = 256


def make_trainer(model_path: Path) -> Any:
    trainer: Any = GRPOTrainer(
        str(model_path),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        train_dataset=Dataset.from_dict({"prompt": ["1"] * 8}),
        args=GRPOConfig(
            output_dir=str(model_path / "trl"),
            model_init_kwargs={"dtype": "float32"},
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            loss_type="dapo",
            epsilon_high=0.28,
            beta=0.0,
            learning_rate=1e-6,
            report_to=[],
        ),
    )
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


def trl_batch(rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
    """What TRL's generation leaves of them: [rows, longest prompt] and [rows, longest completion]."""
    prompts = [r.token_ids[: -r.num_response_tokens] for r in rollouts]
    completions = [r.token_ids[-r.num_response_tokens :] for r in rollouts]
    old = [r.sampler_logprobs[-r.num_response_tokens :] for r in rollouts]

    def pad(rows: Sequence[torch.Tensor], side: str = "right") -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side=side)

    return {
        "prompt_ids": pad(prompts, "left"),
        "prompt_mask": pad([torch.ones_like(row) for row in prompts], "left"),
        "completion_ids": pad(completions),
        "completion_mask": pad([torch.ones_like(row) for row in completions]),
        "old_per_token_logps": pad(old),
        "advantages": torch.tensor([1.0 if index % 2 else -1.0 for index in range(len(rollouts))]),
    }


def trl_step_seconds(trainer: Any, rollouts: Sequence[Rollout], max_tokens: int) -> float:
    """Of one step, forward to update, its tensors made beforehand."""
    batch = trl_batch(rollouts)
    row_tokens = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    num_rows = max(1, max_tokens // row_tokens)
    pieces: list[dict[str, Any]] = [
        {name: tensor[start : start + num_rows] for name, tensor in batch.items()}
        for start in range(0, len(rollouts), num_rows)
    ]
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = len(pieces)
    for piece in pieces:
        piece["num_items_in_batch"] = batch["completion_mask"].sum()
    # training_step takes its micro-batch from there, by the number of steps so far; step 0 would generate.
    trainer._buffered_inputs, trainer._step, trainer.num_iterations = pieces, len(pieces), 10**9
    started = time.perf_counter()
    for _ in pieces:
        trainer.training_step(trainer.model, {}, None)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - started


def compare(name: str, ours: Callable[..., float], theirs: Callable[..., float], draws: Sequence[list[int]]) -> None:
    """Prints their time over ours, round by round."""
    times: dict[str, list[float]] = {"rlpost": [], "TRL": []}
    for index, lengths in enumerate(draws):
        rollouts = [make_rollout(length, row) for row, length in enumerate(lengths)]
        forms = [("rlpost", ours), ("TRL", theirs)]
        for form, seconds in forms[:: 1 if index % 2 else -1]:
            times[form].append(1e6 * seconds(rollouts) / sum(lengths))
    for form, values in times.items():
        print(describe(f"{name}: {form}", values, "us per token"))
    ratios = [theirs / ours for ours, theirs in zip(*times.values(), strict=True)]
    print(describe(f"{name}: TRL / rlpost", ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="rollouts of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        # The trainer second: transformers' and DeepSpeed's process groups are then the same one.
        learner = make_learner(path, options.micro_batch_tokens)
        trainer = make_trainer(path)
        torch.set_num_threads(1)

        def ours(rollouts: Sequence[Rollout]) -> float:
            return step_seconds(learner, rollouts)

        def theirs(rollouts: Sequence[Rollout]) -> float:
            return trl_step_seconds(trainer, rollouts, options.micro_batch_tokens)

        warm = [make_rollout(EQUAL_LENGTH, row) for row in range(4)]
        ours(warm)
        theirs(warm)
        compare("equal lengths", ours, theirs, [[EQUAL_LENGTH] * options.rows] * options.rounds)
        tails = [draw_lengths(options.rows, seed=seed) for seed in range(options.rounds)]
        compare("long-tailed", ours, theirs, tails)
        learner.close()


if __name__ == "__main__":
    main()
