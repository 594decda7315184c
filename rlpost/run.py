"""From a recipe to a finished run directory: assemble, train, summarize, and leave no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from rlpost import exit_codes
from rlpost.analysis.live import ObservedStage, VersionObserver
from rlpost.archive import VERSIONS, VersionArchive
from rlpost.checkpoint import EXPORTS, RunCheckpoints
from rlpost.config import GeneratedData, Recipe, RecipeError
from rlpost.data.sources import local_file
from rlpost.pipeline.controller import Controller, RunSettings
from rlpost.pipeline.deadlines import within
from rlpost.pipeline.evaluation import scores_after_stages
from rlpost.pipeline.fleet import Limits
from rlpost.pipeline.moving_on import History
from rlpost.pipeline.ports import WorkerLost
from rlpost.plan import Resources, check_resources, max_model_len
from rlpost.provenance import code, environment
from rlpost.run_directory import check_subnetworks, claim, model_directory, open_run_directory
from rlpost.stages import RunPlan, prepare
from rlpost.summary import collect, summarize_run
from rlpost.tracking import FILES, RunTracker, WandbOptions, read_rows

T = TypeVar("T")
INTERRUPT_SAVE_S = 60.0


def run_recipe(recipe: Recipe, *, resume: bool, console: Console) -> int:
    """Run every stage; returns the process's exit code.

    Raises:
        RecipeError: when the recipe, its model or its data cannot be used; the run directory is still free then.
        KeyboardInterrupt: on SIGINT or SIGTERM before there was anything to save.
        OSError: when the run directory cannot be written.
    """
    started = time.perf_counter()
    interruptible()
    # transformers imports DeepSpeed where it is installed, which then looks for accelerators; this process needs none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run_dir = recipe.directory.resolve()
    checkpoint = open_run_directory(recipe, run_dir, resume=resume, console=console)
    for data in recipe.data.values():
        if not isinstance(data, GeneratedData):
            local_file(data)
    model_path = model_directory(recipe, run_dir, resume=resume)
    check_subnetworks(recipe, model_path)
    preparing = _in_background(lambda: prepare(recipe, model_path, checkpoint))
    from rlpost.workers.cluster import ray_cluster
    from rlpost.workers.placement import check_nodes, cluster_nodes, place
    from rlpost.workers.ray_workers import RayWorkers

    with ray_cluster(recipe.ray_address), contextlib.ExitStack() as cleanup:
        interruptible()  # Ray has put a handler of its own in place
        nodes = cluster_nodes()
        if recipe.ray_address is not None:
            total = Resources(cores=sum(node.cores for node in nodes), gpus=sum(node.gpus for node in nodes))
            check_resources(recipe, total)
            check_nodes(nodes, run_dir=run_dir, model_path=model_path)
        placement = place(recipe.learner, recipe.sampler, nodes)
        workers = RayWorkers(
            model_path=model_path,
            sampler=recipe.sampler,
            learner=recipe.learner,
            verifier=recipe.verifier,
            publish=recipe.publish,
            max_model_len=max_model_len(recipe),
            log_dir=run_dir / "logs",
            placement=placement,
        )
        cleanup.callback(workers.close)
        plan = preparing.result()
        tracker = _tracker(recipe, run_dir, plan, resume=resume, console=console)
        with tracker:
            if not resume:
                claim(run_dir, recipe)
            seconds = time.perf_counter() - started
            ready = {"event": "ready", "seconds": seconds, "model": str(model_path), "nodes": placement.named()}
            tracker.log("event", ready)
            for fields in plan.left_out:
                tracker.log("event", {"event": "data_left_out", **fields})
            code = _supervise(recipe, plan, workers, tracker, run_dir, model_path, console)
    if code == 0:
        console.print(summarize_run(run_dir))
    return code


def interruptible() -> None:
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


def _tracker(recipe: Recipe, run_dir: Path, plan: RunPlan, *, resume: bool, console: Console) -> RunTracker:
    step = plan.start.position.step if plan.start else 0 if resume else None
    options = recipe.tracking
    try:
        return RunTracker(
            run_dir,
            name=recipe.name,
            config=recipe.model_dump(mode="json"),
            session={"code": code(), "environment": environment(), "data": plan.data},
            wandb=WandbOptions(
                mode=options.wandb,
                project=options.project,
                entity=options.entity,
                table_every=options.table_every,
            ),
            resume_at_step=step,
            stages=[(stage.name, steps) for stage, steps in zip(plan.stages, plan.num_steps, strict=True)],
            summarize=collect,
            console=console,
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _supervise(
    recipe: Recipe,
    plan: RunPlan,
    workers: Any,
    tracker: RunTracker,
    run_dir: Path,
    model_path: Path,
    console: Console,
) -> int:
    """Run the controller; an interrupt saves what was learned, an error says how to go on."""
    checkpoints = RunCheckpoints(
        run_dir,
        fingerprints=[stage.prompts.fingerprint for stage in plan.stages],
        on_event=lambda name, **details: tracker.log("event", {"event": name, **details}),
    )
    keeps = recipe.publish.archive
    archive = VersionArchive(run_dir / VERSIONS, anchor_every=keeps.anchor_every if keeps else 1)
    # The version a run continues from is published anew, whole; later ones will not be those that were.
    archive.forget_after((plan.start.position.step if plan.start else 0) - 1)
    observer = _observer(recipe, plan, tracker, run_dir, model_path)
    controller = Controller(
        plan.stages,
        workers,
        tracker,
        checkpoints,
        _settings(recipe),
        decode=plan.decode,
        eval_sets=plan.eval_sets,
        evaluated=scores_after_stages(read_rows(run_dir / FILES["eval_sample"])),
        archive=archive if keeps else None,
        observer=observer,
        start=plan.start.position if plan.start else None,
        history=History.of(*(read_rows(run_dir / FILES[kind]) for kind in ("step", "eval"))),
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
        return exit_codes.INTERRUPTED
    except (WorkerLost, RuntimeError, OSError) as error:
        console.print("[bold red]the run stopped[/]:", style=None, end=" ")
        console.print(str(error), markup=False)
        console.print(f"When that is mended, {hint}", markup=False)
        tracker.close(f"{type(error).__name__}: {error}")
        return exit_codes.FAILED
    if observer is not None:
        observer.close(recipe.deadlines.learn_s)
    return 0


def _observer(
    recipe: Recipe, plan: RunPlan, tracker: RunTracker, run_dir: Path, model_path: Path
) -> VersionObserver | None:
    options = recipe.publish.observer
    if options is None:
        return None
    observed, first, start = [], 0, model_path
    for stage, num_steps in zip(plan.stages, plan.num_steps, strict=True):
        last = first + num_steps
        observed.append(ObservedStage(name=stage.name, first=first, last=last, start=start))
        first, start = last, run_dir / EXPORTS / stage.name
    return VersionObserver(
        observed,
        run_dir,
        tracker.log,
        tracker.show,
        spectra_every=options.spectra_every,
        dtype=torch.bfloat16 if options.dtype == "bfloat16" else None,
        budget=options.budget,
    )


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
        position = controller.position()
        unsaved = position.step > first_step and position.step != checkpoints.last_step
        # A second signal may have cut a step in two: weights and position need not agree any more.
        if unsaved and num_signals == 1:
            saving = checkpoints.write(position, controller.workers.learner)
            with contextlib.suppress(asyncio.CancelledError):
                await within(INTERRUPT_SAVE_S, saving, worker="learner", phase="checkpoint on interrupt")
        raise KeyboardInterrupt from None


def _settings(recipe: Recipe) -> RunSettings:
    return RunSettings(
        seed=recipe.seed,
        limits=Limits(**recipe.deadlines.model_dump()),
        max_num_seqs=recipe.sampler.max_num_seqs,
        checkpoint_every=recipe.checkpoint_every,
        publish_every=recipe.publish.every,
        max_failed_share=recipe.max_failed_share,
        log_groups=recipe.tracking.log_groups,
    )
