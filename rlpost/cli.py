"""The command line: parses first, imports later, so that --help and a wrong recipe answer at once."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rlpost import __version__, exit_codes

VERSION = (
    "a model directory, a safetensors file or index, a run's directory (what it exported last), RUN@N (version N of a run's"
    " archive), RUN@masters (float32, of its last checkpoint, which is unpickled: only of a run you trust), or"
    " org/name[@revision] on the Hugging Face hub"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rlpost`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlpost", description="Asynchronous RL post-training of language models.")
    parser.add_argument("--version", action="version", version=f"rlpost {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="run a recipe", description="Run every stage of a recipe.")
    train.add_argument("recipe", type=Path)
    train.add_argument("overrides", nargs="*", metavar="key.path=value", help="for example seed=1 stage.math.lr=1e-5")
    train.add_argument("--dry-run", action="store_true", help="print the resolved plan and start nothing")
    train.add_argument("--resume", action="store_true", help="continue from the run directory's last checkpoint")

    evaluate = commands.add_parser(
        "eval",
        help="evaluate models on a recipe's eval sets, several samples a problem, and compare them",
        description="Evaluate models with a recipe's [[eval]], [data], [sampler] and [verifier] tables. What DIRECTORY holds"
        " already is not drawn again.",
    )
    evaluate.add_argument("recipe", type=Path)
    evaluate.add_argument(
        "models",
        nargs="+",
        metavar="MODEL or key.path=value",
        help="a model directory, a run's directory (what it exported last) or a name on the hub; the first is what the"
        " others are compared with. And overrides of the recipe",
    )
    evaluate.add_argument("-o", "--output", type=Path, required=True, metavar="DIRECTORY")
    evaluate.add_argument("--samples", type=int, metavar="N", help="of each problem (default: as the eval sets say)")
    evaluate.add_argument("--temperature", type=float, help="(default: as the eval sets say)")

    data = commands.add_parser(
        "data",
        help="curate prompt data sets: filters, decontamination, gold checks, and a data card",
        description="Write the problems of the [source] tables that no filter leaves out, with a card that counts and explains.",
    )
    data.add_argument("curation", type=Path)
    data.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="for example source.numina.path=numina.jsonl.gz"
    )
    data.add_argument("-o", "--output", type=Path, required=True, metavar="DIRECTORY")

    study = commands.add_parser("study", help="make the runs of a study, analyze and compare their updates")
    study.add_argument("study", type=Path, metavar="STUDY")
    study.add_argument("--dry-run", action="store_true", help="print the runs and start none")

    summary = commands.add_parser("summary", help="print the summary of a run directory")
    summary.add_argument("run_dir", type=Path)

    commands.add_parser("doctor", help="check this machine against what rlpost was tested with")

    analyze = commands.add_parser(
        "analyze", help="measure how sparse and of what rank the update between two models is"
    )
    analyze.add_argument("before", help=VERSION)
    analyze.add_argument(
        "after", nargs="+", help="the same, or a LoRA adapter; several are also compared with each other"
    )
    analyze.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="compare both rounded to it")
    analyze.add_argument("--rank", action="store_true", help="the numerical rank of each matrix's update too; cheap")
    analyze.add_argument(
        "--spectra",
        action="store_true",
        help="every rank and the geometry of each matrix, and their controls; takes SVDs",
    )
    analyze.add_argument(
        "-o", "--output", type=Path, action="append", default=[], metavar="FILE",
        help="write every figure of every weight: .html is a report, .json, .csv or .parquet its data; may be repeated",
    )  # fmt: skip
    analyze.add_argument("--figures", type=Path, metavar="DIRECTORY", help="write the report's figures as PNG and SVG")

    mask = commands.add_parser(
        "mask", help="write the subnetwork that an update is, or a control of its size, to a file"
    )
    mask.add_argument("before", help=VERSION)
    mask.add_argument("after", help="the same, or a LoRA adapter")
    mask.add_argument("-o", "--output", type=Path, required=True, metavar="MASK")
    selected = mask.add_mutually_exclusive_group()
    selected.add_argument(
        "--principal",
        type=int,
        metavar="RANK",
        help="instead: of each matrix, the largest in its approximation of RANK",
    )
    selected.add_argument("--low-magnitude", action="store_true", help="instead: the smallest weights of BEFORE")
    mask.add_argument("--density", type=float, help="share of each weight, for these; else what the update has of it")
    control = mask.add_mutually_exclusive_group()
    control.add_argument("--random", action="store_true", help="as many entries of each weight, chosen at random")
    control.add_argument("--complement", action="store_true", help="as many, chosen at random from those left out")
    mask.add_argument("--seed", type=int, default=0, help="of the control")
    mask.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="what differs once rounded to it has changed: the one samplers serve (default: bfloat16)",
    )

    dampen = commands.add_parser("dampen", help="scale down a tuned model's intruder dimensions, against forgetting")
    dampen.add_argument("before", help="what the model was tuned from; as for analyze")
    dampen.add_argument("after", type=Path, help="a model directory")
    dampen.add_argument("-o", "--output", type=Path, required=True, metavar="DIRECTORY")
    dampen.add_argument("--scale", type=float, default=0.7, help="of their singular values (default: 0.7)")
    dampen.add_argument("--top", type=int, default=10, metavar="K", help="of so many leading directions (default: 10)")
    dampen.add_argument(
        "--epsilon",
        type=float,
        default=0.5,
        help="an intruder's cosine with any direction before is below (default: 0.5)",
    )

    diff = commands.add_parser("diff", help="write what changed between two model directories to a file")
    diff.add_argument("before", type=Path)
    diff.add_argument("after", type=Path)
    diff.add_argument("-o", "--output", type=Path, required=True, metavar="PATCH")

    patch = commands.add_parser("patch", help="make the second model directory of a diff from the first")
    patch.add_argument("before", type=Path)
    patch.add_argument("patch", type=Path)
    patch.add_argument("-o", "--output", type=Path, required=True, metavar="DIRECTORY")

    checkout = commands.add_parser("checkout", help="write a version that a run has archived as a model directory")
    checkout.add_argument("run_dir", type=Path)
    checkout.add_argument("--version", type=int, required=True, dest="number", metavar="N", help="optimizer steps")
    checkout.add_argument("-o", "--output", type=Path, required=True, metavar="DIRECTORY")

    arguments = parser.parse_args(argv)
    # An exception in the middle of an import can get lost there; until `run_recipe` there is nothing to clean up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        if arguments.command == "train":
            return _train(arguments)
        if arguments.command == "eval":
            return _eval(arguments)
        if arguments.command == "data":
            return _data(arguments)
        if arguments.command == "study":
            return _study(arguments)
        if arguments.command == "summary":
            return _summary(arguments.run_dir)
        if arguments.command == "analyze":
            return _analyze(arguments)
        if arguments.command == "mask":
            return _mask(arguments)
        if arguments.command == "dampen":
            return _dampen(arguments)
        if arguments.command == "diff":
            return _diff(arguments)
        if arguments.command == "patch":
            return _patch(arguments)
        if arguments.command == "checkout":
            return _checkout(arguments)
        return _doctor()
    except KeyboardInterrupt:
        return _stopped("interrupted", exit_codes.INTERRUPTED)
    except OSError as error:  # a disk that is full or read-only, mostly; the message names the file
        return _stopped(str(error), exit_codes.FAILED)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"rlpost: interrupted\n")
    os._exit(exit_codes.INTERRUPTED)


def _stopped(message: str, code: int) -> int:
    sys.stderr.write(f"rlpost: {message}\n")
    return code


def _train(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rlpost.config import RecipeError
    from rlpost.plan import check_resources, learner_line, local_resources, render_plan
    from rlpost.recipe import load_recipe

    console = Console(soft_wrap=True)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        resources = local_resources()
        if arguments.dry_run:
            console.print(render_plan(recipe, resources))
            return 0
        if recipe.ray_address is None:
            check_resources(recipe, resources)
        console.print(learner_line(recipe))
        from rlpost.run import run_recipe

        return run_recipe(recipe, resume=arguments.resume, console=console)
    except RecipeError as error:
        return _stopped(str(error), exit_codes.USAGE)


def _eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rlpost.plan import check_resources, local_resources
    from rlpost.recipe import load_recipe

    overrides = [item for item in arguments.models if "=" in item and not Path(item).exists()]
    models = [item for item in arguments.models if item not in overrides]
    if not models:
        return _stopped(
            "give at least one model: a directory, a run's directory or a name on the hub", exit_codes.USAGE
        )
    try:
        recipe = load_recipe(arguments.recipe, overrides)
        for key, value in (("samples", arguments.samples), ("temperature", arguments.temperature)):
            if value is not None:
                overrides += [f"eval.{item.name}.{key}={value}" for item in recipe.eval]
        recipe = load_recipe(arguments.recipe, overrides)
        if recipe.ray_address is None:
            check_resources(recipe, local_resources(), learning=False)
        from rlpost.evaluate import evaluate_models

        return evaluate_models(recipe, models, arguments.output, Console(soft_wrap=True))
    except ValueError as error:  # RecipeError too
        return _stopped(str(error), exit_codes.USAGE)


def _data(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from reward.sandbox import TierError
    from rlpost.config import RecipeError
    from rlpost.curation.plan import load_curation
    from rlpost.curation.run import curate

    try:
        return curate(load_curation(arguments.curation, arguments.overrides), arguments.output, Console(soft_wrap=True))
    except (RecipeError, TierError) as error:
        return _stopped(str(error), exit_codes.USAGE)


def _study(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rlpost.config import RecipeError
    from rlpost.study.plan import load_study

    console = Console(soft_wrap=True)
    try:
        study = load_study(arguments.study)
        if arguments.dry_run:
            for run in (study.start, *study.runs):
                console.print(f"{run.arm}, seed {run.seed}: {' '.join(run.overrides)}", markup=False, highlight=False)
            return 0
        from rlpost.study.run import run_study

        return run_study(study, arguments.study.stem, console)
    except RecipeError as error:
        return _stopped(str(error), exit_codes.USAGE)


def _summary(run_dir: Path) -> int:
    from rich.console import Console

    from rlpost.summary import summarize_run

    try:
        summary = summarize_run(run_dir)
    except ValueError as error:
        return _stopped(str(error), exit_codes.USAGE)
    Console(soft_wrap=True).print(summary)
    return 0


def _analyze(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from rlpost.analysis.measure import analyze
    from rlpost.analysis.output import check_output, write_analysis
    from rlpost.analysis.tables import render, render_comparison

    if not arguments.spectra:
        # Counting waits for memory, and on busy cores for every thread it shares short work with.
        torch.set_num_threads(1)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    try:
        for path in arguments.output:
            check_output(path)
        if arguments.figures is not None and not arguments.figures.parent.is_dir():
            raise ValueError(f"{arguments.figures.parent} is no directory to write to")
        analysis = analyze(
            arguments.before, arguments.after, dtype=dtype, rank=arguments.rank, spectra=arguments.spectra
        )
    except ValueError as error:
        return _stopped(str(error), exit_codes.USAGE)
    console = Console(soft_wrap=True)
    for update in analysis.updates:
        console.print(f"{analysis.before} -> {update.after}", markup=False)
        console.print(render(update.rows))
        for note in update.notes:
            console.print(note, markup=False)
    for comparison, pair in zip(analysis.comparisons, itertools.combinations(analysis.updates, 2), strict=True):
        console.print(render_comparison(comparison, *pair))
    for path in arguments.output:
        write_analysis(path, analysis)
    if arguments.figures is not None:
        from rlpost.analysis.figures import figures
        from rlpost.analysis.style import write_figures

        write_figures(figures(analysis), arguments.figures)
    return 0


def _mask(arguments: argparse.Namespace) -> int:
    import torch

    from rlpost.analysis.mask import Selection, write_mask

    try:
        selection = Selection(
            select="principal"
            if arguments.principal is not None
            else "low_magnitude"
            if arguments.low_magnitude
            else "update",
            rank=arguments.principal,
            density=arguments.density,
            control="random" if arguments.random else "complement" if arguments.complement else None,
            seed=arguments.seed,
            dtype=getattr(torch, arguments.dtype),
        )
        chosen = write_mask(arguments.before, arguments.after, arguments.output, selection)
    except ValueError as error:
        return _stopped(str(error), exit_codes.USAGE)
    count, total = (sum(counts) for counts in zip(*chosen.values(), strict=True))
    touched = sum(bool(count) for count, _ in chosen.values())
    sys.stdout.write(
        f"{arguments.output}: {count:,} of {total:,} entries ({count / total:.2%}), in {touched} of {len(chosen)} weights\n"
    )
    return 0


def _dampen(arguments: argparse.Namespace) -> int:
    from rlpost.analysis.dampen import dampen

    options = {"scale": arguments.scale, "k": arguments.top, "epsilon": arguments.epsilon}
    try:
        found = dampen(arguments.before, arguments.after, arguments.output, **options)
    except ValueError as error:
        return _stopped(str(error), exit_codes.USAGE)
    num_matrices = sum(map(bool, found.values()))
    sys.stdout.write(
        f"{arguments.output}: {sum(found.values())} intruder dimensions in {num_matrices} of {len(found)} matrices, scaled to"
        f" {arguments.scale:g}\n"
    )
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from rlpost.archive import diff_directories, different_files

    try:
        patch = diff_directories(arguments.before, arguments.after, arguments.output)
    except ValueError as error:
        return _stopped(str(error), exit_codes.USAGE)
    full = sum(tensor.full_bytes for tensor in patch.tensors.values())
    changed = sum(bool(tensor.pieces) for tensor in patch.tensors.values())
    size = arguments.output.stat().st_size
    sys.stdout.write(
        f"{patch.num_changed:,} entries changed, in {changed} of {len(patch.tensors)} tensors: {size:,} bytes,"
        f" {full / size:.1f} x smaller than the weights\n"
    )
    if others := different_files(arguments.before, arguments.after):
        sys.stdout.write(f"not in the patch, which carries weights only: {', '.join(others)}\n")
    return 0


def _patch(arguments: argparse.Namespace) -> int:
    from rlpost.archive import patch_directory

    if not arguments.patch.is_file():
        return _stopped(f"{arguments.patch} is no file: `rlpost diff` writes patches", exit_codes.USAGE)
    try:
        patch_directory(arguments.before, arguments.patch, arguments.output)
    except ValueError as error:
        return _stopped(str(error), exit_codes.USAGE)
    sys.stdout.write(f"{arguments.output}: every tensor has the checksum that the patch states\n")
    return 0


def _checkout(arguments: argparse.Namespace) -> int:
    from rlpost.archive import checkout

    try:
        checkout(arguments.run_dir, arguments.number, arguments.output)
    except ValueError as error:
        return _stopped(str(error), exit_codes.USAGE)
    sys.stdout.write(
        f"{arguments.output}: every tensor has the checksum with which version {arguments.number} was published\n"
    )
    return 0


def _doctor() -> int:
    from rich.console import Console

    from rlpost.doctor import run_doctor

    return run_doctor(Console(soft_wrap=True))


if __name__ == "__main__":
    sys.exit(main())
