"""The recipe at the door: what is refused, and whether the message names the remedy."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlpost import cli, config
from rlpost.config import GRPO, SFT, SGD, AdamW, Recipe, RecipeError
from rlpost.engines import sampling
from rlpost.memory import learner_memory
from rlpost.plan import (
    Resources,
    check_resources,
    learner_line,
    learner_shape,
    max_model_len,
    num_parameters,
    num_trained,
    render_plan,
)
from rlpost.recipe import build_recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"

TREE: dict[str, Any] = {
    "name": "t",
    "model": {"path": "some/model-7B"},
    "data": {
        "math": {"source": "dataset", "path": "x.jsonl", "task": "math", "prompt": "{problem}", "answer": "answer"}
    },
    "defaults": {"steps": 3, "prompts_per_step": 4, "max_response_tokens": 16, "lr": 1e-4, "algo": {"name": "grpo"}},
    "stage": [
        {"name": "warm", "data": "math", "algo": {"name": "sft"}, "lr": 1e-3},
        {"name": "rl", "data": "math", "algo": {"group_size": 16}},
    ],
}


def tree(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(TREE) | changes


def rendered(recipe: Recipe) -> str:
    """What --dry-run prints."""
    console = Console(width=200, soft_wrap=True)
    with console.capture() as capture:
        console.print(render_plan(recipe, Resources(cores=2, gpus=0)))
    return capture.get()


def test_a_stage_inherits_what_it_does_not_set_and_another_algorithm_inherits_no_settings() -> None:
    recipe = build_recipe(TREE)
    warm, rl = recipe.stage
    assert isinstance(warm.algo, SFT) and warm.lr == 1e-3 and warm.steps == 3
    assert isinstance(rl.algo, GRPO) and rl.algo.group_size == 16 and rl.algo.max_staleness == 2 and rl.lr == 1e-4


def test_a_stage_is_as_long_as_its_steps_or_its_epochs() -> None:
    recipe = build_recipe(TREE, ["stage.rl.epochs=0.5"])
    assert recipe.stage[1].steps is None and "rl: grpo on math, 0.5 epochs in steps of 4 prompts" in rendered(recipe)
    with pytest.raises(RecipeError, match="'rl': give either steps or epochs"):
        build_recipe(TREE, ["stage.rl.epochs=1", "stage.rl.steps=1"])
    with pytest.raises(RecipeError, match="epochs of math, code end at different steps: give steps"):
        build_recipe(TREE, ["stage.rl.epochs=1", "stage.rl.data={math=1, code=1}"])


def test_a_temperature_is_a_number_or_an_entropy_to_hold_within_what_samplers_take() -> None:
    recipe = build_recipe(TREE, ["stage.rl.algo.temperature={entropy=0.3}"])
    given = recipe.model_dump(mode="json")["stage"][1]["algo"]["temperature"]
    assert given == {"entropy": 0.3, "start": 1.0, "min": 0.6, "max": 1.4, "gain": 0.1}
    assert f"temperature {given}" in rendered(recipe)
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert "temperature 0.85" in rendered(build_recipe(TREE, ["stage.rl.algo.temperature=0.85"]))
    assert (config.COLDEST, config.HOTTEST) == (sampling.COLDEST, sampling.HOTTEST)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.wokers=2", r"sampler.wokers: no such key; did you mean 'workers'"),
        ("sede=1", r"sede: no such key; did you mean 'seed'"),
        ("stage.rl.algo.group_sise=4", r"group_sise: no such key; did you mean 'group_size'"),
        ("defaults.promts_per_step=4", r"did you mean 'prompts_per_step'"),
        ("stage.nowhere.lr=1", r"stage.nowhere: no such entry; there are \['warm', 'rl'\]"),
        ("stage.rl.lr=0", r"stage.1.lr: .*greater than 0 \(got 0\)"),
        ("stage.rl.data=cod", r"'rl' uses data = 'cod', but \[data\] has \['math'\]"),
        ("stage.rl.data={math=1, code=1}", r"'rl' uses data = 'code', but"),
        ("stage.rl.data={math=0}", r"data.*math: .*greater than 0"),
        ("stage.warm.retire_above=0.9", r"'warm' learns from given responses, .* leave retire_above out"),
        ("stage.rl.name=warm", r"names must differ"),
        ("learner.zero_stage=0", r"learner.zero_stage.*1, 2 or 3"),
        ("sampler.gpus=2", r"sampler.gpus: a process takes 0 \(the CPU\), 1, or 0.5: .* \(got 2\)"),
        ("sampler.gpus=0.5", r"sampler: gpus = 0.5 without kv_cache_mib: .* as in kv_cache_mib = 4096"),
        ("learner={gpus_per_rank=0.5, ranks=2}", r"learner: gpus_per_rank = 0.5 with ranks = 2: .* Use ranks = 1, or"),
        ("data.math.task=code", r'task = "code" needs tests'),
        ("stage.rl.algo.kl_estimator=k1", r"gradient of log pi alone.*Use kl_place = \"reward\""),
        ("stage.rl.algo.kl_place=reward", r'"k3" in the reward does not have the gradient of a KL: use "k1"'),
        ("stage.rl.algo={advantage='batch_std', kl_coef=0.1}", r"divides the whole gradient.*kl_place = \"reward\""),
        ("stage.rl.algo={clip='cispo', dual_clip=3.0}", r"drop one"),
        ("stage.rl.algo.truncated=bootstrap", r'only name = "ppo" estimates: use "train" or "mask"'),
        ("stage.rl.algo={name='ppo'}", r"critic: this key is required"),
        (
            "stage.rl.algo={name='ppo', critic={lr=1e-5}, advantage='group_std'}",
            r'leave advantage out, or use name = "grpo"',
        ),
        ("stage.rl.algo={name='ppo', critic={lr=1e-5}, refill=true}", r"those teach as well: leave it out"),
        ("stage.rl.algo={name='ppo', critic={lr=1e-5}, beta=0.1}", r"'beta' is a key of other tables"),
        ("stage.rl.algo={name='ppo', critic={lr=1e-5}, gae_lamda=0.9}", r"did you mean 'gae_lambda'"),
        (
            "stage.rl.algo={name='ppo', critic={lr=1e-5, warmup_steps=3}}",
            r"none of 3 steps.*fewer warmup_steps or more",
        ),
        ("stage.rl.algo={name='dpo'}", r"needs data with source = \"pairs\", not 'dataset'.*online_dpo"),
        ("stage.rl.algo={name='online_dpo', loss='ipo', label_smoothing=0.1}", r'no meaning in loss = "ipo"'),
        ("stage.rl.algo={name='online_dpo', gamma=0.5}", r'gamma is a setting of loss = "simpo" and has'),
        (
            "stage.rl.algo={name='online_dpo', undesirable_weight=2.0}",
            r'undesirable_weight is a setting of loss = "kto"',
        ),
        ("stage.rl.algo={name='online_dpo', min_desirable=0.9}", r'min_desirable is a setting of loss = "kto"'),
        ("stage.rl.algo={name='online_dpo', loss='kto', min_chosen=0.9}", r'min_chosen .* no meaning in loss = "kto"'),
        ("stage.rl.algo={name='online_dpo', loss='kto', nll_coef=1.0}", r'nll_coef .* no meaning in loss = "kto"'),
        ("stage.rl.algo={name='online_dpo', loss='kto', refill=true}", r"those teach as well: leave it out"),
        (
            "data.math={source='pairs', path='x', prompt='{p}', chosen='c', rejected='r'}",
            r"'rl' needs prompts that a verifier",
        ),
        ("stage.rl.keep={samples='s', solved=[0.4, 0.1]}", r"stage.1.keep.solved: .* use \[0.1, 0.4\]"),
        ("stage.rl.keep={samples='s', solved=[0, 6]}", r"stage.1.keep.solved.1: .*less than or equal to 1"),
        ("stage.rl.algo.weight_high=0.5", r"weight_high.*greater than or equal to 1"),
        ("stage.rl.reward.acuracy=1", r"acuracy: no such key; did you mean 'accuracy'"),
        ("stage.warm.reward.accuracy=1", r"'warm' learns from given responses and has no reward to shape"),
        ("stage.rl.reward.overlong.buffer_tokens=17", r"buffer_tokens = 17 is more than max_response_tokens = 16"),
        (
            "stage.rl.until.plateau={figure='eval/m/accuracy', min_gain=0.01}",
            r"no \[\[eval\]\] gives until.plateau.figure",
        ),
        ("sampler.eval_workers=2", r"eval_workers = 2, and there is nothing to evaluate: add an \[\[eval\]\]"),
        ("stage.rl.name=step", r"eval.jsonl has other rows under the name 'step'"),
        (
            "stage.warm.until.plateau={figure='reward/mean', min_gain=0.01}",
            r"'warm'.*no reward: use eval/<name>/accuracy",
        ),
        ("stage.rl.until.plateau={figure='reward/std', min_gain=0.01}", r"until.plateau.figure: .*pattern"),
        ("stage.rl.until.plateau={figure='reward/mean', min_gain=0}", r"until.plateau.min_gain: .*greater than 0"),
        ("verifier.min_tier=rlimits-only", r"verifier.min_tier.*namespace.*landlock"),
        ("verifier.code.deadlin_s=3", r"deadlin_s: no such key; did you mean 'deadline_s'"),
        ("learner.lora={rank=4, alpha=8, dropout=0.05}", r"learner.lora: dropout is not offered: .* Leave it out"),
        ("learner.lora={rank=4, alpha=8, dora=true}", r"learner.lora: dora is not offered"),
        ("learner.lora={rank=4, alpha=8, init='pissa'}", r"learner.lora: init is not offered: .*PiSSA"),
        ("learner.lora={rank=4, alfa=8}", r"learner.lora.alfa: no such key; did you mean 'alpha'"),
        ("learner.lora={rank=0, alpha=8}", r"learner.lora.rank.*greater than 0"),
        ("learner.lora={rank=4, alpha=8, targets=[]}", r"learner.lora.targets"),
        ("publish.policy=adapter", r'publish.policy = "adapter", and there is none: add \[learner.lora\]'),
        ("publish.every=4", r"'rl': publish.every = 4, .* Use max_staleness >= 3, or publish.every <= 3"),
        ("learner.optimizer={name='lion', eps=1e-8}", r"learner.optimizer.lion.eps: 'eps' .* has no meaning in this"),
        ("learner.optimizer={momentum=0.9}", r"learner.optimizer.adamw.momentum: 'momentum' .* has no meaning"),
        ("learner.optimizer={name='adam'}", r"learner.optimizer: .*'adamw', 'lion', 'sgd'"),
        ("learner.optimizer.betas=[0.9, 1.0]", r"learner.optimizer.adamw.betas.1: .*less than 1"),
        ("stage.rl.subnetwork={select='random', density=0}", r"subnetwork.random.density: .*greater than 0"),
        ("stage.rl.subnetwork={select='random', density=0.1, rank=3}", r"'rank' .* has no meaning in this"),
        ("stage.rl.subnetwork={select='update', before='a'}", r"subnetwork.update.after: this key is required"),
        ("stage.rl.subnetwork={select='file'}", r"subnetwork.file.path: this key is required"),
        ("stage.rl.subnetwork={select='lowest'}", r"'update', 'principal', 'random', 'file'"),
        ("stage.rl.algo.temperature=2.5", r"algo.grpo.temperature.number: .*less than or equal to 2 \(got 2.5\)"),
        ("stage.rl.algo.temperature={start=0.9}", r"temperature.table.entropy: this key is required"),
        ("stage.rl.algo.temperature={entropy=0}", r"temperature.table.entropy: .*greater than 0"),
        (
            "stage.rl.algo.temperature={entropy=0.3, min=0.001}",
            r"temperature.table.min: .*greater than or equal to 0.01",
        ),
        (
            "stage.rl.algo.temperature={entropy=0.3, start=0.5}",
            r"start = 0.5 is outside of min = 0.6 and max = 1.4: use",
        ),
        (
            "stage.rl.algo.temperature={entropy=0.3, gian=0.1}",
            r"temperature.table.gian: no such key; did you mean 'gain'",
        ),
        ("stage.warm.algo.temperature={entropy=0.3}", r"sft.temperature: 'temperature' .* has no meaning in this one"),
        ("justaword", r"not of the form key.path=value"),
        ("model.build.hidden_size=64", r"either path|required"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_its_place_and_a_remedy(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(TREE, [override])


def test_a_plateau_of_an_evaluation_needs_one_within_the_stage() -> None:
    plateau = "stage.rl.until.plateau={figure='eval/m/accuracy', min_gain=0.01}"
    sets = "eval=[{name='m', data='math', max_response_tokens=16%s}]"
    with pytest.raises(RecipeError, match=r"has no value within the stage: give that \[\[eval\]\] an `every`"):
        build_recipe(TREE, [plateau, sets % ""])
    build_recipe(TREE, [plateau, sets % ", every=5"])


def test_a_bootstrapped_response_can_have_no_reward_for_its_length() -> None:
    algo = "stage.rl.algo={name='ppo', critic={lr=1e-5}, truncated='%s'}"
    for reward in ("stage.rl.reward.overlong.buffer_tokens=4", "stage.rl.reward.cosine_length.weight=1.0"):
        build_recipe(TREE, [algo % "train", reward])
        with pytest.raises(
            RecipeError, match=r'truncated = "bootstrap" puts a value.*use truncated = "train", or remove'
        ):
            build_recipe(TREE, [algo % "bootstrap", reward])


def test_an_optimizer_without_a_name_is_adamw_and_each_has_its_own_defaults() -> None:
    assert build_recipe(TREE).learner.optimizer == AdamW(name="adamw", betas=(0.9, 0.999), eps=1e-8)
    assert build_recipe(TREE, ["learner.optimizer.betas=[0.9, 0.98]"]).learner.optimizer.betas == (0.9, 0.98)  # type: ignore[union-attr]
    assert build_recipe(TREE, ["learner.optimizer.name=lion"]).learner.optimizer.betas == (0.9, 0.99)  # type: ignore[union-attr]
    sgd = build_recipe(TREE, ["learner.optimizer={name='sgd', weight_decay=0.1}"]).learner.optimizer
    assert sgd == SGD(name="sgd", momentum=0.9, weight_decay=0.1, max_grad_norm=1.0)


def test_batch_arithmetic_suggests_settings_that_work() -> None:
    """2 prompts x 2 rollouts = 4 rollouts cannot occupy 6 ranks: 3 prompts (6 rollouts) can, and so can 4 ranks."""
    overrides = [
        "stage.rl.prompts_per_step=2",
        "stage.rl.algo.group_size=2",
        "learner.ranks=6",
        "stage.warm.prompts_per_step=6",
    ]
    with pytest.raises(RecipeError, match=r"prompts_per_step >= 3, or learner.ranks <= 4"):
        build_recipe(TREE, overrides)
    build_recipe(TREE, [*overrides, "stage.rl.prompts_per_step=3"])
    build_recipe(TREE, [*overrides, "learner.ranks=4"])


def test_a_response_longer_than_a_micro_batch_is_refused_with_both_ways_out() -> None:
    with pytest.raises(RecipeError, match=r"micro_batch_tokens >= 40000, or max_response_tokens <= 4096"):
        build_recipe(TREE, ["stage.rl.max_response_tokens=20000"])


def test_overrides_take_toml_values_and_bare_words() -> None:
    recipe = build_recipe(TREE, ["seed=7", "stage.rl.algo.refill=true", "stage.0.lr=5e-4", "model.path=other/model"])
    assert recipe.seed == 7 and recipe.stage[1].algo.refill is True and recipe.stage[0].lr == 5e-4  # type: ignore[union-attr]
    assert recipe.model.path == "other/model"


def test_the_file_itself_can_be_wrong(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("name = ")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(bad)


def test_more_workers_than_cores_or_gpus_is_refused_with_demand_and_supply() -> None:
    recipe = build_recipe(TREE, ["sampler.workers=3", "learner.ranks=2", "learner.threads=2"])
    with pytest.raises(RecipeError, match=r"needs 7 cores .* this machine has 2"):
        check_resources(recipe, Resources(cores=2, gpus=0))
    check_resources(recipe, Resources(cores=7, gpus=0))
    own = build_recipe(TREE, ["sampler.eval_workers=2", "eval=[{name='m', data='math', max_response_tokens=16}]"])
    with pytest.raises(
        RecipeError, match=r"needs 4 cores \(\(sampler.workers 1 \+ sampler.eval_workers 2\) x .* has 3"
    ):
        check_resources(own, Resources(cores=3, gpus=0))
    check_resources(own, Resources(cores=4, gpus=0))
    check_resources(own, Resources(cores=1, gpus=0), learning=False)  # `rlpost eval` has its samplers alone
    assert re.search(r"evaluator \(vLLM\) +│ 2 +│ 1 core", rendered(own)) and "evaluator" not in rendered(recipe)
    recipe = build_recipe(TREE, ["sampler.gpus=1", "sampler.workers=3", "learner.gpus_per_rank=1"])
    with pytest.raises(RecipeError, match=r"needs 4 GPUs .* this machine has 1"):
        check_resources(recipe, Resources(cores=64, gpus=1))
    shared = ["sampler={gpus=0.5, kv_cache_mib=4096}", "learner.gpus_per_rank=0.5"]
    check_resources(build_recipe(TREE, shared), Resources(cores=1, gpus=1))
    with pytest.raises(RecipeError, match=r"needs 1.5 GPUs \(.* 2 x sampler.gpus 0.5 .*gpus_per_rank 0.5\)"):
        check_resources(build_recipe(TREE, [*shared, "sampler.workers=2"]), Resources(cores=1, gpus=1))
    recipe = build_recipe(TREE, ["sampler.gpus=1", "ray_address=10.0.0.1:6379"])
    with pytest.raises(RecipeError, match=r"the cluster at 10.0.0.1:6379 has 0: lower them, or give a larger cluster"):
        check_resources(recipe, Resources(cores=64, gpus=0))


def test_sizes_are_read_off_what_is_known() -> None:
    assert num_parameters(build_recipe(TREE)) == 7_000_000_000
    assert max_model_len(build_recipe(TREE)) == 1024 + 16


def test_the_plan_counts_a_built_model_exactly(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from rlpost.engines.scratch import build_model

    build = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 300}
    build_model(tmp_path, **build, seed=0)
    exact = sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())
    assert num_parameters(build_recipe(tree(model={"path": str(tmp_path)}))) == exact
    estimate = num_parameters(build_recipe(tree(model={"build": build})))
    assert estimate == pytest.approx(exact, rel=0.1)
    (tmp_path / "model.safetensors").write_bytes(b"half of")
    with pytest.raises(RecipeError, match=r"model.safetensors is damaged .* download it again"):
        num_parameters(build_recipe(tree(model={"path": str(tmp_path)})))


def row(text: str, name: str) -> list[str]:
    """The cells of a table's row."""
    line = next((line for line in text.splitlines() if line.startswith(f"\u2502 {name} ")), "")
    return [cell.strip() for cell in line.strip("\u2502").split("\u2502")][1:]


def test_the_plan_counts_what_stages_need_beside_the_policy() -> None:
    """7e9 parameters in bfloat16 (13.0 GiB): a reference of 2 bytes each, a critic of 2 + (2 + 4) + 12 (130.4 GiB)."""
    text = rendered(build_recipe(TREE))
    assert row(text, "weights") == ["13.0 GiB"] * 4 and row(text, "gradients") == ["39.1 GiB"] * 4
    assert row(text, "optimizer") == ["78.2 GiB"] * 4 and row(text, "workspace") == ["-", "-", "52.2 GiB", "-"]
    assert "without activations" in text and row(text, "critic") == row(text, "reference") == []
    text = rendered(build_recipe(TREE, ["stage.rl.algo={name='ppo', critic={lr=1e-5}, kl_coef=0.1}"]))
    assert row(text, "critic") == ["130.4 GiB"] * 4 and row(text, "reference") == ["13.0 GiB"] * 4
    for name, needs in (("dpo", True), ("simpo", False)):
        text = rendered(build_recipe(TREE, [f"stage.rl.algo={{name='online_dpo', group_size=4, loss='{name}'}}"]))
        assert bool(row(text, "reference")) == needs


def test_the_plan_counts_an_observer_in_the_driver() -> None:
    """7e9 parameters served in bfloat16: 7 bytes of each are 45.6 GiB; in float32, compared in bfloat16, 13 are 84.8."""
    assert "observer" not in rendered(build_recipe(TREE))
    text = rendered(build_recipe(TREE, ["publish.observer.budget=0.05"]))
    assert row(text, "observer (in the driver)") == ["1", "5% of a core", "45.6 GiB"]
    text = rendered(build_recipe(TREE, ["publish.observer.dtype=bfloat16", "sampler.dtype=float32"]))
    assert row(text, "observer (in the driver)")[2] == "84.8 GiB"


def test_the_plan_of_an_adapter_counts_what_is_trained(tiny_model: Path) -> None:
    """Two layers of four 64 x 64 matrices and three of 192 x 64: rank 4 x (4 x 128 + 3 x 256) x 2 = 10,240."""
    lora = ["learner.lora={rank=4, alpha=8}", "learner.dtype=float32"]
    recipe = build_recipe(tree(model={"path": str(tiny_model)}), lora)
    assert num_trained(recipe, 1) == 10_240
    text = rendered(recipe)
    assert "LoRA adapters of rank 4, alpha 8, on all-linear (0.0102 M parameters)" in text
    build = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 300}
    assert num_trained(build_recipe(tree(model={"build": build}), lora), 1) == pytest.approx(10_240, rel=0.1)
    assert num_trained(build_recipe(TREE), 7) == 7

    hub = build_recipe(TREE, ["learner.lora={rank=4, alpha=8, targets=['q_proj', 'v_proj']}"])
    assert num_trained(hub, 7) is None
    assert "on q_proj, v_proj (size unknown before the model is downloaded)" in rendered(hub)
    with pytest.raises(RecipeError, match=r"'w1' is no layer of LlamaForCausalLM .* 'q_proj'"):
        num_trained(build_recipe(tree(model={"path": str(tiny_model)}), [*lora, "learner.lora.targets=['w1']"]), 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lora.rank=513", "learner.lora.rank = 513, and vLLM serves adapters up to rank 512"),
        (
            "sampler={gpus=1, dtype='float32'}",
            'sampler.dtype = "float32", and vLLM\'s GPU kernels take adapters in 16 bits',
        ),
    ],
)
def test_an_adapter_that_no_sampler_could_serve_is_refused(override: str, message: str) -> None:
    beside = ["learner.lora={rank=512, alpha=8}", "publish.policy=adapter"]
    build_recipe(TREE, beside)
    with pytest.raises(RecipeError, match=message):
        build_recipe(TREE, [*beside, override])
    build_recipe(TREE, [beside[0], override])


def test_the_plan_counts_an_adapter_that_is_served_beside_the_weights(tiny_model: Path) -> None:
    """A hundred million: 0.2 GB in each sampler, and as much again in the image of a learner on the CPU."""
    lora = "learner.lora={rank=4, alpha=8}"
    plans, images = [], []
    for policy in ("merged", "adapter"):
        recipe = build_recipe(tree(model={"path": str(tiny_model)}), [lora, f"publish.policy={policy}"])
        shape = learner_shape(recipe, 10**9, 10**8)
        assert shape is not None
        images.append(learner_memory(shape)["step"]["image"])
        plans.append(rendered(recipe))
    assert images == [2e9, 2.2e9]
    assert "published merged into the weights" in plans[0] and "published beside the weights" in plans[1]
    assert "0 MiB adapter" in plans[1] and "adapter +" not in plans[0]
    hub = [rendered(build_recipe(TREE, [lora, f"publish.policy={policy}"])) for policy in ("merged", "adapter")]
    assert "13.0 GiB weights + 64 MiB KV" in hub[0] and "13.0 GiB weights + an adapter" in hub[1]


def test_a_run_begins_with_the_largest_moment_of_its_memory_plan(tiny_model: Path) -> None:
    """Frozen weights cost their 2 bytes; 10,240 adapter weights 2 + 6 + 12, which is 0 MiB."""
    overrides = ["learner.lora={rank=4, alpha=8}", "learner.micro_batch_tokens=16384"]
    recipe = build_recipe(tree(model={"path": str(tiny_model)}), overrides)
    parameters = num_parameters(recipe)
    shape = learner_shape(recipe, parameters, num_trained(recipe, parameters))
    assert shape is not None and shape.adapter and (shape.trained, shape.width) == (10_240, 2)
    line = learner_line(recipe)
    assert "(estimate): " in line and " at most, in backward: weights 0 MiB, " in line
    assert learner_line(build_recipe(TREE, overrides)).endswith("not known before the model is downloaded")


def test_the_memory_plan_is_that_of_the_stage_that_changes_most() -> None:
    """Without activations, whose sizes a hub's name does not tell, 7 B at 2 bytes for weights, 6 for gradients, 4 for
    masters, 2 for masks and 8 for the moments of an entry."""

    def plan(*overrides: str) -> tuple[float, str]:
        recipe = build_recipe(TREE, overrides)
        shape = learner_shape(recipe, 7_000_000_000, 7_000_000_000)
        assert shape is not None
        return learner_memory(shape)["backward"]["optimizer"] / 7e9, learner_line(recipe)

    few, more = (
        f"stage.{name}.subnetwork={{select='random', density={d}}}" for name, d in (("rl", 0.1), ("warm", 0.25))
    )
    assert plan()[0] == 12
    assert plan(few)[0] == 14  # the first stage trains all
    assert plan(few, more)[0] == 4 + 2 + 8 * 0.25
    optimizer, line = plan("stage.rl.subnetwork={select='update', before='a', after='b'}", more)
    assert optimizer == 14 and "how many an update has is not known yet" in line
    assert plan("stage.rl.subnetwork={select='file', path='m'}", more)[0] == 14
    assert "update" not in plan(few, more)[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name.x=1", "name is a value, not a table"),
        ("defaults=3", "defaults = 3 is a value, not a table"),
        ("defaults.algo=3", "defaults.algo|stage.1.algo"),
        ("stage=[3]", "stage.0: "),
    ],
)
def test_values_where_tables_belong_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe(TREE, [override])


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match=r"r.toml is not valid TOML"):
        load_recipe(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_has_a_plan_and_says_what_it_takes_and_what_it_reaches(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_recipe(path).name == path.stem
    assert cli.main(["train", str(path), "--dry-run"]) == 0
    assert f"run directory: runs/{path.stem}" in capsys.readouterr().out
    head = path.read_text().partition("\nname = ")[0]
    assert all(line.startswith("#") for line in head.splitlines() if line) and "# Hardware: " in head
    assert re.search(r"\d %|[Nn]ot yet run", head)


def test_a_subnetwork_and_an_adapter_exclude_each_other() -> None:
    overrides = ["learner.lora={rank=4, alpha=8}", "stage.rl.subnetwork={select='random', density=0.1}"]
    with pytest.raises(RecipeError, match=r"stage 'rl': a subnetwork .* drop one of them"):
        build_recipe(TREE, overrides)
