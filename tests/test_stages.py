"""From a recipe to stages: how long they are, and which prompts they get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlpost import stages
from rlpost.config import Recipe, RecipeError
from rlpost.core.temperature import EntropyTarget
from rlpost.recipe import build_recipe
from tests.data.test_sources import write_jsonl


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """recipe(*stages): of ten problems in data "math" and of four in data "sums", four prompts a step."""
    data = {
        name: {
            "source": "dataset",
            "path": str(write_jsonl(tmp_path / f"{name}.jsonl", [{"q": f"{i}+1?", "a": i + 1} for i in range(num)])),
            "task": "math",
            "prompt": "{q}",
            "answer": "a",
        }
        for name, num in (("math", 10), ("sums", 4))
    }
    defaults = {"algo": {"name": "grpo"}, "steps": 3, "prompts_per_step": 4, "max_response_tokens": 8, "lr": 1e-4}

    def build(*given: dict[str, Any]) -> Recipe:
        listed = [{"name": f"s{index}", "data": "math", **stage} for index, stage in enumerate(given)]
        tree = {"name": "t", "model": {"path": "m"}, "data": data, "defaults": defaults, "stage": listed}
        return build_recipe(tree)

    return build


def test_epochs_become_steps_once_the_data_is_loaded(recipe: Any, tiny_model: Path) -> None:
    """Ten prompts, four a step: 1.2 epochs are 12 prompts, and 1.25 one more than three steps hold."""
    given = recipe({}, {"epochs": 1}, {"epochs": 1.2}, {"epochs": 1.25}, {"epochs": 4})
    found = stages.prepare(given, tiny_model, None).stages
    assert [stage.plan.num_steps for stage in found] == [3, 3, 3, 4, 10]
    short = recipe({"epochs": 1, "algo": {"name": "ppo", "critic": {"lr": 1e-5, "warmup_steps": 3}}})
    with pytest.raises(RecipeError, match=r"'s0': critic.warmup_steps = 3 leaves the policy none of 3 steps"):
        stages.prepare(short, tiny_model, None)


def test_a_stage_begins_at_its_temperature_and_knows_what_moves_it(recipe: Any, tiny_model: Path) -> None:
    held = {"entropy": 0.3, "start": 0.9, "max": 1.2, "gain": 0.5}
    given = [{"algo": {"temperature": temperature}} for temperature in (0.7, held)]
    found = stages.prepare(recipe(*given, {"algo": {"name": "online_dpo"}}), tiny_model, None).stages
    target = EntropyTarget(entropy=0.3, min=0.6, max=1.2, gain=0.5)
    assert [(stage.temperature, stage.entropy_target) for stage in found] == [(0.7, None), (0.9, target), (1.0, None)]


def test_a_stage_mixes_its_data_and_keeps_what_its_window_holds(recipe: Any, tiny_model: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    plain = stages.prepare(recipe({}), tiny_model, None).stages[0].prompts
    rows = [
        {
            "model": "m",
            "prompt_id": prompt.id,
            "problem": prompt.problem,
            "fingerprint": prompt.id,
            "outcome": "correct" if int(prompt.reference["answer"]) % 2 else "wrong",
            "answer": None,
            "num_tokens": 1,
        }
        for prompt in map(plain.__getitem__, range(10))
    ]
    write_jsonl(samples, rows)
    keep = {"samples": str(samples), "solved": [0.5, 1.0]}
    plan = stages.prepare(recipe({"keep": keep, "epochs": 1}, {"data": {"math": 3, "sums": 1}}), tiny_model, None)
    odd, mixed = plan.stages
    assert odd.plan.num_steps == 2, "five of ten are kept"
    assert {odd.prompts[i].reference["answer"] for i in range(5)} == {"1", "3", "5", "7", "9"}
    assert plan.left_out == ({"data": "math of stage s0", "reasons": {"solved_too_seldom": 5}, "kept": 5},)
    ids = [mixed.prompts[i].id.split("/")[0] for i in range(8)]
    assert ids.count("math.jsonl") == 6 and ids.count("sums.jsonl") == 2
