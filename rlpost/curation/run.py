"""A curation from end to end: three passes over the rows, the cheap filters first.

    1. text filters; which runs of words are phrases        holds row numbers
    2. contamination, same address, same text, MinHash      holds some 600 bytes a problem
       near duplicates: only problems that share a band     reads those again
    3. golds, weak tests                                    256 problems at a time

Rows are read anew from the files that `datasets` maps, so that memory does not grow with what problems weigh. Evaluation sets are
held as hashes, 12 bytes a run.
"""

from __future__ import annotations

import functools
import json
import platform
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlpost import __version__
from rlpost.config import RecipeError
from rlpost.curation import ngrams
from rlpost.curation.card import Ledger, markdown, render
from rlpost.curation.filters import first_found
from rlpost.curation.judging import Judge
from rlpost.curation.output import ProblemWriter, has_script_tests
from rlpost.curation.plan import (
    CONTAMINATED,
    EMPTY,
    NEAR,
    NO_SOLUTION,
    SAME_TEXT,
    SAME_URL,
    AgainstConfig,
    CurationConfig,
)
from rlpost.curation.problems import Problem, Source, qualified, sha256
from rlpost.data.sources import CARD, check_filled, fill, local_file, read_rows

DATA, LEFT_OUT, CARD_TEXT = "data.parquet", "left_out.jsonl", "card.md"
CHUNK = 256
CACHED_TEXTS = 10_000


def curate(config: CurationConfig, output: Path, console: Console) -> int:
    """Write the problems that no filter leaves out, those left out, and the card, to a new directory.

    Raises:
        RecipeError: before anything is written, where a source, a column or the directory is wrong.
    """
    if output.exists():
        raise RecipeError(f"{output} exists: give a directory that does not, or remove it")
    sources = [Source.open(name, table) for name, table in config.source.items()]
    script_tests = config.task == "code" and has_script_tests(_test_kinds(sources))
    against = {name: _Against.open(name, table) for name, table in config.against.items()}
    texts = (item for evaluation in against.values() for item in evaluation.texts())
    contamination = ngrams.Contamination(texts, config.ngram, max_stock=config.filters.max_stock)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with Judge(config) as judge, (partial / LEFT_OUT).open("w", encoding="utf-8") as left_out:
        ledger = Ledger(config.definitions(), left_out)
        rows = _by_text(sources, config, ledger, contamination)
        console.print(f"{_count(rows):,} of {ledger.rows.total():,} rows pass the filters of texts")
        rows = _distinct(sources, rows, config, ledger, contamination)
        console.print(f"{_count(rows):,} are neither in an evaluation set nor there twice")
        with ProblemWriter(partial / DATA, task=config.task, script_tests=script_tests) as writer:
            _judged(sources, rows, ledger, judge, writer)
    card = {
        "name": config.name,
        "task": config.task,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **ledger.figures(),
        "mutants": judge.mutants.figures() if judge.mutants.problems or judge.mutants.not_asked else {},
        "source": {source.name: source.facts() for source in sources},
        "against": {name: evaluation.facts() for name, evaluation in against.items()},
        "outputs": {name: sha256(partial / name) for name in (DATA, LEFT_OUT)},
        "settings": config.settings(),
        "versions": {"rlpost": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("datasets", "math-verify", "pyarrow")},
    }
    (partial / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (partial / CARD_TEXT).write_text(markdown(card), encoding="utf-8")
    partial.rename(output)
    console.print(render(card))
    for name, meaning in (
        (DATA, "the problems"),
        (LEFT_OUT, "what was left out, and why"),
        (CARD_TEXT, f"the card ({CARD})"),
    ):
        console.print(f"{output / name}: {meaning}", markup=False, highlight=False)
    return 0


@dataclass(slots=True)
class _Against:
    name: str
    config: AgainstConfig
    rows: Any

    @classmethod
    def open(cls, name: str, config: AgainstConfig) -> _Against:
        try:
            return cls(name, config, read_rows(config, columns=()))
        except RecipeError as error:
            raise RecipeError(f"against.{name}: {error}") from error

    def texts(self) -> Iterator[tuple[str, str]]:
        for index, row in enumerate(self.rows):
            check_filled(row, index, self.config)
            yield qualified(self.name, row, index), fill(self.config.prompt, row)

    def facts(self) -> dict[str, Any]:
        path = local_file(self.config)
        where = {"split": self.config.split} if path is None else {"sha256": sha256(path)}
        return {"path": self.config.path, **where, "rows": len(self.rows)}


Rows = list["array[int]"]
"""Of each source, the rows that are still in."""


def _by_text(
    sources: Sequence[Source], config: CurationConfig, ledger: Ledger, contamination: ngrams.Contamination
) -> Rows:
    filters = config.asked_texts()
    kept: Rows = []
    for source in sources:
        kept.append(array("L"))
        for problem in source.all():
            ledger.rows[source.name] += 1
            if problem.missing:
                _leave_out(ledger, problem, EMPTY, f"without: {problem.missing}")
            elif config.asks(NO_SOLUTION) and not problem.reference.get("reference_solution"):
                _leave_out(ledger, problem, NO_SOLUTION, "no reference solution")
            elif found := first_found(filters, problem.text, problem.answer):
                _leave_out(ledger, problem, *found)
            else:
                kept[-1].append(problem.row)
                contamination.count(problem.text)
    return kept


def _distinct(
    sources: Sequence[Source], rows: Rows, config: CurationConfig, ledger: Ledger, contamination: ngrams.Contamination
) -> Rows:
    """In the order of sources and rows, so that of several the first is kept."""
    urls: dict[str, str] = {}
    places: dict[int, tuple[int, int]] = {}
    """By hash of the text, source and row of the first problem with it."""
    kept: list[tuple[int, int]] = []
    keys = array("Q")
    for number, source in enumerate(sources):
        for problem in map(source.__getitem__, rows[number]):
            first = places.get(text := ngrams.squeezed(problem.text))
            if config.asks(CONTAMINATED) and (found := contamination.find(problem.text)):
                _leave_out(ledger, problem, CONTAMINATED, f"{found[0]}: {found[1]}")
            elif problem.url and config.asks(SAME_URL) and problem.url in urls:
                _leave_out(ledger, problem, SAME_URL, f"{urls[problem.url]}: {problem.url}")
            elif first is not None and config.asks(SAME_TEXT):
                _leave_out(ledger, problem, SAME_TEXT, sources[first[0]][first[1]].id)
            else:
                places.setdefault(text, (number, problem.row))
                if problem.url:
                    urls.setdefault(problem.url, problem.id)
                kept.append((number, problem.row))
                if config.asks(NEAR):
                    keys.frombytes(ngrams.band_keys(_runs(problem.text, config.ngram)).tobytes())
    if config.asks(NEAR):
        kept = _without_near(
            sources, kept, np.frombuffer(keys, np.uint64).reshape(-1, ngrams.NUM_BANDS), config, ledger
        )
    return [array("L", (row for number, row in kept if number == n)) for n in range(len(sources))]


def _without_near(
    sources: Sequence[Source],
    kept: list[tuple[int, int]],
    keys_NB: ngrams.Hashes,
    config: CurationConfig,
    ledger: Ledger,
) -> list[tuple[int, int]]:
    @functools.lru_cache(CACHED_TEXTS)
    def read(place: tuple[int, int]) -> tuple[str, int, ngrams.Hashes]:
        problem = sources[place[0]][place[1]]
        return problem.id, ngrams.squeezed(problem.answer), _runs(problem.text, config.ngram)

    members: dict[int, list[tuple[int, int]]] = {}
    """Of each group of texts that share a key, those that are still in."""
    dropped: set[tuple[int, int]] = set()
    for index, groups in sorted(ngrams.candidate_groups(keys_NB).items()):
        place = kept[index]
        _, own_answer, own = read(place)
        for earlier, answer, theirs in map(
            read, sorted({member for group in groups for member in members.get(group, ())})
        ):
            share = ngrams.jaccard(theirs, own)
            if share >= config.filters.duplicate_share and answer == own_answer:
                _leave_out(ledger, sources[place[0]][place[1]], NEAR, f"{earlier}: {share:.0%}")
                dropped.add(place)
                break
        else:
            for group in groups:
                members.setdefault(group, []).append(place)
    return [place for place in kept if place not in dropped]


def _judged(sources: Sequence[Source], rows: Rows, ledger: Ledger, judge: Judge, writer: ProblemWriter) -> None:
    for source, of_source in zip(sources, rows, strict=True):
        for start in range(0, len(of_source), CHUNK):
            problems = [source[row] for row in of_source[start : start + CHUNK]]
            kept = []
            for problem, judged in zip(problems, judge.judge(problems), strict=True):
                if judged.filter is not None:
                    _leave_out(ledger, problem, judged.filter, judged.detail)
                else:
                    ledger.keep(source.name, len(ngrams.words(problem.text)))
                    kept.append((problem, judged))
            writer.write(kept)


def _leave_out(ledger: Ledger, problem: Problem, name: str, detail: str) -> None:
    ledger.leave_out(problem.source, problem.row, name, problem.id, problem.text, detail)


def _runs(text: str, n: int) -> ngrams.Hashes:
    return ngrams.runs(ngrams.words_and_signs(text), n)


def _test_kinds(sources: Sequence[Source]) -> dict[str, bool]:
    """Of each source with a problem, whether tests are inputs and outputs."""
    first = {
        source.name: next(
            (problem for problem in map(source.__getitem__, range(len(source.rows))) if not problem.missing), None
        )
        for source in sources
    }
    return {name: not isinstance(p.reference["tests"][0], str) for name, p in first.items() if p is not None}


def _count(rows: Rows) -> int:
    return sum(map(len, rows))
