"""Prompts from whatever the recipe names: read, checked and tokenized."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlpost.config import DatasetData, FileData, GeneratedData, RecipeError, VerifierConfig
from rlpost.data.adapters import ADAPTERS, Adapter
from rlpost.data.generated import FAMILIES, problems
from rlpost.data.prompts import Prompts, problem_digest
from rlpost.types import Prompt

if TYPE_CHECKING:
    from reward import RewardPool, Verdict

PLACEHOLDER = re.compile(r"\{(\w+)\}")
"""A column's name in a prompt template."""
ON_THE_HUB = "hf://"
GOLDS_AT_ONCE = 1024
CARD = "card.json"
"""What `rlpost data` tells of the data it wrote, beside it."""
FILE_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class TokenizerLike(Protocol):
    eos_token_id: int | None
    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def load_generated(
    config: GeneratedData, tokenizer: TokenizerLike, *, seed: int, limit: int | None = None
) -> list[Prompt]:
    """Draw problems, families taking turns; a problem drawn twice is kept once."""
    unknown = [family for family in config.families if family not in FAMILIES]
    if unknown or not config.families:
        raise RecipeError(f"data: families = {list(config.families)}; choose from {sorted(FAMILIES)}")
    num_prompts = min(config.num_prompts, limit or config.num_prompts)
    streams = [_distinct(problems(family, split=config.split, seed=seed)) for family in config.families]
    rounds = -(-num_prompts // len(streams))
    drawn = [problem for batch in zip(*(islice(s, rounds) for s in streams), strict=True) for problem in batch]
    return [
        Prompt(
            id=problem.id,
            token_ids=tuple(tokenizer.encode(problem.prompt, add_special_tokens=False)),
            task=problem.task,
            reference=problem.reference,
            problem=problem_digest(problem.prompt, problem.task, problem.reference),
            demonstration_ids=response_ids(problem.demonstration, tokenizer),
        )
        for problem in drawn[:num_prompts]
    ]


def _distinct(stream: Iterator[Any], max_repeats: int = 10_000) -> Iterator[Any]:
    seen: set[str] = set()
    repeats = 0
    for problem in stream:
        repeats = repeats + 1 if problem.id in seen else 0
        if repeats > max_repeats:
            raise RecipeError(f"data: only {len(seen)} distinct problems exist in this family; lower num_prompts")
        if not repeats:
            seen.add(problem.id)
            yield problem


def load_dataset_prompts(config: DatasetData, tokenizer: TokenizerLike) -> Prompts:
    """The rows of a dataset as prompts, in the dataset's order: all are checked in one pass, and stay on the disk.

    Raises:
        RecipeError: when the file, a column, a value or the template is wrong, naming what exists.
    """
    used = (config.answer, config.tests, config.setup, config.solution, config.entry_point, config.demonstration)
    rows = read_rows(config, columns=used)
    left_out: Counter[str] = Counter()

    def fitting() -> Iterator[tuple[int, Prompt]]:
        for index, row in enumerate(rows):
            if reason := row.get("left_out"):
                left_out[reason] += 1
                continue
            check_filled(row, index, config, columns=(config.answer, config.tests, config.demonstration))
            prompt = _dataset_prompt(row, index, config, tokenizer)
            if len(prompt.token_ids) <= config.max_prompt_tokens:
                yield index, prompt
            else:
                left_out["prompt_too_long"] += 1

    prompts = Prompts.found(
        lambda index: _dataset_prompt(rows[index], index, config, tokenizer),
        islice(fitting(), config.max_prompts),
        left_out,
    )
    if not len(prompts):
        raise RecipeError(
            f"{config.path}: no prompt is left; left out: {dict(left_out)}. max_prompt_tokens = {config.max_prompt_tokens}"
        )
    return prompts


def _dataset_prompt(row: Mapping[str, Any], index: int, config: DatasetData, tokenizer: TokenizerLike) -> Prompt:
    text, reference = fill(config.prompt, row), reference_of(row, config)
    return Prompt(
        id=str(row.get("id") or row.get("task_id") or f"{Path(config.path).name}/{index}"),
        token_ids=prompt_ids(text, config, tokenizer),
        task=config.task,
        reference=reference,
        problem=problem_digest(text, config.task, reference),
        demonstration_ids=response_ids(row[config.demonstration], tokenizer) if config.demonstration else None,
    )


def read_rows(config: FileData, *, columns: Iterable[str | None]) -> Any:
    """The data set's rows, once it is known to have `columns` and those of the prompt's template."""
    rows = _read(config)
    adapter = ADAPTERS[config.adapter] if config.adapter else None
    if adapter and adapter.columns:
        rows = AdaptedRows(rows, adapter, config)
    names = (*PLACEHOLDER.findall(config.prompt), *columns)
    missing = sorted({name for name in names if name and name not in rows.column_names})
    if missing:
        raise RecipeError(f"{config.path} has no column {missing}; it has {sorted(rows.column_names)}")
    return rows


class AdaptedRows:
    """Rows under the columns that an adapter makes of them, each made when it is asked for.

    A row with a reason in "left_out" has None in the columns that the adapter makes: no prompt can be made of it.
    """

    def __init__(self, rows: Any, adapter: Adapter, config: FileData) -> None:
        """
        Raises:
            RecipeError: when the data lacks a column that the adapter reads.
        """
        assert adapter.columns is not None
        self._rows, self._columns, self._config = rows, adapter.columns, config
        self._none = dict.fromkeys(adapter.makes)
        if missing := [name for name in adapter.reads if name not in rows.column_names]:
            raise RecipeError(
                f"{config.path} has no column {missing}, which adapter = {config.adapter!r} reads; it has"
                f" {sorted(rows.column_names)}. Leave adapter out and name the columns of this data"
            )
        self.column_names = [*dict.fromkeys((*rows.column_names, *adapter.makes))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._adapted(index, self._rows[index])

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self._adapted(index, row) for index, row in enumerate(self._rows))

    def _adapted(self, index: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return {**row, **self._none, **self._columns(row)}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            config = self._config
            raise RecipeError(
                f"{config.path}, row {index} is not what adapter = {config.adapter!r} knows: {type(error).__name__}:"
                f" {error}. Leave adapter out and name the columns of this data"
            ) from error


def local_file(config: FileData) -> Path | None:
    """The file that the data is read from; None for what lies on the hub.

    Raises:
        RecipeError: when there is none.
    """
    path = Path(config.path)
    if _suffix(path) not in FILE_READERS or config.path.startswith(ON_THE_HUB):
        return None
    if not path.is_file():
        raise RecipeError(f"no data file at {path}; give another path with data.<name>.path=...")
    return path


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _read(config: FileData) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    path = local_file(config)
    if path is not None:
        try:
            return datasets.load_dataset(FILE_READERS[_suffix(path)], data_files=str(path), split="train")
        except StopIteration:  # what datasets makes of a JSON file without a row
            raise RecipeError(f"{path} has no rows") from None
        except (OSError, ValueError, DatasetGenerationError) as error:
            raise RecipeError(f"{path} could not be read: {_reason(error)}. Mend it, or leave rows out") from error
    reader = FILE_READERS.get(_suffix(Path(config.path)))
    try:
        if reader and config.path.startswith(ON_THE_HUB):
            return datasets.load_dataset(reader, data_files=config.path, split="train")
        return datasets.load_dataset(config.path, config.config, split=config.split)
    except (OSError, ValueError, ConnectionError) as error:
        raise RecipeError(
            f"dataset {config.path!r} could not be loaded ({type(error).__name__}: {error}). Check the name and the"
            " network; a download that was interrupted resumes when you run the command again. Or give a local .jsonl"
            " file with data.<name>.path=..."
        ) from error


def _reason(error: BaseException) -> str:
    """The first cause of an error that datasets has wrapped."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with every {column} replaced by the row's value."""
    return PLACEHOLDER.sub(lambda match: _text(row[match.group(1)]), template)


def _text(value: Any) -> str:
    """A list has an item a line."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def check_filled(row: Mapping[str, Any], index: int, config: FileData, *, columns: Iterable[str | None] = ()) -> None:
    """Raises RecipeError when the row lacks a value of `columns` or of the prompt's template."""
    names = (*PLACEHOLDER.findall(config.prompt), *columns)
    if empty := sorted({name for name in names if name and row[name] is None}):
        raise RecipeError(f"{config.path}, row {index} has no value in {empty}: fill it, or leave the row out")


def prompt_ids(text: str, config: FileData, tokenizer: TokenizerLike) -> tuple[int, ...]:
    """The prompt as the policy gets it.

    Raises:
        RecipeError: when it begins twice: the text spells out a start token that the chat template adds as well.
    """
    if config.chat:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.bos_token_id is not None and list(ids[:2]) == [tokenizer.bos_token_id] * 2:
        raise RecipeError(
            f"{config.path}: a prompt begins with two start tokens ({text[:60]!r}): take the one written in the text or"
            " in the prompt template out"
        )
    return tuple(ids)


def reference_of(row: Mapping[str, Any], config: DatasetData) -> Mapping[str, Any]:
    """What the row's verifier judges by."""
    if config.task == "math":
        assert config.answer is not None
        answer = str(row[config.answer])
        if config.answer_after:
            answer = answer.rpartition(config.answer_after)[2]
        return {"answer": answer.strip()}
    assert config.tests is not None
    reference: dict[str, Any] = {
        "tests": list(row[config.tests]),
        "setup": _text(row[config.setup] or "") if config.setup else "",
        "entry_point": row[config.entry_point] if config.entry_point else None,
    }
    if config.solution and row[config.solution]:
        reference["reference_solution"] = row[config.solution]
        reference["entry_point"] = reference["entry_point"] or _called_function(
            row[config.solution], reference["tests"]
        )
    return reference


def _called_function(solution: str, tests: Sequence[Any]) -> str | None:
    """The function of the solution that the tests call, which may have the name of a builtin; None if that is unclear."""
    defined = re.findall(r"^def (\w+)\(", solution, re.MULTILINE)
    snippets = [test for test in tests if isinstance(test, str)]  # others are inputs and outputs, and call nothing
    called = [name for name in defined if any(re.search(rf"\b{name}\(", snippet) for snippet in snippets)]
    return called[0] if len(set(called)) == 1 else None


def response_ids(text: str, tokenizer: TokenizerLike) -> tuple[int, ...]:
    """A given response and the end token: once, also where the text spells it out."""
    assert tokenizer.eos_token_id is not None
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return ids if ids[-1:] == (tokenizer.eos_token_id,) else (*ids, tokenizer.eos_token_id)


def check_golds(prompts: Prompts, *, max_rejected: float, verifier: VerifierConfig) -> Prompts:
    """Those prompts whose gold answer their own verifier accepts.

    A math gold is its answer in a box; a code gold is the reference solution where the data has one. Prompts without a
    gold to check are kept.

    Raises:
        RecipeError: as soon as more than `max_rejected` of the golds must be rejected, with examples.
    """
    from reward import Outcome, RewardPool, check_reference

    rejected_P = np.zeros(len(prompts), np.bool_)
    num_checked, examples = 0, list[str]()
    with RewardPool.from_table(verifier.model_dump()) as pool:
        for start in range(0, len(prompts), GOLDS_AT_ONCE):
            batch = [prompts[index] for index in range(start, min(start + GOLDS_AT_ONCE, len(prompts)))]
            for prompt in batch:
                try:
                    check_reference(prompt.task, prompt.reference)
                except ValueError as error:
                    raise RecipeError(f"prompt {prompt.id} cannot be judged: {error}") from error
            for i, verdict in enumerate(judge_golds([(prompt.task, prompt.reference) for prompt in batch], pool)):
                num_checked += verdict is not None
                if verdict is not None and verdict.outcome is not Outcome.CORRECT:
                    rejected_P[start + i] = True
                    examples.append(f"{batch[i].id}: {verdict.outcome.value} {verdict.detail}"[:200])
            num_left = len(prompts) - start - len(batch)
            if rejected_P.sum() > max_rejected * (num_checked + num_left):
                raise RecipeError(
                    f"{rejected_P.sum()} of {num_checked} gold answers are rejected by their own verifier"
                    f" ({'; '.join(examples[:3])}). Mend the data, or leave these prompts out with max_rejected_golds"
                )
    return prompts.without(rejected_P, "gold_rejected")


def judge_golds(golds: Sequence[tuple[str, Mapping[str, Any]]], pool: RewardPool) -> list[Verdict | None]:
    """The verdict of its own verifier on the gold answer of each task and reference; None for code without a reference
    solution, which has none to judge."""
    from reward import gold_response

    checked = [i for i, (task, reference) in enumerate(golds) if task == "math" or reference.get("reference_solution")]
    items = [(task, gold_response(task, reference), reference) for task, reference in map(golds.__getitem__, checked)]
    verdicts = dict(zip(checked, pool.score_many(items), strict=True))
    return [verdicts.get(i) for i in range(len(golds))]
