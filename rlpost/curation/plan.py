"""The tables of a curation: which sources, against which evaluation sets, by which filters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from rlpost.config import DatasetData, FileData, Positive, RecipeError, Table, VerifierConfig
from rlpost.curation.filters import CODE_FILTERS, TextFilter, math_filters
from rlpost.data.adapters import defaults_of
from rlpost.recipe import explain, override_tree, read_tree

NGRAM = {"math": 9, "code": 14}
"""Words of a run, as AceReason-Nemotron has them (https://arxiv.org/abs/2505.16400)."""
EMPTY, UNUSABLE = "empty", "unusable"
NO_SOLUTION, CONTAMINATED, SAME_URL, SAME_TEXT, NEAR, WRONG_GOLD, WEAK_TESTS = (
    "no_solution", "contaminated", "same_url", "same_text", "near_duplicate", "wrong_gold", "weak_tests",
)  # fmt: skip
NOT_OF = {"math": (NO_SOLUTION, SAME_URL, WEAK_TESTS), "code": ()}
"""Filters that a task does not have. A page may hold several problems of math."""
NOT_FOR = {
    "math": ("mutants", "mutant_deadline_s", "max_survivors"),
    "code": ("min_words", "max_foreign", "max_answer_chars"),
}
"""Keys of [filters] that have no meaning for a task."""
Share = Annotated[float, Field(ge=0, le=1)]


class CurationTable(BaseModel):
    """Apart from a recipe's tables, so that neither's keys are suggested for the other's."""

    model_config = Table.model_config


POLICY_KEYS = ("chat", "max_prompt_tokens", "demonstration", "max_rejected_golds")


def _refuse_policy_keys(table: FileData) -> None:
    if given := sorted(table.model_fields_set.intersection(POLICY_KEYS)):
        raise ValueError(
            f"{', '.join(given)}: no policy reads these prompts yet, so this has no meaning here. Leave it to the recipe"
        )


class SourceConfig(DatasetData):
    """A data set as a recipe names it; `prompt` is the problem's text alone."""

    url: str | None = None
    """Column with the address of the problem."""

    @model_validator(mode="after")
    def _text_alone(self) -> SourceConfig:
        _refuse_policy_keys(self)
        return self


class AgainstConfig(FileData):
    """An evaluation set; `prompt` is the text that must not be trained on."""

    @model_validator(mode="before")
    @classmethod
    def _adapted(cls, table: Any) -> Any:
        """Of an adapter only where its data lies: no column that it makes is needed."""
        if not isinstance(table, dict) or table.get("adapter") is None:
            return table
        given = {**defaults_of(str(table["adapter"]), "dataset"), **table}
        return {name: value for name, value in given.items() if name in table or name in cls.model_fields} | {
            "adapter": None
        }

    @model_validator(mode="after")
    def _text_alone(self) -> AgainstConfig:
        _refuse_policy_keys(self)
        return self


class FiltersConfig(CurationTable):
    skip: tuple[str, ...] = ()
    """Filters that are not asked, by name."""
    ngram: Positive | None = None
    """Words of a run that no problem may share with an evaluation set; None: 9 for math, 14 for code."""
    max_stock: Annotated[int, Field(ge=0)] = 10
    """A run in more problems than this is a phrase: it counts only beside half of an evaluation problem's. 0: none is."""
    duplicate_share: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Of runs that two problems share, from which on they are the same one (Jaccard)."""
    min_words: Annotated[int, Field(ge=0)] = 4
    max_foreign: Share = 0.1
    """Share of letters that are neither Latin nor Greek."""
    max_answer_chars: Positive = 100
    mutants: Positive = 12
    """Wrong programs made of each reference solution, at most."""
    mutant_deadline_s: Annotated[float, Field(gt=0)] = 2.0
    """Of one of them, for all tests together."""
    max_survivors: Share = 0.4
    """Share of mutants that tests may pass."""


class CurationConfig(CurationTable):
    name: str
    task: Literal["math", "code"]
    seed: int = 0
    """Of the mutants."""
    source: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """In the order in which duplicates are kept."""
    against: dict[str, AgainstConfig] = {}
    filters: FiltersConfig = FiltersConfig()
    verifier: VerifierConfig = VerifierConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_task(cls, tree: Any) -> Any:
        if not (isinstance(tree, dict) and isinstance(tree.get("source"), dict)):
            return tree
        sources = {
            name: {"source": "dataset", "task": tree.get("task"), **table} if isinstance(table, dict) else table
            for name, table in tree["source"].items()
        }
        return {**tree, "source": sources}

    @model_validator(mode="after")
    def _consistent(self) -> CurationConfig:
        for name, source in self.source.items():
            if source.task != self.task:
                raise ValueError(
                    f"source.{name} has task = {source.task!r} and the curation {self.task!r}: curate it apart"
                )
        known = [name for name in self._every() if name not in (EMPTY, UNUSABLE, *NOT_OF[self.task])]
        if unknown := [name for name in self.filters.skip if name not in known]:
            raise ValueError(
                f"filters.skip names {unknown}; filters of task {self.task!r} that can be skipped: {known}"
            )
        if foreign := sorted(self.filters.model_fields_set.intersection(NOT_FOR[self.task])):
            raise ValueError(f"filters: {', '.join(foreign)} has no meaning for task = {self.task!r}: leave it out")
        return self

    @property
    def ngram(self) -> int:
        return self.filters.ngram or NGRAM[self.task]

    def asks(self, name: str) -> bool:
        return name not in self.filters.skip and name not in NOT_OF[self.task]

    def asked_texts(self) -> tuple[TextFilter, ...]:
        """The filters of texts, in their order."""
        return tuple(item for item in self._texts() if self.asks(item.name))

    def _texts(self) -> tuple[TextFilter, ...]:
        if self.task == "code":
            return CODE_FILTERS
        options = self.filters
        return math_filters(
            min_words=options.min_words, max_answer_chars=options.max_answer_chars, max_foreign=options.max_foreign
        )

    def settings(self) -> dict[str, Any]:
        """Every key that has a meaning here, as plain data."""
        of_sets = {"__all__": set(POLICY_KEYS)}
        not_for = {"source": of_sets, "against": of_sets, "filters": set(NOT_FOR[self.task])}
        return self.model_dump(mode="json", exclude_none=True, exclude=not_for)

    def definitions(self) -> dict[str, str]:
        """What each filter leaves out, in the order in which they are asked."""
        return {name: text for name, text in self._every().items() if self.asks(name)}

    def _every(self) -> dict[str, str]:
        filters = self.filters
        return {
            EMPTY: "the problem, its answer or its tests are missing, or its adapter can make nothing of it",
            NO_SOLUTION: "it has no reference solution to check its tests with",
            **{item.name: item.definition for item in self._texts()},
            CONTAMINATED: f"it shares a run of {self.ngram} words with an evaluation problem, or is one shorter than that"
            + self._stock(),
            SAME_URL: "an earlier problem has the same address",
            SAME_TEXT: "an earlier problem has the same text, but for case, white space and $",
            NEAR: f"of the runs of {self.ngram} words and signs in it or an earlier problem, at least"
            f" {filters.duplicate_share:.0%} are in both"
            + (", and the answers are equal" if self.task == "math" else ""),
            UNUSABLE: "its reference is none that a verifier can judge by",
            WRONG_GOLD: "its own verifier does not accept its answer, or its reference solution",
            WEAK_TESTS: f"more than {filters.max_survivors:.0%} of up to {filters.mutants} programs that differ from the"
            " reference solution in one place pass its tests",
        }

    def _stock(self) -> str:
        if not self.filters.max_stock:
            return ""
        return f"; a run in more than {self.filters.max_stock} problems counts only beside half of an evaluation problem's runs"


def load_curation(path: Path, overrides: Sequence[str] = ()) -> CurationConfig:
    """Read, override, validate.

    Raises:
        RecipeError: naming every wrong key at once.
    """
    try:
        return CurationConfig.model_validate(override_tree(read_tree(path, "curation"), overrides))
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    owner = {"source": FileData, "against": FileData, "verifier": Table}
    return explain(problem, owner.get(str(next(iter(problem["loc"]), "")), CurationTable))
