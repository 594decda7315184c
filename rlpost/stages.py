"""From a recipe to stages the controller can run: settings resolved, data loaded and checked."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlpost.checkpoint import Checkpoint
from rlpost.config import (
    PPO,
    SFT,
    Algo,
    DataConfig,
    EntropyTargetConfig,
    GeneratedData,
    LoraConfig,
    PairData,
    PolicyGradientAlgo,
    Recipe,
    RecipeError,
    Sampled,
    StageConfig,
    SubnetworkConfig,
    UntilConfig,
    check_warmup,
)
from rlpost.core.critic import Critic
from rlpost.core.kto import KTO
from rlpost.core.objective import Objective, PolicyGradient, StageSpec, Supervised
from rlpost.core.optimizers import OPTIMIZERS
from rlpost.core.preference import Preference
from rlpost.core.subnetwork import SUBNETWORKS
from rlpost.core.temperature import EntropyTarget
from rlpost.data.answers import stated_answer
from rlpost.data.difficulty import keep
from rlpost.data.pairs import load_pairs
from rlpost.data.prompts import MixedPrompts, Prompts, ShuffledPrompts
from rlpost.data.sources import CARD, TokenizerLike, check_golds, load_dataset_prompts, load_generated, local_file
from rlpost.pipeline.buffer import StagePlan
from rlpost.pipeline.controller import Stage
from rlpost.pipeline.evaluation import EvalSet
from rlpost.pipeline.moving_on import Plateau, Until
from rlpost.pipeline.ports import PromptSource
from rlpost.pipeline.seeds import derive_seed

HELDOUT_SEED = 0
"""Held-out problems are the same whatever the run's seed, so that seeds compare."""
NUM_CHECKED_GENERATED = 32
"""Generated golds are right by construction; this many are still put before the verifier, to try the verifier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Everything a run needs before its workers are up."""

    stages: tuple[Stage, ...]
    eval_sets: tuple[EvalSet, ...]
    left_out: tuple[Mapping[str, Any], ...]
    """Fields of the events that say how many rows were left out, of which data or by which stage."""
    data: Mapping[str, Mapping[str, Any]]
    """What is told of each data set when the run opens."""
    decode: Callable[[Sequence[int]], str]
    """The text of tokens, special ones too."""
    start: Checkpoint | None

    @property
    def num_steps(self) -> tuple[int, ...]:
        """Of each stage, as far as is known: a run that is continued may have ended some early."""
        return self.start.position.num_steps if self.start else tuple(stage.plan.num_steps for stage in self.stages)


def prepare(recipe: Recipe, model_path: Path, checkpoint: Checkpoint | None) -> RunPlan:
    """Load and check all data; resolve the stages."""
    tokenizer = _tokenizer(model_path)
    if recipe.learner.lora is not None:
        _check_lora(recipe.learner.lora, model_path)
    used = {name for stage in recipe.stage for name in stage.shares}
    prompts = {name: _load(recipe, name, tokenizer) for name in used | {item.data for item in recipe.eval}}
    kept = {
        (stage.name, name): keep(prompts[name], stage.keep, stage=stage.name, data=name)
        for stage in recipe.stage
        if stage.keep is not None
        for name in stage.shares
    }
    stages = tuple(
        _stage(recipe, stage, {name: kept.get((stage.name, name), prompts[name]) for name in stage.shares})
        for stage in recipe.stage
    )
    if checkpoint is not None:
        for stage, fingerprint in zip(stages, checkpoint.fingerprints, strict=True):
            if stage.prompts.fingerprint != fingerprint:
                raise RecipeError(
                    f"the data of stage {stage.name!r} is not what this run began with: cannot resume on it"
                )
    named = {**prompts, **{f"{name} of stage {stage}": found for (stage, name), found in kept.items()}}
    left_out = tuple(
        {"data": name, "reasons": dict(found.left_out), "kept": len(found)}
        for name, found in named.items()
        if found.left_out
    )
    return RunPlan(
        stages=stages,
        eval_sets=_eval_sets(recipe, prompts),
        left_out=left_out,
        data={name: _told(recipe.data[name], found) for name, found in prompts.items()},
        decode=tokenizer.decode,
        start=checkpoint,
    )


def _told(config: DataConfig, prompts: Prompts) -> dict[str, Any]:
    """Where the data is from, what was read of it, and its card, if it has one beside it."""
    source = {"families": config.families} if isinstance(config, GeneratedData) else {"path": config.path}
    path = None if isinstance(config, GeneratedData) else local_file(config)
    card = None if path is None else path.with_name(CARD)
    return {
        **source,
        "num_prompts": len(prompts),
        "fingerprint": prompts.fingerprint,
        "left_out": dict(prompts.left_out),
        **({"card": _card(card)} if card is not None and card.is_file() else {}),
    }


def _card(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON ({error}): write it again, or move it away") from error


def load_eval_sets(recipe: Recipe, model_path: Path) -> tuple[EvalSet, ...]:
    """The recipe's, with the prompts that the model's tokenizer makes of them; loaded and checked as for a run."""
    tokenizer = _tokenizer(model_path)
    return _eval_sets(recipe, {item.data: _load(recipe, item.data, tokenizer) for item in recipe.eval})


def _eval_sets(recipe: Recipe, prompts: Mapping[str, Prompts]) -> tuple[EvalSet, ...]:
    return tuple(
        EvalSet(
            name=item.name,
            prompts=tuple(islice(prompts[item.data], item.num_prompts)),
            num_samples=item.samples,
            temperature=item.temperature,
            max_tokens=item.max_response_tokens,
            every=item.every,
            vote=stated_answer,
        )
        for item in recipe.eval
    )


def _tokenizer(model_path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except Exception as error:  # tokenizers raises no narrower one
        raise RecipeError(f"the tokenizer in {model_path} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"the tokenizer in {model_path} has no end-of-sequence token: set eos_token and save it again"
        )
    return tokenizer


def _check_lora(lora: LoraConfig, model_path: Path) -> None:
    """Refuse layers that the model does not have, before a learner is asked for them."""
    from transformers import AutoConfig

    from rlpost.engines.lora_layers import LoraSpec, num_adapter_parameters

    try:
        num_adapter_parameters(AutoConfig.from_pretrained(model_path), LoraSpec(**lora.model_dump()))
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _load(recipe: Recipe, name: str, tokenizer: TokenizerLike) -> Prompts:
    """The prompts of one data set."""
    config = recipe.data[name]
    if isinstance(config, PairData):
        longest = min(stage.max_response_tokens for stage in recipe.stage if name in stage.shares)
        return Prompts.listed(*load_pairs(config, tokenizer, max_response_tokens=longest))
    if isinstance(config, GeneratedData):
        # Only what this run can use is drawn: held-out sets are small, and training reads each ordinal once per epoch.
        seed = HELDOUT_SEED if config.split == "heldout" else derive_seed(recipe.seed, "data", name)
        evals = [item.num_prompts for item in recipe.eval if item.data == name]
        stages = [
            config.num_prompts if stage.steps is None else 2 * stage.steps * stage.prompts_per_step
            for stage in recipe.stage
            if name in stage.shares
        ]
        prompts = load_generated(config, tokenizer, seed=seed, limit=max([*evals, *stages]))
        check_golds(Prompts.listed(prompts[:NUM_CHECKED_GENERATED]), max_rejected=0.0, verifier=recipe.verifier)
        return Prompts.listed(prompts)
    prompts = load_dataset_prompts(config, tokenizer)
    return check_golds(prompts, max_rejected=config.max_rejected_golds, verifier=recipe.verifier)


def _stage(recipe: Recipe, config: StageConfig, prompts: Mapping[str, Prompts]) -> Stage:
    algo, learner, optimizer, subnetwork = config.algo, recipe.learner, recipe.learner.optimizer, config.subnetwork
    sampled = isinstance(algo, Sampled)
    for name, found in prompts.items():
        if isinstance(algo, SFT) and found[0].demonstration_ids is None:
            raise RecipeError(f"stage {config.name!r} is supervised, but data {name!r} has no demonstrations")
    spare = not sampled and algo.use_idle_cores and not learner.gpus_per_rank
    temperature, entropy_target = _temperature(algo)
    threads = max(learner.threads, len(os.sched_getaffinity(0)) // learner.ranks) if spare else learner.threads
    return Stage(
        name=config.name,
        plan=StagePlan(
            num_steps=_num_steps(config, sum(map(len, prompts.values()))),
            groups_per_step=config.prompts_per_step,
            max_staleness=algo.max_staleness if sampled else None,
        ),
        prompts=_source(recipe, config, prompts),
        spec=StageSpec(
            objective=objective_of(algo),
            optimizer=OPTIMIZERS[optimizer.name](**optimizer.model_dump(exclude={"name"})),
            num_threads=threads,
            adapter_seed=derive_seed(recipe.seed, "adapter", config.name),
            subnetwork=subnetwork and SUBNETWORKS[subnetwork.select](**_settings(subnetwork)),
            responses_recur=not sampled,
        ),
        temperature=temperature,
        entropy_target=entropy_target,
        group_size=algo.rollouts_per_prompt,
        max_response_tokens=config.max_response_tokens,
        lr=config.lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_schedule=config.lr_schedule,
        lr_frozen_steps=algo.critic.warmup_steps if isinstance(algo, PPO) else 0,
        refill=sampled and algo.refill,
        patience_s=algo.patience_s if sampled else None,
        shaping=config.reward and {**config.reward.model_dump(), "max_tokens": config.max_response_tokens},
        until=config.until and _until(config.until),
    )


def _temperature(algo: Algo) -> tuple[float, EntropyTarget | None]:
    """Of the first groups, and what moves it from there."""
    given = algo.temperature if isinstance(algo, Sampled) else 1.0
    if isinstance(given, EntropyTargetConfig):
        return given.start, EntropyTarget(**given.model_dump(exclude={"start"}))
    return given, None


def _num_steps(config: StageConfig, num_prompts: int) -> int:
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    steps = math.ceil(config.epochs * num_prompts / config.prompts_per_step)
    try:
        check_warmup(config, steps)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return steps


def _source(recipe: Recipe, config: StageConfig, prompts: Mapping[str, Prompts]) -> PromptSource:
    sources = [
        ShuffledPrompts(
            found, seed=derive_seed(recipe.seed, "order", config.name, name), retire_above=config.retire_above
        )
        for name, found in prompts.items()
    ]
    return MixedPrompts(sources, list(config.shares.values())) if len(sources) > 1 else sources[0]


def _until(config: UntilConfig) -> Until:
    plateau = config.plateau and Plateau(**config.plateau.model_dump())
    return Until(plateau=plateau, tokens=config.tokens, hours=config.hours)


def _settings(subnetwork: SubnetworkConfig) -> dict[str, Any]:
    """Paths absolute: a learner on a cluster that was up already works in another directory."""
    settings = subnetwork.model_dump(exclude={"select"})
    return settings | {
        key: str(Path(settings[key]).resolve()) for key in ("before", "after", "path") if key in settings
    }


def objective_of(algo: Algo) -> Objective:
    """What the learner optimizes: the settings of the recipe's algorithm under the same names."""
    objective = _kind_of_objective(algo)
    names = {field.name for field in dataclasses.fields(objective)}
    settings: dict[str, Any] = algo.model_dump(include=names)
    if isinstance(algo, PPO):
        settings["advantage"] = Critic(lr=algo.critic.lr, gae_gamma=algo.gae_gamma, gae_lambda=algo.gae_lambda)
    return objective(**settings)


def _kind_of_objective(algo: Algo) -> type[Objective]:
    if isinstance(algo, SFT):
        return Supervised
    if isinstance(algo, PolicyGradientAlgo):
        return PolicyGradient
    return KTO if algo.loss == "kto" else Preference
