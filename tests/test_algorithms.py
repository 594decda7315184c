"""docs/algorithms.md: every row is a recipe, and resolves to the objective it promises."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rlpost.config import build_recipe
from rlpost.core.objective import PolicyGradient
from rlpost.run import objective_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "algorithms.md"
ROW = re.compile(r"^\| (?P<method>[^|]+) \| `(?P<settings>[a-z_]+ = [^`]*)` \|.*(arxiv|doi)\.org", re.MULTILINE)
METHODS = {
    m["method"]: tomllib.loads(f"algo = {{ {m['settings']} }}")["algo"] for m in ROW.finditer(DOCUMENT.read_text())
}
NAMED = {"GRPO", "Dr. GRPO", "DAPO", "RLOO", "REINFORCE++ with baseline", "GSPO", "CISPO", "IcePop"}


def test_the_table_has_the_methods_a_reader_looks_for() -> None:
    assert set(METHODS) >= NAMED


@pytest.mark.parametrize(("method", "settings"), METHODS.items(), ids=METHODS)
def test_every_row_is_a_recipe_and_all_its_settings_reach_the_learner(method: str, settings: dict[str, Any]) -> None:
    recipe = build_recipe(
        {
            "name": "t",
            "model": {"path": "m"},
            "data": {"d": {"source": "generated", "families": ["arithmetic"]}},
            "stage": [
                {
                    "name": "s",
                    "data": "d",
                    "steps": 1,
                    "prompts_per_step": 1,
                    "max_response_tokens": 8,
                    "lr": 1e-6,
                    "algo": {"name": "grpo", **settings},
                }
            ],
        }
    )
    objective = objective_of(recipe.stage[0].algo)
    assert isinstance(objective, PolicyGradient)
    pipeline_keys = {"refill"}
    assert {key: getattr(objective, key) for key in settings if key not in pipeline_keys} == {
        key: value for key, value in settings.items() if key not in pipeline_keys
    }
