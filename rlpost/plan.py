"""What a recipe would do, before anything is started: workers, batches, staleness, memory."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from rlpost.config import (
    PPO,
    Algo,
    DataConfig,
    FileEntries,
    GeneratedData,
    Pairs,
    PolicyGradientAlgo,
    PrincipalEntries,
    RandomEntries,
    Recipe,
    RecipeError,
    Sampled,
    StageConfig,
    UpdatedEntries,
)
from rlpost.memory import PARTS, Architecture, LearnerShape, learner_memory, observer_bytes, peak

GENERATED_PROMPT_TOKENS = 128
"""No generated problem is longer."""
DTYPE_BYTES: Mapping[str, Literal[2, 4]] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    cores: int
    gpus: int


def local_resources() -> Resources:
    """This machine's, without initializing CUDA: the driver never holds a device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    gpus = len(devices) if visible is None else len([d for d in visible.split(",") if d.strip()])
    return Resources(cores=len(os.sched_getaffinity(0)), gpus=gpus)


def check_resources(recipe: Recipe, resources: Resources, *, learning: bool = True) -> None:
    """Refuse demands that can never be met by this machine, or by the cluster that the recipe names.

    Args:
        learning: False: no learner is started.

    Raises:
        RecipeError: with demand and supply.
    """
    sampler, learner, ranks = recipe.sampler, recipe.learner, recipe.learner.ranks if learning else 0
    samplers, named = sampler.workers, f"sampler.workers {sampler.workers}"
    if learning and sampler.eval_workers:
        samplers += sampler.eval_workers
        named = f"({named} + sampler.eval_workers {sampler.eval_workers})"
    gpus = samplers * sampler.gpus + ranks * learner.gpus_per_rank
    where = "this machine" if recipe.ray_address is None else f"the cluster at {recipe.ray_address}"
    if gpus > resources.gpus:
        asked = f"{named} x sampler.gpus {sampler.gpus:g}"
        asked += f" + learner.ranks {ranks} x learner.gpus_per_rank {learner.gpus_per_rank:g}" if learning else ""
        raise RecipeError(
            f"the recipe needs {gpus:g} GPUs ({asked}), {where} has {resources.gpus}: lower them, or give a"
            f" {'larger ' if recipe.ray_address else ''}cluster with ray_address"
        )
    cores = (0 if sampler.gpus else samplers * sampler.threads) + (
        0 if learner.gpus_per_rank else ranks * learner.threads
    )
    if cores > resources.cores:
        asked = f"{named} x sampler.threads {sampler.threads}"
        asked += f" + learner.ranks {ranks} x learner.threads {learner.threads}" if learning else ""
        raise RecipeError(
            f"the recipe needs {cores} cores ({asked}), {where} has {resources.cores}: lower workers, ranks or threads"
        )


def max_prompt_tokens(data: DataConfig) -> int:
    return GENERATED_PROMPT_TOKENS if isinstance(data, GeneratedData) else data.max_prompt_tokens


def max_model_len(recipe: Recipe) -> int:
    """The longest sequence any stage or evaluation can ask of a sampler."""
    stages = [(name, stage.max_response_tokens) for stage in recipe.stage for name in stage.shares]
    evals = [(item.data, item.max_response_tokens) for item in recipe.eval]
    return max(max_prompt_tokens(recipe.data[name]) + tokens for name, tokens in (*stages, *evals))


def num_parameters(recipe: Recipe) -> int | None:
    """Exact for a model on disk, within a tenth for one to be built; for a hub name what the name says ("7B"), or None."""
    build = recipe.model.build
    if build is not None:
        hidden, head = build.hidden_size, build.vocab_size * build.hidden_size
        attention = 4 * hidden * hidden + 3 * hidden
        feed_forward = 3 * hidden * (hidden * 8 // 3)
        return build.num_layers * (attention + feed_forward + 2 * hidden) + 2 * head + hidden
    assert recipe.model.path is not None
    path = Path(recipe.model.path)
    if path.is_dir():
        return sum(_safetensors_numel(file) for file in path.glob("*.safetensors")) or None
    size = re.search(r"(\d+(?:\.\d+)?)[bB]\b", recipe.model.path)
    return int(float(size.group(1)) * 1e9) if size else None


def num_trained(recipe: Recipe, parameters: int | None) -> int | None:
    """How many of the `parameters` are trained, or how many an adapter has: as exact as `num_parameters` is, or None.

    Raises:
        RecipeError: when the adapter names layers that the model does not have.
    """
    lora, build = recipe.learner.lora, recipe.model.build
    if lora is None:
        return parameters
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which would look for others
    from transformers import AutoConfig, LlamaConfig

    from rlpost.engines.lora_layers import LoraSpec, num_adapter_parameters

    if build is not None:
        config = LlamaConfig(
            hidden_size=build.hidden_size,
            intermediate_size=build.hidden_size * 8 // 3,
            num_hidden_layers=build.num_layers,
            num_attention_heads=build.num_heads,
        )
    elif recipe.model.path is not None and Path(recipe.model.path).is_dir():
        config = AutoConfig.from_pretrained(recipe.model.path)
    else:
        return None
    try:
        return num_adapter_parameters(config, LoraSpec(**lora.model_dump()))
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _safetensors_numel(file: Path) -> int:
    try:
        with safe_open(file, "np") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{file} is damaged ({error}): copy or download it again") from error


def render_plan(recipe: Recipe, resources: Resources) -> RenderableType:
    """The resolved plan, for `--dry-run`."""
    workers = Table(title="workers", title_justify="left")
    for column in ("worker", "processes", "each on", "memory each (estimate)"):
        workers.add_column(column)
    sampler, learner = recipe.sampler, recipe.learner
    parameters = num_parameters(recipe)
    trained = num_trained(recipe, parameters)
    shape = learner_shape(recipe, parameters, trained)
    for name, count in (("sampler", sampler.workers), ("evaluator", sampler.eval_workers)):
        if count:
            workers.add_row(
                f"{name} (vLLM)",
                str(count),
                f"{sampler.gpus:g} GPU" if sampler.gpus else f"{sampler.threads} core(s)",
                _sampler_memory(recipe, parameters, trained),
            )
    workers.add_row(
        f"learner (DeepSpeed ZeRO-{learner.zero_stage})",
        str(learner.ranks),
        f"{learner.gpus_per_rank:g} GPU" if learner.gpus_per_rank else f"{learner.threads} core(s)",
        "-" if shape is None else f"{_size(sum(peak(shape)[1].values()))}, see below",
    )
    workers.add_row(
        "verifier",
        "1",
        f"{recipe.verifier.math.workers} math, {recipe.verifier.code.workers} code child process(es)",
        "small",
    )
    if recipe.publish.observer is not None:
        budget = f"{recipe.publish.observer.budget:.0%} of a core"
        workers.add_row("observer (in the driver)", "1", budget, _observer_memory(recipe, parameters, trained))
    size = f"{parameters / 1e6:,.1f} M parameters" if parameters else "size unknown before it is downloaded"
    facts = (
        f"model: {recipe.model.path or 'built from scratch'} ({size}); longest sequence {max_model_len(recipe)} tokens\n"
        f"trained: {_what_is_trained(recipe, trained)}\n"
        f"this machine: {resources.cores} cores, {resources.gpus} GPUs\n"
        f"run directory: {recipe.directory}"
    )
    stages = Group(*(_stage_plan(stage) for stage in recipe.stage))
    return Group(facts, stages, workers, *([] if shape is None else [_learner_plan(recipe, shape)]))


def _stage_plan(stage: StageConfig) -> Text:
    """What a stage does, and every setting of its algorithm with the defaults filled in."""
    algo = stage.algo
    rollouts = f"{stage.prompts_per_step} prompts x {algo.rollouts_per_prompt} = "
    rollouts += f"{stage.prompts_per_step * algo.rollouts_per_prompt} rollouts"
    alive = ""
    if isinstance(algo, Sampled):
        alive = f", at most {(algo.max_staleness + 1) * stage.prompts_per_step} groups alive"
    schedule = f"{stage.lr:g} {stage.lr_schedule}" + (
        f" after {stage.lr_warmup_steps} steps of warm-up" if stage.lr_warmup_steps else ""
    )
    settings = ", ".join(
        f"{name} {value}" for name, value in algo.model_dump(exclude={"name"}).items() if value is not None
    )
    if stage.keep is not None:
        settings += "".join(
            f", keep.{name} {value}" for name, value in stage.keep.model_dump(exclude_none=True).items()
        )
    if stage.retire_above is not None:
        settings += f", retire_above {stage.retire_above:g}"
    length = f"{stage.steps} steps" if stage.epochs is None else f"{stage.epochs:g} epochs in steps"
    shares = stage.shares
    data = ", ".join(f"{share:.0%} {name}" if len(shares) > 1 else name for name, share in shares.items())
    until = stage.until.model_dump(exclude_none=True) if stage.until else {}
    at_most = f" at most, until {until}" if until else ""
    return Text(
        f"stage {stage.name}: {algo.name} on {data}, {length}{at_most} of {rollouts}{alive}, lr {schedule}\n    {settings}"
    )


def _sampler_memory(recipe: Recipe, parameters: int | None, trained: int | None) -> str:
    sampler = recipe.sampler
    if parameters is None:
        return "-"
    weights = parameters * DTYPE_BYTES[sampler.dtype]
    adapter = ""
    if recipe.publish.policy == "adapter":
        adapter = f" + {'an' if trained is None else _size(trained * DTYPE_BYTES[sampler.dtype])} adapter"
    cache = (
        f"{sampler.kv_cache_mib} MiB"
        if sampler.kv_cache_mib
        else "the rest of the device"
        if sampler.gpus
        else "64 MiB"
    )
    return f"{_size(weights)} weights{adapter} + {cache} KV"


def _observer_memory(recipe: Recipe, parameters: int | None, trained: int | None) -> str:
    observer, beside = recipe.publish.observer, recipe.publish.policy == "adapter"
    assert observer is not None
    if parameters is None or (beside and trained is None):
        return "-"
    served = DTYPE_BYTES[recipe.sampler.dtype]
    compared = DTYPE_BYTES[observer.dtype or recipe.sampler.dtype]
    return _size(observer_bytes(parameters, served=served, compared=compared, adapter=trained or 0 if beside else 0))


def _what_is_trained(recipe: Recipe, trained: int | None) -> str:
    lora = recipe.learner.lora
    if lora is None:
        return "all weights"
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    size = f"{trained / 1e6:,.3g} M parameters" if trained else "size unknown before the model is downloaded"
    place = "merged into" if recipe.publish.policy == "merged" else "beside"
    return (
        f"LoRA adapters of rank {lora.rank}, alpha {lora.alpha:g}, on {targets} ({size}), published {place} the weights"
    )


def learner_shape(recipe: Recipe, parameters: int | None, trained: int | None) -> LearnerShape | None:
    """What a rank of the learner holds if one stage had every reference and critic of the recipe; None for a model of
    unknown size."""
    if parameters is None or trained is None:
        return None
    learner, algos = recipe.learner, [stage.algo for stage in recipe.stage]
    return LearnerShape(
        parameters=parameters,
        trained=trained,
        width=DTYPE_BYTES[learner.dtype],
        ranks=learner.ranks,
        zero_stage=learner.zero_stage,
        optimizer=learner.optimizer.name,
        micro_batch_tokens=learner.micro_batch_tokens,
        gradient_checkpointing=learner.gradient_checkpointing,
        architecture=_architecture(recipe),
        on_gpu=bool(learner.gpus_per_rank),
        adapter=learner.lora is not None,
        reference=any(_needs_reference(algo) for algo in algos),
        critic=any(isinstance(algo, PPO) for algo in algos),
        serve_width=DTYPE_BYTES[recipe.sampler.dtype],
        serves_adapter=recipe.publish.policy == "adapter",
        subnetwork=_subnetwork_share(recipe),
    )


def _subnetwork_share(recipe: Recipe) -> float | None:
    """Of the weights, what any stage may change; None when each may change all. How large an update is shows when its
    stage begins, and how much a file has: here it may be all."""
    chosen = [stage.subnetwork for stage in recipe.stage]
    if all(choice is None for choice in chosen):
        return None
    return max(c.density if isinstance(c, PrincipalEntries | RandomEntries) else 1.0 for c in chosen)


def _needs_reference(algo: Algo) -> bool:
    if isinstance(algo, PolicyGradientAlgo):
        return algo.kl_coef > 0
    return isinstance(algo, Pairs) and algo.loss in ("dpo", "ipo", "kto")


def _architecture(recipe: Recipe) -> Architecture | None:
    build, path = recipe.model.build, recipe.model.path
    if build is not None:
        return Architecture(
            hidden=build.hidden_size,
            intermediate=build.hidden_size * 8 // 3,
            layers=build.num_layers,
            heads=build.num_heads,
            kv_heads=build.num_heads,
            head_size=build.hidden_size // build.num_heads,
            vocabulary=build.vocab_size,
        )
    assert path is not None
    return Architecture.of_directory(Path(path)) if (Path(path) / "config.json").is_file() else None


def _learner_plan(recipe: Recipe, shape: LearnerShape) -> Table:
    """Bytes by part and moment; parts that nothing takes are left out."""
    moments = learner_memory(shape)
    title = f"memory of each learner rank (estimate{_caveats(recipe, shape)})"
    table = Table("part", *moments, title=title, title_justify="left")
    for part in PARTS:
        sizes = [parts.get(part, 0.0) for parts in moments.values()]
        if any(sizes):
            table.add_row(part, *(_size(size) if size else "-" for size in sizes))
    table.add_row("sum", *(_size(sum(parts.values())) for parts in moments.values()))
    return table


def _caveats(recipe: Recipe, shape: LearnerShape) -> str:
    """What the estimate could not know."""
    caveats = "" if shape.architecture else "; without activations: the model's sizes are not known yet"
    if any(isinstance(stage.subnetwork, UpdatedEntries | FileEntries) for stage in recipe.stage):
        caveats += "; with moments of all entries: how many an update has is not known yet"
    return caveats


def learner_line(recipe: Recipe) -> str:
    """The plan's peak and what it is made of, for the start of a run."""
    parameters = num_parameters(recipe)
    shape = learner_shape(recipe, parameters, num_trained(recipe, parameters))
    if shape is None:
        return "memory of each learner rank: not known before the model is downloaded"
    moment, parts = peak(shape)
    listed = ", ".join(f"{part} {_size(size)}" for part, size in parts.items() if size)
    return (
        f"memory of each learner rank (estimate{_caveats(recipe, shape)}): {_size(sum(parts.values()))} at most, in"
        f" {moment}: {listed}"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
