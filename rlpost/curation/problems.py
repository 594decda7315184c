"""The problems of a source, by row, as the verifiers know them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from rlpost.config import RecipeError
from rlpost.curation.plan import SourceConfig
from rlpost.data.sources import PLACEHOLDER, fill, local_file, read_rows, reference_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row of a source.

    Example:
        Problem(id="numina/7", source="numina", row=7, text="What is $2+2$?", reference={"answer": "4"}, url=None)
    """

    id: str
    source: str
    row: int
    text: str
    reference: Mapping[str, Any]
    """As verifiers take it."""
    url: str | None
    missing: str = ""
    """Columns without a value, of those that are needed, or an adapter's reason: then there is no reference."""

    @property
    def answer(self) -> str:
        return str(self.reference.get("answer", ""))

    @property
    def is_script(self) -> bool:
        """Its tests are standard input and output."""
        return isinstance(self.reference["tests"][0], Mapping) and not self.reference["entry_point"]


def qualified(name: str, row: Mapping[str, Any], index: int) -> str:
    """The row's own id, or its number, after the name of its data set."""
    own = str(row.get("id") or row.get("task_id") or index)
    return own if own.startswith(f"{name}/") else f"{name}/{own}"


@dataclass(slots=True)
class Source:
    """A data set; its rows stay where `datasets` has mapped them."""

    name: str
    config: SourceConfig
    rows: Any
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    """Of what `all` has read."""

    @classmethod
    def open(cls, name: str, config: SourceConfig) -> Source:
        """Raises RecipeError, naming the file or the columns that are missing."""
        named = (config.answer, config.tests, config.setup, config.solution, config.entry_point, config.url)
        try:
            rows = read_rows(config, columns=named)
        except RecipeError as error:
            raise RecipeError(f"source.{name}: {error}") from error
        return cls(name, config, rows)

    def all(self) -> Iterator[Problem]:
        """Every problem, in order; the digest is of all of them afterwards."""
        for index, row in enumerate(islice(self.rows, self.config.max_prompts)):
            self.digest.update(repr(row).encode(errors="surrogatepass"))
            yield self._problem(index, row)

    def __getitem__(self, index: int) -> Problem:
        return self._problem(index, self.rows[index])

    def facts(self) -> dict[str, str]:
        """Where it came from and what it was, for the card."""
        path = local_file(self.config)
        return (
            {"path": self.config.path}
            | ({"split": self.config.split} if path is None else {"sha256": sha256(path)})
            | {"rows_xxh3": self.digest.hexdigest()}
        )

    def _problem(self, index: int, row: Mapping[str, Any]) -> Problem:
        config = self.config
        asked = [name for name in PLACEHOLDER.findall(config.prompt) if row.get(name) is None]
        judged = [name for name in (config.answer, config.tests) if name and _is_blank(row.get(name))]
        missing = row.get("left_out") or ", ".join(dict.fromkeys((*asked, *judged)))
        text = "" if missing else fill(config.prompt, row)
        if not missing and not text.strip():
            missing = config.prompt
        return Problem(
            id=qualified(self.name, row, index),
            source=self.name,
            row=index,
            text=text,
            reference={} if missing else reference_of(row, config),
            url=row[config.url] if config.url else None,
            missing=missing,
        )


def _is_blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
