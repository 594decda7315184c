"""The summary says what the files say, and can be made again from the run directory alone."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from rlpost.summary import MovedWeights, moved_weights, summarize_run


def write_rows(path: Path, *rows: Mapping[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def step(number: int, stage: str, time: float, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "stage": stage,
        "time": time,
        "timing_s/step": 2.0,
        "perf/rollouts_per_s": 8.0,
        "perf/tokens_per_s": 100.0,
        **{key.replace("__", "/"): value for key, value in more.items()},
    }


def evaluation(when: str, step: int, accuracy: float, error: float, **since: tuple[float, float]) -> dict[str, Any]:
    return {
        "eval": "math",
        "when": when,
        "step": step,
        "accuracy": accuracy,
        "accuracy_se": error,
        "num_prompts": 512,
        "num_samples": 1,
        "temperature": 1.0,
        "time": 0.0,
        **{key: {"mean": mean, "se": se} for key, (mean, se) in since.items()},
    }


def model(path: Path, **tensors: Tensor) -> Path:
    path.mkdir(parents=True)
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two sessions: 5 + 20 s, of which 7 start-up, then killed; 3 + 12 s, of which 4 start-up."""
    path = tmp_path / "run"
    before = model(path / "exports" / "warmup", a__q_proj__weight=torch.zeros(4), norm__weight=torch.ones(2))
    after = model(path / "exports" / "math", a__q_proj__weight=torch.tensor([0.0, 0, 0, 1]), norm__weight=torch.ones(2))
    write_rows(
        path / "events.jsonl",
        {"event": "run_start", "run": "r", "resumed_at": None, "time": 100.0},
        {"event": "ready", "seconds": 5.0, "time": 100.0},
        {"event": "stage_start", "stage": "warmup", "step": 0, "time": 102.0},
        {"event": "stage_end", "stage": "warmup", "step": 1, "time": 110.0},
        {"event": "export", "stage": "warmup", "path": str(before), "time": 110.0},
        {"event": "group_failed", "prompt": "p", "failure": "verifier_error", "detail": "d", "time": 111.0},
        {"event": "run_start", "run": "r", "resumed_at": 2, "time": 1000.0},
        {"event": "ready", "seconds": 3.0, "time": 1000.0},
        {"event": "stage_start", "stage": "math", "step": 2, "time": 1001.0},
        {"event": "export", "stage": "math", "path": str(after), "time": 1011.0},
        {"event": "run_end", "error": None, "time": 1012.0},
    )
    write_rows(
        path / "metrics.jsonl",
        step(1, "warmup", 109.0, **{"time/learner/wait": 1.0, "time/learner/step": 3.0}),
        step(2, "math", 120.0, **{"time/learner/wait": 3.0, "wait/verdict": "learner waited 40% for rollouts: x"}),
        step(3, "math", 1003.0, **{"time/learner/step": 1.0, "wait/verdict": "learner waited 20% for rollouts: x"}),
        step(
            4,
            "math",
            1006.0,
            **{"time/sampler-0/wait": 2.0, "wait/verdict": "balanced: learner waited 1%, samplers 2%"},
        ),
    )
    write_rows(
        path / "eval.jsonl",
        evaluation("math", 4, 0.70, 0.03, since_stage=(0.24, 0.02), since_start=(0.60, 0.045)),
        evaluation("start", 0, 0.10, 0.04),
        evaluation("warmup", 1, 0.46, 0.04, since_stage=(0.36, 0.05), since_start=(0.36, 0.05)),
        evaluation("resume", 2, 0.47, 0.04, since_stage=(0.01, 0.02), since_start=(0.37, 0.05)),
        evaluation("step", 3, 0.48, 0.04, since_stage=(0.02, 0.02), since_start=(0.38, 0.05)),
    )
    return path


def made(run_dir: Path, **more: Any) -> tuple[dict[str, Any], str]:
    """summary.json and what is printed."""
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    console.print(summarize_run(run_dir, **more))
    assert isinstance(console.file, io.StringIO)
    return json.loads((run_dir / "summary.json").read_text()), console.file.getvalue()


def test_evaluations_before_and_after_stages_are_shown_in_order_with_their_gains(run_dir: Path) -> None:
    summary, text = made(run_dir)
    start, warmup, math = summary["evals"]["math"]
    assert [row["when"] for row in (start, warmup, math)] == ["start", "warmup", "math"]
    assert "since_start" not in start and warmup["since_stage"] == {"mean": 0.36, "se": 0.05}
    assert text.count(" +- ") == 3 + 4 + 1, "accuracies, gains, and the heading's"
    assert "70.0 +- 3.0  +24.0 +- 2.0  +60.0 +- 4.5" in " ".join(text.split()).replace(" +2", "  +2").replace(
        " +6", "  +6"
    )


def test_a_stage_has_what_it_took_and_the_accuracy_before_and_after_it(run_dir: Path) -> None:
    """Three steps of 2 s at 8 rollouts/s and 100 tokens/s; the warm-up's rollouts are demonstrations, and none."""
    summary, _ = made(run_dir)
    math = summary["stages"]["math"]
    evals = math.pop("evals")
    assert math == {"steps": 3, "seconds": 6.0, "rollouts": 48, "response_tokens": 600}
    assert evals["math"]["accuracy_before"] == 0.46 and evals["math"]["accuracy"] == 0.70
    assert (evals["math"]["gain"], evals["math"]["gain_se"]) == (0.24, 0.02)
    assert summary["stages"]["warmup"]["rollouts"] == 0
    assert summary["stages"]["warmup"]["evals"]["math"]["accuracy_before"] == 0.10


def test_time_adds_up_over_sessions_and_states(run_dir: Path) -> None:
    """First session 5 + (120 - 100), second 3 + (1012 - 1000); start-ups 5 + 2 and 3 + 1. Learner 4 s waiting of 8."""
    summary, text = made(run_dir)
    time = summary["time"]
    assert time["wall_s"] == 40.0 and time["startup_s"] == 11.0
    assert time["steps_s"] == {"warmup": 2.0, "math": 6.0}
    assert time["workers_s"] == {"learner": {"wait": 4.0, "step": 4.0}, "sampler-0": {"wait": 2.0}}
    assert time["verdicts"] == {"learner waited": 2, "balanced": 1}
    assert "wait 50%" in text and "learner waited in 67%, balanced in 33%" in text
    assert summary["num_steps"] == 4 and summary["num_rollouts"] == 48
    assert summary["failures"] == {
        "groups": {"verifier_error": 1},
        "rollouts_unjudged": 0,
        "samplers_lost": 0,
        "resumes": 1,
    }


def test_it_can_be_made_again_after_the_models_are_gone(run_dir: Path) -> None:
    first, text = made(run_dir)
    (table,) = first["moved_weights"].values()
    assert [(row["kind"], row["num_unchanged"], row["num_entries"]) for row in table] == [("q", 3, 4), ("norm", 2, 2)]
    for file in run_dir.rglob("*.safetensors"):
        file.unlink()
    for folder in (run_dir / "exports").iterdir():
        folder.rmdir()
    again, again_text = made(run_dir)
    assert again == first and again_text == text


def test_a_killed_run_is_not_taken_for_a_finished_one(run_dir: Path) -> None:
    lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "events.jsonl").write_text("".join(lines[:6]))
    summary, text = made(run_dir)
    assert "killed" in summary["error"] and "killed" in text


def test_a_run_without_evaluations_or_steps_still_has_a_summary(tmp_path: Path) -> None:
    write_rows(tmp_path / "events.jsonl", {"event": "run_start", "run": "r", "resumed_at": None, "time": 1.0})
    _, text = made(tmp_path)
    assert "no evaluation was made" in text


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"events\.jsonl"):
        summarize_run(tmp_path)


def test_models_that_cannot_be_compared_cost_only_their_table(run_dir: Path) -> None:
    file = run_dir / "exports" / "math" / "model.safetensors"
    save_file({"a.q_proj.weight": torch.zeros(5).bfloat16(), "norm.weight": torch.ones(2).bfloat16()}, file)
    summary, text = made(run_dir)
    assert summary["moved_weights"] == {} and "not compared" in text and "two versions of one model" in text


# -- moved weights -----------------------------------------------------------------------------------------------------


def test_weights_are_compared_bit_for_bit_by_kind_over_all_files(tmp_path: Path) -> None:
    """q of two layers: 3 and 2 of 4 unchanged, where -0.0 is a change and the same NaN is none: == would count 4."""
    nan = float("nan")
    before = model(
        tmp_path / "before",
        model__layers__0__self_attn__q_proj__weight=torch.tensor([0.0, nan, nan, 2]),
        model__layers__1__self_attn__q_proj__weight=torch.tensor([1.0, 1, 1, 1]),
        model__layers__0__self_attn__q_proj__bias=torch.tensor([1.0]),
        model__layers__0__input_layernorm__weight=torch.ones(2),
        model__layers__0__mlp__gate__weight=torch.ones(1),
        lm_head__weight=torch.ones(3).bfloat16(),
    )
    after = tmp_path / "after"
    model(
        after,
        model__layers__0__self_attn__q_proj__weight=torch.tensor([-0.0, nan, nan, 2]),
        model__layers__0__self_attn__q_proj__bias=torch.tensor([2.0]),
        model__layers__0__input_layernorm__weight=torch.ones(2),
        lm_head__weight=torch.tensor([1, 1, 2]).bfloat16(),
    )
    save_file(
        {
            "model.layers.1.self_attn.q_proj.weight": torch.tensor([1.0, 1, 3, 3]),
            "model.layers.0.mlp.gate.weight": torch.ones(1),
        },
        after / "model-00002-of-00002.safetensors",
    )
    assert moved_weights(before, after) == [
        MovedWeights(kind="q", num_tensors=2, num_entries=8, num_unchanged=5),
        MovedWeights(kind="head", num_tensors=1, num_entries=3, num_unchanged=2),
        MovedWeights(kind="router", num_tensors=1, num_entries=1, num_unchanged=1),
        MovedWeights(kind="norm", num_tensors=1, num_entries=2, num_unchanged=2),
        MovedWeights(kind="bias", num_tensors=1, num_entries=1, num_unchanged=0),
    ]
    assert moved_weights(before, after)[0].unchanged_fraction == 0.625


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"b": torch.zeros(2)}, "^a is only in .*x "),
        ({"a": torch.zeros(3)}, r"a is \(2,\)"),
    ],
)
def test_models_of_another_shape_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    before, after = model(tmp_path / "x", a=torch.zeros(2)), model(tmp_path / "y", **tensors)
    with pytest.raises(ValueError, match=message):
        moved_weights(before, after)


def test_models_stored_in_different_dtypes_are_compared_as_they_would_be_served(tmp_path: Path) -> None:
    served = torch.tensor([1.0, 2.0, 3.0])
    before = model(tmp_path / "x", a=served.bfloat16())
    after = model(tmp_path / "y", a=served + torch.tensor([0.0, 1e-4, 0.5]))
    (row,) = moved_weights(before, after)
    assert (row.num_entries, row.num_unchanged) == (3, 2)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        moved_weights(tmp_path, tmp_path)
