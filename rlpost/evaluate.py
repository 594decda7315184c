"""Models on held-out problems, several samples of each: drawn as a run draws them, kept, and compared (`rlpost eval`).

DIRECTORY/  samples.jsonl  results.json  logs/<model>/

Every sample carries a fingerprint of all that it depends on, so whoever asks again finds it in the file: what an
interrupt left over, more samples, and another model are drawn, and nothing is drawn twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console

from rlpost import exit_codes
from rlpost.archive import last_export
from rlpost.config import ModelConfig, Recipe, RecipeError
from rlpost.eval_report import EvalSample, SetResult, figures, render
from rlpost.pipeline.controller import RunSettings
from rlpost.pipeline.deadlines import task_group
from rlpost.pipeline.evaluation import EvalSet, draw, room
from rlpost.pipeline.fleet import Fleet, Limits
from rlpost.pipeline.ports import Serving, WorkerLost
from rlpost.plan import max_model_len
from rlpost.progress import event_line
from rlpost.run import interruptible
from rlpost.run_directory import model_directory
from rlpost.stages import load_eval_sets
from rlpost.tracking import FILES, plain, read_rows
from rlpost.types import Prompt

SAMPLES, RESULTS = "samples.jsonl", "results.json"
CHUNK_BYTES = 1 << 22


Serve = Callable[["Candidate"], contextlib.AbstractContextManager[Serving]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model to evaluate."""

    label: str
    """A, B, ... in the order they were given."""
    name: str
    """As it was given."""
    path: Path
    fingerprint: str
    """Of its weights, its tokenizer and its configuration."""


def evaluate_models(
    recipe: Recipe,
    models: Sequence[str],
    output: Path,
    console: Console,
    *,
    serve: Serve | None = None,
) -> int:
    """Draw what is not in `output` yet, report on all of it; returns the process's exit code.

    Args:
        models: directories, runs (what they exported last) or names on the hub. The others are compared with the first.
        serve: how a model is served; None: by Ray and vLLM, as in a run.

    Raises:
        RecipeError: when the recipe has no eval set, or a model or the data cannot be used.
        ValueError: when the samples in `output` are damaged.
    """
    if not recipe.eval:
        raise RecipeError("the recipe has no [[eval]]: add one, with name, data and max_response_tokens")
    recipe = recipe.model_copy(update={"stage": ()})  # only what is evaluated is loaded and made room for
    candidates = [_candidate(recipe, name, index) for index, name in enumerate(models)]
    eval_sets = {each.label: load_eval_sets(recipe, each.path) for each in candidates}
    output.mkdir(parents=True, exist_ok=True)
    kept = KeptSamples(output / SAMPLES)
    try:
        with contextlib.ExitStack() as cleanup:
            for each in candidates:
                if not any(_wanted(recipe, each, eval_set, kept) for eval_set in eval_sets[each.label]):
                    continue
                if serve is None:
                    serve = cleanup.enter_context(_by_ray(recipe, output))
                with serve(each) as serving:
                    asyncio.run(_draw_all(recipe, each, eval_sets[each.label], serving, kept, console))
    except (WorkerLost, RuntimeError) as error:
        console.print(f"the evaluation stopped: {error}", markup=False)
        console.print(
            f"The samples drawn are in {output / SAMPLES}: the same command goes on from there.", markup=False
        )
        return exit_codes.FAILED
    results = [_result(recipe, index, candidates, eval_sets, kept) for index in range(len(recipe.eval))]
    content = {
        "seed": recipe.seed,
        "models": [{**dataclasses.asdict(each), "path": str(each.path)} for each in candidates],
        "evals": {result.name: figures(result) for result in results},
    }
    (output / RESULTS).write_text(json.dumps(plain(content), indent=2) + "\n", encoding="utf-8")
    for each in candidates:
        console.print(f"{each.label} = {each.name}", markup=False, highlight=False)
    for result in results:
        console.print(render(result))
    console.print(f"every sample: {output / SAMPLES}; every figure: {output / RESULTS}", markup=False, highlight=False)
    return 0


def _candidate(recipe: Recipe, name: str, index: int) -> Candidate:
    place = Path(name)
    if (place / FILES["event"]).is_file():
        exported = last_export(place)
        if exported is None:
            raise RecipeError(f"{name} has not exported a model yet: give a version of it that `rlpost checkout` wrote")
        place = exported
    given = recipe.model_copy(update={"model": ModelConfig(path=str(place))})
    path = model_directory(given, place, resume=False)
    return Candidate(label=chr(ord("A") + index), name=name, path=path, fingerprint=_directory_hash(path))


def _directory_hash(path: Path) -> str:
    """Of the files that decide what is sampled: whatever lies in the directory itself, of any kind."""
    digest = xxhash.xxh3_128()
    for file in sorted(path.iterdir()):
        if file.is_file():
            digest.update(f"{file.name}/{file.stat().st_size}/".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
    return digest.hexdigest()


# -- samples that are kept ---------------------------------------------------------------------------------------------


class KeptSamples:
    """The file of all samples, by fingerprint and number; a row is on the disk once its group is judged."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError when a line is damaged; a last one that a kill cut short is dropped."""
        self._samples: dict[tuple[str, int], EvalSample] = {}
        for row in read_rows(path):
            self._remember(row)
        if path.exists() and (size := path.stat().st_size):
            with path.open("rb+") as file:
                with mmap.mmap(file.fileno(), size) as data:
                    end = data.rfind(b"\n") + 1
                file.truncate(end)
        self._path = path

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._samples

    def __getitem__(self, key: tuple[str, int]) -> EvalSample:
        return self._samples[key]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            self._remember(row)

    def _remember(self, row: Mapping[str, Any]) -> None:
        fields = {field.name: row[field.name] for field in dataclasses.fields(EvalSample)}
        self._samples[row["fingerprint"], row["number"]] = EvalSample(**fields)


def _fingerprint(recipe: Recipe, candidate: Candidate, eval_set: EvalSet, prompt: Prompt) -> str:
    """Of all that a sample of this prompt and its verdict depend on, but for the machine and its number."""
    asked = (prompt.id, prompt.token_ids, prompt.task, sorted(prompt.reference.items()))
    drawn = (recipe.seed, eval_set.temperature, eval_set.max_tokens, recipe.sampler.dtype)
    return xxhash.xxh3_128_hexdigest(repr((candidate.fingerprint, asked, drawn)).encode())


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The samples of one prompt that are not there yet."""

    prompt: Prompt
    fingerprint: str
    numbers: tuple[int, ...]


def _wanted(recipe: Recipe, candidate: Candidate, eval_set: EvalSet, kept: KeptSamples) -> list[_Wanted]:
    wanted: dict[str, _Wanted] = {}  # a problem that the data has twice is drawn once
    for prompt in eval_set.prompts:
        fingerprint = _fingerprint(recipe, candidate, eval_set, prompt)
        if numbers := tuple(n for n in range(eval_set.num_samples) if (fingerprint, n) not in kept):
            wanted[fingerprint] = _Wanted(prompt, fingerprint, numbers)
    return list(wanted.values())


def _result(
    recipe: Recipe,
    index: int,
    candidates: Sequence[Candidate],
    eval_sets: Mapping[str, Sequence[EvalSet]],
    kept: KeptSamples,
) -> SetResult:
    samples: dict[str, dict[str, list[EvalSample]]] = defaultdict(dict)
    for each in candidates:
        eval_set = eval_sets[each.label][index]
        for prompt in eval_set.prompts:
            fingerprint = _fingerprint(recipe, each, eval_set, prompt)
            samples[each.label][prompt.id] = [kept[fingerprint, number] for number in range(eval_set.num_samples)]
    first = eval_sets[candidates[0].label][index]
    return SetResult(
        name=first.name, num_samples=first.num_samples, temperature=first.temperature, samples=dict(samples)
    )


# -- drawing -----------------------------------------------------------------------------------------------------------


async def _draw_all(
    recipe: Recipe,
    candidate: Candidate,
    eval_sets: Sequence[EvalSet],
    serving: Serving,
    kept: KeptSamples,
    console: Console,
) -> None:
    settings = RunSettings(
        seed=recipe.seed,
        limits=Limits(**recipe.deadlines.model_dump()),
        max_num_seqs=recipe.sampler.max_num_seqs,
    )

    def show(name: str, **details: Any) -> None:
        console.print(event_line({"event": name, **details})[0], markup=False, highlight=False)

    async with task_group() as tasks:
        samplers = Fleet(serving.samplers, serving.restart, settings.limits, tasks.create_task, show)
        await samplers.serve()
        for eval_set in eval_sets:
            missing = _wanted(recipe, candidate, eval_set, kept)  # another set may have had some of its problems
            total = len(eval_set.prompts) * eval_set.num_samples
            num_missing = sum(len(each.numbers) for each in missing)
            console.print(
                f"{candidate.label}, {eval_set.name}: {num_missing:,} of {total:,} samples to draw",
                markup=False,
                highlight=False,
            )
            asked = room(eval_set, len(samplers), settings)

            async def one(each: _Wanted, eval_set: EvalSet = eval_set, asked: asyncio.Semaphore = asked) -> None:
                async with asked:
                    drawn = await draw(eval_set, each.prompt, each.numbers, samplers, serving, settings)
                of = {
                    "model": candidate.name,
                    "eval": eval_set.name,
                    "prompt_id": each.prompt.id,
                    "problem": each.prompt.problem,
                    "fingerprint": each.fingerprint,
                }
                kept.add([of | dataclasses.asdict(sample) for sample in drawn])

            async with task_group() as drawing:
                for each in missing:
                    drawing.create_task(one(each))


@contextlib.contextmanager
def _by_ray(recipe: Recipe, output: Path) -> Iterator[Serve]:
    """A cluster on which one model after another is served."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed where it is installed
    from rlpost.workers.cluster import ray_cluster
    from rlpost.workers.ray_workers import RayServing

    @contextlib.contextmanager
    def serve(candidate: Candidate) -> Iterator[Serving]:
        serving = RayServing(
            model_path=candidate.path,
            sampler=recipe.sampler,
            verifier=recipe.verifier,
            max_model_len=max_model_len(recipe),
            log_dir=(output / "logs" / candidate.label).resolve(),
        )
        with contextlib.closing(serving):
            yield serving

    with ray_cluster(recipe.ray_address):
        interruptible()  # Ray has put a handler of its own in place
        yield serve
