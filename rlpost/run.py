"""From a recipe to a finished run directory: assemble, train, summarize, and leave no process behind.

run_dir/  recipe.json  model/  metrics.jsonl  eval.jsonl  rollouts.jsonl  events.jsonl  logs/  checkpoints/
          exports/<stage>/  summary.json  wandb/
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rich.console import Console
from safetensors import SafetensorError

from rlpost.checkpoint import Checkpoint, RunCheckpoints, latest_checkpoint
from rlpost.config import GRPO, SFT, Algo, GeneratedData, PairData, Recipe, RecipeError, Sampled, StageConfig
from rlpost.core.objective import Objective, OptimizerSpec, PolicyGradient, StageSpec, Supervised
from rlpost.core.preference import Preference
from rlpost.data.pairs import load_pairs
from rlpost.data.sources import (
    ShuffledPrompts,
    TokenizerLike,
    check_golds,
    load_dataset_prompts,
    load_generated,
    local_file,
)
from rlpost.engines.pretrained import check_model_directory
from rlpost.pipeline.buffer import StagePlan
from rlpost.pipeline.controller import Controller, RunSettings, Stage
from rlpost.pipeline.deadlines import within
from rlpost.pipeline.evaluation import EvalSet
from rlpost.pipeline.fleet import Limits
from rlpost.pipeline.ports import WorkerLost
from rlpost.pipeline.seeds import derive_seed
from rlpost.plan import max_model_len
from rlpost.summary import summarize_run
from rlpost.tracking import RunTracker, WandbOptions, run_ended
from rlpost.types import Prompt

T = TypeVar("T")
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
RECIPE = "recipe.json"
HELDOUT_SEED = 0
"""Held-out problems are the same whatever the run's seed, so that seeds compare."""
NUM_CHECKED_GENERATED = 32
"""Generated golds are right by construction; this many are still put before the verifier, to try the verifier."""
INTERRUPT_SAVE_S = 60.0
CONNECT_LIMIT_S = 5.0
RESUMABLE = {
    "sampler",
    "verifier",
    "tracking",
    "deadlines",
    "checkpoint_every",
    "max_failed_share",
    "run_dir",
    "ray_address",
}
"""Keys that may change on a resume: they decide how fast a run learns, not what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Everything a run needs before its workers are up."""

    stages: tuple[Stage, ...]
    eval_sets: tuple[EvalSet, ...]
    left_out: Mapping[str, Mapping[str, int]]
    """Per data set of pairs, how many were left out for which reason."""
    start: Checkpoint | None


def run_recipe(recipe: Recipe, *, resume: bool, console: Console) -> int:
    """Run every stage; returns the process's exit code.

    Raises:
        RecipeError: when the recipe, its model or its data cannot be used; the run directory is still free then.
        KeyboardInterrupt: on SIGINT or SIGTERM before there was anything to save.
        OSError: when the run directory cannot be written.
    """
    started = time.perf_counter()
    _interruptible()
    # transformers imports DeepSpeed where it is installed, which then looks for accelerators; this process needs none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run_dir = recipe.directory.resolve()
    checkpoint = _open_run_directory(recipe, run_dir, resume=resume, console=console)
    for data in recipe.data.values():
        if not isinstance(data, GeneratedData):
            local_file(data)
    model_path = _model_directory(recipe, run_dir, resume=resume)
    preparing = _in_background(lambda: _prepare(recipe, model_path, checkpoint))
    with _ray(recipe), contextlib.ExitStack() as cleanup:
        from rlpost.workers.ray_workers import RayWorkers

        workers = RayWorkers(
            model_path=model_path,
            sampler=recipe.sampler,
            learner=recipe.learner,
            verifier=recipe.verifier,
            max_model_len=max_model_len(recipe),
            log_dir=run_dir / "logs",
        )
        cleanup.callback(workers.close)
        plan = preparing.result()
        tracker = _tracker(recipe, run_dir, plan, resume=resume, console=console)
        with tracker:
            if not resume:
                _claim(run_dir, recipe)
            tracker.log("event", {"event": "ready", "seconds": time.perf_counter() - started, "model": str(model_path)})
            for name, reasons in plan.left_out.items():
                if reasons:
                    tracker.log("event", {"event": "data_left_out", "data": name, "reasons": dict(reasons)})
            code = _supervise(recipe, plan, workers, tracker, run_dir, console)
    if code == 0:
        console.print(summarize_run(run_dir))
    return code


def _interruptible() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt, so that what was started is ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _in_background(function: Callable[[], T]) -> Future[T]:
    """Call in a thread that no interrupt has to wait for: it may be in the middle of a download."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, name="data", daemon=True).start()
    return future


def _tracker(recipe: Recipe, run_dir: Path, plan: _Plan, *, resume: bool, console: Console) -> RunTracker:
    step = plan.start.position.step if plan.start else 0 if resume else None
    options = recipe.tracking
    try:
        return RunTracker(
            run_dir,
            name=recipe.name,
            config=recipe.model_dump(mode="json"),
            wandb=WandbOptions(mode=options.wandb, project=options.project, entity=options.entity),
            resume_at_step=step,
            stages=[(stage.name, stage.plan.num_steps) for stage in plan.stages],
            console=console,
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _supervise(recipe: Recipe, plan: _Plan, workers: Any, tracker: RunTracker, run_dir: Path, console: Console) -> int:
    """Run the controller; an interrupt saves what was learned, an error says how to go on."""
    checkpoints = RunCheckpoints(
        run_dir,
        fingerprints=[stage.prompts.fingerprint for stage in plan.stages],
        on_event=lambda name, **details: tracker.log("event", {"event": name, **details}),
    )
    controller = Controller(
        plan.stages,
        workers,
        tracker,
        checkpoints,
        _settings(recipe),
        eval_sets=plan.eval_sets,
        start=plan.start.position if plan.start else None,
        load_from=plan.start.learner_path if plan.start else None,
    )
    first_step = controller.buffer.step
    hint = f"continue with the same command and --resume. Logs: {run_dir / 'logs'}"
    try:
        asyncio.run(_until_interrupted(controller, checkpoints, first_step, console))
    except KeyboardInterrupt:
        saved = first_step if checkpoints.last_step is None else checkpoints.last_step
        where = f"the policy of step {saved} is saved" if saved else "nothing was learned yet"
        console.print(f"interrupted: {where}; {hint}", markup=False)
        tracker.close("interrupted")
        return EXIT_INTERRUPTED
    except (WorkerLost, RuntimeError, OSError) as error:
        console.print("[bold red]the run stopped[/]:", style=None, end=" ")
        console.print(str(error), markup=False)
        console.print(f"When that is mended, {hint}", markup=False)
        tracker.close(f"{type(error).__name__}: {error}")
        return EXIT_FAILED
    return 0


async def _until_interrupted(
    controller: Controller, checkpoints: RunCheckpoints, first_step: int, console: Console
) -> None:
    """Run; on SIGINT or SIGTERM stop between two steps and write a checkpoint; on a second one leave as it is.

    Raises:
        KeyboardInterrupt: when a signal ended the run.
    """
    loop, whole = asyncio.get_running_loop(), asyncio.current_task()
    assert whole is not None
    run = asyncio.ensure_future(controller.run())
    num_signals = 0

    def stop() -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals == 1:
            console.print("stopping with a checkpoint after this step; a second interrupt leaves without one")
        (run if num_signals == 1 else whole).cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        await run
    except asyncio.CancelledError:
        position = controller.buffer.position()
        unsaved = position.step > first_step and position.step != checkpoints.last_step
        # A second signal may have cut a step in two: weights and position need not agree any more.
        if unsaved and num_signals == 1:
            saving = checkpoints.write(position, controller.workers.learner)
            with contextlib.suppress(asyncio.CancelledError):
                await within(INTERRUPT_SAVE_S, saving, worker="learner", phase="checkpoint on interrupt")
        raise KeyboardInterrupt from None


# -- the run directory -------------------------------------------------------------------------------------------------


def _open_run_directory(recipe: Recipe, run_dir: Path, *, resume: bool, console: Console) -> Checkpoint | None:
    """Make a fresh directory, or find the checkpoint to continue from."""
    stored = run_dir / RECIPE
    if not resume:
        if stored.exists():
            raise RecipeError(
                f"{run_dir} already holds a run: continue it with --resume, choose another run_dir, or delete it"
            )
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_dir).close()
        except OSError as error:
            raise RecipeError(f"run_dir = {run_dir} cannot be written ({error.strerror}): choose another") from error
        return None
    if not stored.exists():
        raise RecipeError(f"nothing to resume: {run_dir} holds no run. Start it without --resume")
    try:
        before: Mapping[str, Any] = json.loads(stored.read_text())["recipe"]
    except (ValueError, KeyError) as error:
        raise RecipeError(f"{stored} is damaged ({error}): bring it back, or choose another run_dir") from error
    now = recipe.model_dump(mode="json")
    changed = sorted(key for key in now if key not in RESUMABLE and now[key] != before.get(key))
    if changed:
        raise RecipeError(
            f"the recipe differs from the one this run began with in {changed}. Resume with the recipe as it was"
            f" ({stored}); only {sorted(RESUMABLE)} may change"
        )

    def report(path: Path, files: list[str]) -> None:
        console.print(f"passing over {path}: {', '.join(files)} not as written", markup=False)

    try:
        checkpoint = latest_checkpoint(run_dir, report)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if checkpoint is None:
        console.print("no checkpoint was written before the run stopped: starting from the beginning")
    elif run_ended(run_dir):
        raise RecipeError(f"nothing to resume: the run in {run_dir} is complete (step {checkpoint.position.step})")
    return checkpoint


def _claim(run_dir: Path, recipe: Recipe) -> None:
    """From here on the directory holds a run, to be continued or left alone."""
    content = {"recipe": recipe.model_dump(mode="json"), "commit": _commit()}
    (run_dir / RECIPE).write_text(json.dumps(content, indent=2))


def _model_directory(recipe: Recipe, run_dir: Path, *, resume: bool) -> Path:
    """The policy to start from, as a local directory: built here, given, or from the hub."""
    build, name = recipe.model.build, recipe.model.path
    if build is not None:
        from rlpost.engines.scratch import build_model

        path = run_dir / "model"
        if not resume:  # whatever an attempt with other sizes left there
            try:
                build_model(path, **build.model_dump(), seed=derive_seed(recipe.seed, "model") % 2**31)
            except ValueError as error:
                raise RecipeError(f"model.build: {error}") from error
            except SafetensorError as error:
                raise OSError(f"the model could not be written to {path}: {error}") from error
        return path
    assert name is not None
    path = Path(name)
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(name, ignore_patterns=["*.pt", "*.bin", "*.gguf"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise RecipeError(
                f"model.path = {name!r} is no directory and could not be downloaded ({type(error).__name__}: {error})."
                " Check the name and the network; an interrupted download continues when you run the command again"
            ) from error
    try:
        check_model_directory(path)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return path.resolve()


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    result = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


# -- stages and data ---------------------------------------------------------------------------------------------------


def _prepare(recipe: Recipe, model_path: Path, checkpoint: Checkpoint | None) -> _Plan:
    """Load and check all data; resolve the stages."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except Exception as error:  # tokenizers raises no narrower one
        raise RecipeError(f"the tokenizer in {model_path} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"the tokenizer in {model_path} has no end-of-sequence token: set eos_token and save it again"
        )
    used = {stage.data for stage in recipe.stage}
    left_out: dict[str, Mapping[str, int]] = {}
    prompts = {name: _load(recipe, name, tokenizer, left_out) for name in used | {item.data for item in recipe.eval}}
    stages = tuple(_stage(recipe, stage, prompts[stage.data]) for stage in recipe.stage)
    if checkpoint is not None:
        for stage, fingerprint in zip(stages, checkpoint.fingerprints, strict=True):
            if stage.prompts.fingerprint != fingerprint:
                raise RecipeError(
                    f"the data of stage {stage.name!r} is not what this run began with: cannot resume on it"
                )
    eval_sets = tuple(
        EvalSet(
            name=item.name,
            prompts=prompts[item.data][: item.num_prompts],
            num_samples=item.samples,
            temperature=item.temperature,
            max_tokens=item.max_response_tokens,
        )
        for item in recipe.eval
    )
    return _Plan(stages=stages, eval_sets=eval_sets, left_out=left_out, start=checkpoint)


def _load(recipe: Recipe, name: str, tokenizer: TokenizerLike, left_out: dict[str, Mapping[str, int]]) -> list[Prompt]:
    """The prompts of one data set; what was left out of it, by reason, is added to `left_out`."""
    config = recipe.data[name]
    if isinstance(config, PairData):
        longest = min(stage.max_response_tokens for stage in recipe.stage if stage.data == name)
        pairs, left_out[name] = load_pairs(config, tokenizer, max_response_tokens=longest)
        return pairs
    if isinstance(config, GeneratedData):
        # Only what this run can use is drawn: held-out sets are small, and training reads each ordinal once per epoch.
        seed = HELDOUT_SEED if config.split == "heldout" else derive_seed(recipe.seed, "data", name)
        evals = [item.num_prompts for item in recipe.eval if item.data == name]
        stages = [stage.steps * stage.prompts_per_step for stage in recipe.stage if stage.data == name]
        prompts = load_generated(config, tokenizer, seed=seed, limit=max([*evals, *(2 * n for n in stages)]))
        check_golds(prompts[:NUM_CHECKED_GENERATED], max_rejected=0.0, verifier=recipe.verifier)
        return prompts
    prompts = load_dataset_prompts(config, tokenizer)
    return check_golds(prompts, max_rejected=config.max_rejected_golds, verifier=recipe.verifier)


def _stage(recipe: Recipe, config: StageConfig, prompts: Sequence[Prompt]) -> Stage:
    algo, learner = config.algo, recipe.learner
    sampled = isinstance(algo, Sampled)
    if isinstance(algo, SFT) and any(prompt.demonstration_ids is None for prompt in prompts):
        raise RecipeError(f"stage {config.name!r} is supervised, but data {config.data!r} has no demonstrations")
    spare = not sampled and algo.use_idle_cores and not learner.gpus_per_rank
    threads = max(learner.threads, len(os.sched_getaffinity(0)) // learner.ranks) if spare else learner.threads
    return Stage(
        name=config.name,
        plan=StagePlan(
            num_steps=config.steps,
            groups_per_step=config.prompts_per_step,
            max_staleness=algo.max_staleness if sampled else None,
        ),
        prompts=ShuffledPrompts(prompts, seed=derive_seed(recipe.seed, "order", config.name)),
        spec=StageSpec(
            objective=objective_of(algo),
            optimizer=OptimizerSpec(**learner.optimizer.model_dump()),
            temperature=algo.temperature if sampled else 1.0,
            num_threads=threads,
        ),
        group_size=algo.rollouts_per_prompt,
        max_response_tokens=config.max_response_tokens,
        lr=config.lr,
        lr_warmup_steps=config.lr_warmup_steps,
        lr_schedule=config.lr_schedule,
        refill=sampled and algo.refill,
        patience_s=algo.patience_s if sampled else None,
        shaping=config.reward and {**config.reward.model_dump(), "max_tokens": config.max_response_tokens},
    )


def objective_of(algo: Algo) -> Objective:
    """What the learner optimizes: the settings of the recipe's algorithm under the same names."""
    objective = PolicyGradient if isinstance(algo, GRPO) else Supervised if isinstance(algo, SFT) else Preference
    names = {field.name for field in dataclasses.fields(objective)}
    return objective(**algo.model_dump(include=names))


def _settings(recipe: Recipe) -> RunSettings:
    return RunSettings(
        seed=recipe.seed,
        limits=Limits(**recipe.deadlines.model_dump()),
        checkpoint_every=recipe.checkpoint_every,
        max_failed_share=recipe.max_failed_share,
        log_groups=recipe.tracking.log_groups,
    )


# -- Ray ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ray(recipe: Recipe) -> Iterator[None]:
    """Join the recipe's cluster, or start one on this machine that ends with the run.

    Raises:
        RecipeError: when the recipe names a cluster that does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray would run its workers at nice 15: whatever else this machine does would starve the run.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # That Ray's token authentication is on asks nothing of anyone.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    import ray

    with contextlib.ExitStack() as cleanup:
        if recipe.ray_address is not None:
            _check_answers(recipe.ray_address)
            try:
                ray.init(address=recipe.ray_address, log_to_driver=False)
            except ConnectionError as error:
                raise _no_cluster(recipe.ray_address, error) from error
        else:
            from rlpost.workers.orphans import ended_with_this_process

            # Not one that RAY_ADDRESS, or another run on this machine, has left.
            try:
                ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
            except SystemExit:  # Ray's own answer to SIGTERM
                raise KeyboardInterrupt from None
            cleanup.enter_context(ended_with_this_process())
        cleanup.callback(ray.shutdown)
        _interruptible()  # Ray has put a handler of its own in place
        yield


def _check_answers(address: str) -> None:
    """Ray itself would wait for minutes, and no signal would reach it."""
    url = urlsplit(address if "//" in address else f"//{address}")
    if url.hostname is None or url.port is None:
        return  # such as "auto", for which Ray looks at this machine
    try:
        socket.create_connection((url.hostname, url.port), timeout=CONNECT_LIMIT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> RecipeError:
    return RecipeError(
        f"ray_address = {address!r} does not answer ({error}): start it (ray start --head), open the port, or leave"
        " ray_address out to use this machine alone"
    )
