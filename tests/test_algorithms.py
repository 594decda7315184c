"""docs/algorithms.md: every row is a recipe, and resolves to the objective it promises."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.learning import methods
from rlpost.core.critic import Critic
from rlpost.core.kto import KTO
from rlpost.core.objective import PolicyGradient
from rlpost.core.preference import Preference
from rlpost.recipe import build_recipe
from rlpost.stages import objective_of

METHODS = methods()
NAMED = {
    "GRPO", "Dr. GRPO", "DAPO", "RLOO", "REINFORCE++ with baseline", "GSPO", "CISPO", "IcePop",
    "PPO with GAE", "VC-PPO", "DPO", "IPO", "SimPO", "ORPO", "KTO",
}  # fmt: skip
DATA = {
    "generated": {"source": "generated", "families": ["arithmetic"]},
    "pairs": {"source": "pairs", "path": "p.jsonl", "prompt": "{prompt}", "chosen": "chosen", "rejected": "rejected"},
}
PIPELINE_KEYS = {"refill"}
CRITIC_KEYS = {"critic", "gae_gamma", "gae_lambda"}
CASES = [
    pytest.param(name, settings, id=f"{method} ({name})")
    for method, settings in METHODS.items()
    for name in (("dpo", "online_dpo") if "loss" in settings else ("ppo",) if "critic" in settings else ("grpo",))
]


def test_the_tables_have_the_methods_a_reader_looks_for() -> None:
    assert set(METHODS) >= NAMED


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_row_is_a_recipe_and_all_its_settings_reach_the_learner(name: str, settings: dict[str, Any]) -> None:
    stage = {
        "name": "s",
        "data": "pairs" if name == "dpo" else "generated",
        "steps": 100,
        "prompts_per_step": 1,
        "max_response_tokens": 8,
        "lr": 1e-6,
        "algo": {"name": name, **settings},
    }
    recipe = build_recipe({"name": "t", "model": {"path": "m"}, "data": DATA, "stage": [stage]})
    objective = objective_of(recipe.stage[0].algo)
    expected = {key: value for key, value in settings.items() if key not in PIPELINE_KEYS | CRITIC_KEYS}
    if settings.get("loss") == "kto":
        assert isinstance(objective, KTO)
        del expected["loss"]
    else:
        assert isinstance(objective, PolicyGradient if name in ("grpo", "ppo") else Preference)
    assert {key: getattr(objective, key) for key in expected} == expected
    if isinstance(objective, PolicyGradient) and name == "ppo":
        lr, decay = settings["critic"]["lr"], settings["gae_lambda"]
        assert objective.critic == Critic(lr=lr, gae_lambda=decay, gae_gamma=settings.get("gae_gamma", 1.0))
