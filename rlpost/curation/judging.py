"""What it takes to run something: whether a problem's verifier accepts its own answer, and whether its tests notice mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from reward import Outcome, RewardPool, Verdict, check_reference, gold_response
from rlpost.curation.mutants import Mutant, mutants
from rlpost.curation.plan import UNUSABLE, WEAK_TESTS, WRONG_GOLD, CurationConfig
from rlpost.curation.problems import Problem
from rlpost.data.sources import judge_golds

MIN_MUTANTS = 4
"""Of fewer, a share says nothing."""
FIRST_TESTS = 5
SLOW_SHARE = 0.25
"""Of a mutant's deadline. Where the solution itself takes longer, a mutant can be late and right: late ones are not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What running a problem has shown; `filter` leaves it out."""

    filter: str | None = None
    detail: str = ""
    num_mutants: int | None = None
    """None: its tests were not asked."""
    num_survivors: int | None = None


@dataclass(slots=True)
class MutantCount:
    """Over all problems that were asked."""

    problems: int = 0
    not_asked: int = 0
    made: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, str]:
        kinds = {kind: f"{self.survived[kind]:,} of {count:,} survived" for kind, count in self.made.most_common()}
        return {"problems": f"{self.problems:,}", "not asked": f"{self.not_asked:,}", **kinds}


class Judge:
    """Verifiers for both questions, as processes of their own until it is closed."""

    def __init__(self, config: CurationConfig) -> None:
        self._config = config
        self.mutants = MutantCount()
        table: dict[str, Any] = config.verifier.model_dump() | {"regrade_share": 0.0}
        self._pool = RewardPool.from_table(table)
        hasty = table | {"code": table["code"] | {"deadline_s": config.filters.mutant_deadline_s}}
        self._hasty_pool = RewardPool.from_table(hasty)

    def judge(self, problems: Sequence[Problem]) -> list[Judged]:
        """One for each problem."""
        config = self._config
        judged: list[Judged | None] = [None] * len(problems)
        for index, problem in enumerate(problems):
            try:
                check_reference(config.task, problem.reference)
            except ValueError as error:
                judged[index] = Judged(filter=UNUSABLE, detail=str(error))
        usable = [index for index, item in enumerate(judged) if item is None]
        golds = judge_golds([(config.task, problems[index].reference) for index in usable], self._pool)
        for index, gold in zip(usable, golds, strict=True):
            if gold is not None and gold.outcome is not Outcome.CORRECT and config.asks(WRONG_GOLD):
                judged[index] = Judged(filter=WRONG_GOLD, detail=f"{gold.outcome.value}: {gold.detail}")
            elif config.asks(WEAK_TESTS):
                judged[index] = self._mutated(problems[index], gold)
        return [item or Judged() for item in judged]

    def _mutated(self, problem: Problem, gold: Verdict | None) -> Judged:
        options = self._config.filters
        if gold is None or gold.outcome is not Outcome.CORRECT:
            self.mutants.not_asked += 1
            return Judged()
        solution, seed = problem.reference["reference_solution"], f"{self._config.seed}/{problem.id}"
        made = mutants(solution, limit=options.mutants, seed=seed, script=problem.is_script)
        # Most fail at once, so all the tests are for those that pass the first ones.
        first = {**problem.reference, "tests": problem.reference["tests"][:FIRST_TESTS]}
        made, survivors = self._put_to(first, made, self._hasty_pool, options.mutant_deadline_s, gold)
        if len(problem.reference["tests"]) > FIRST_TESTS:
            wrong = [mutant for mutant in made if mutant not in survivors]
            deadline_s = self._config.verifier.code.deadline_s
            judged, survivors = self._put_to(problem.reference, survivors, self._pool, deadline_s, gold)
            made = wrong + judged
        if len(made) < MIN_MUTANTS:
            self.mutants.not_asked += 1
            return Judged()
        self.mutants.problems += 1
        self.mutants.made.update(mutant.kind for mutant in made)
        self.mutants.survived.update(mutant.kind for mutant in survivors)
        weak = len(survivors) > options.max_survivors * len(made)
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(m.kind for m in survivors).most_common())
        return Judged(
            filter=WEAK_TESTS if weak else None,
            detail=f"{len(survivors)} of {len(made)} mutants pass ({kinds})",
            num_mutants=len(made),
            num_survivors=len(survivors),
        )

    def _put_to(
        self, reference: Mapping[str, Any], made: list[Mutant], pool: RewardPool, deadline_s: float, gold: Verdict
    ) -> tuple[list[Mutant], list[Mutant]]:
        """Those that could be judged, and of these those that pass."""
        items = [("code", gold_response("code", {"reference_solution": mutant.source}), reference) for mutant in made]
        silent = {Outcome.VERIFIER_ERROR} | ({Outcome.TIMEOUT} if gold.seconds > SLOW_SHARE * deadline_s else set())
        outcomes = [
            (m, v.outcome) for m, v in zip(made, pool.score_many(items), strict=True) if v.outcome not in silent
        ]
        return [m for m, _ in outcomes], [m for m, outcome in outcomes if outcome is Outcome.CORRECT]

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()
        self._hasty_pool.close()
