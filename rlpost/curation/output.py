"""The curated problems as one parquet file, whose columns are the same whatever the sources'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow
import pyarrow.parquet

from rlpost.config import RecipeError
from rlpost.curation.judging import Judged
from rlpost.curation.problems import Problem


class ProblemWriter:
    """Writes problems as they come.

    Columns: id, source, problem, url; for math answer; for code tests, setup, entry_point, solution, mutants, survivors.
    """

    def __init__(self, path: Path, *, task: str, script_tests: bool) -> None:
        test = (
            pyarrow.struct({"input": pyarrow.string(), "output": pyarrow.string()})
            if script_tests
            else pyarrow.string()
        )
        names = (
            "id",
            "source",
            "problem",
            "url",
            *(("answer",) if task == "math" else ("setup", "entry_point", "solution")),
        )
        fields = [pyarrow.field(name, pyarrow.string()) for name in names]
        if task == "code":
            fields += [pyarrow.field("tests", pyarrow.list_(test))]
            fields += [pyarrow.field(name, pyarrow.int32()) for name in ("mutants", "survivors")]
        self._task = task
        self._schema = pyarrow.schema(fields)
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, problems: Sequence[tuple[Problem, Judged]]) -> None:
        rows = [_row(problem, judged, self._task) for problem, judged in problems]
        self._writer.write_table(pyarrow.Table.from_pylist(rows, self._schema))

    def __enter__(self) -> ProblemWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def has_script_tests(kinds: Mapping[str, bool]) -> bool:
    """Whether tests are inputs and outputs, from what each source says of its own.

    Raises:
        RecipeError: sources differ.
    """
    if len(set(kinds.values())) > 1:
        pairs = [name for name, of_pairs in kinds.items() if of_pairs]
        raise RecipeError(
            f"source {pairs} has tests of inputs and outputs and {sorted(set(kinds) - set(pairs))} has snippets, which"
            " do not fit in one column: curate them apart"
        )
    return any(kinds.values())


def _row(problem: Problem, judged: Judged, task: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": problem.id, "source": problem.source, "problem": problem.text, "url": problem.url}
    reference = problem.reference
    if task == "math":
        return row | {"answer": reference["answer"]}
    row |= {"tests": reference["tests"], "setup": reference["setup"], "entry_point": reference["entry_point"]}
    row |= {"solution": reference.get("reference_solution")}
    return row | {"mutants": judged.num_mutants, "survivors": judged.num_survivors}
