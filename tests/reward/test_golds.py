"""Every gold answer of the real data sets is accepted by its own verifier."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from reward import Outcome, RewardPool, TaskLimits, gold_response
from reward.mathematics import quick
from tests.reward.mutations import mutants, passes

pytestmark = pytest.mark.data


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def rejected(pool: RewardPool, task: str, records: list[dict[str, Any]]) -> dict[str, str]:
    verdicts = pool.score_many([(task, gold_response(task, record), record) for record in records])
    return {
        record["id"]: f"{verdict.outcome}: {verdict.detail}"
        for record, verdict in zip(records, verdicts, strict=True)
        if verdict.outcome is not Outcome.CORRECT
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gsm8k_train", 7473),
        ("gsm8k_test", 1319),
        ("math500", 500),
        ("math_train", 7472),
        ("aime_1983_2023", 975),
        ("aime2024", 30),
        ("amc2023", 40),
    ],
)
def test_math_golds_are_accepted_without_a_child_process(data_dir: Path, name: str, count: int) -> None:
    records = read(data_dir, name)
    assert len(records) == count
    verdicts = [quick(gold_response("math", record), record["answer"]) for record in records]
    assert {getattr(verdict, "outcome", "needs a child") for verdict in verdicts} == {Outcome.CORRECT}


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test"])
def test_gsm8k_solutions_as_written_are_accepted(data_dir: Path, name: str) -> None:
    """The solutions end in "#### n"."""
    records = read(data_dir, name)
    assert all(getattr(quick(record["solution"], record["answer"]), "reward", 0.0) == 1.0 for record in records)


@pytest.mark.parametrize(("name", "count"), [("mbpp", 974), ("mbpp_sanitized", 427), ("humaneval", 164)])
def test_reference_solutions_are_accepted(data_dir: Path, name: str, count: int) -> None:
    records = read(data_dir, name)
    assert len(records) == count
    # mbpp/123 and a few others compute for seconds.
    with RewardPool(code=TaskLimits(workers=2, deadline_s=60.0)) as pool:
        assert rejected(pool, "code", records) == {}


@pytest.mark.parametrize(("name", "every"), [("mbpp", 20), ("humaneval", 5)])
def test_mutations_are_right_exactly_where_their_tests_pass(data_dir: Path, name: str, every: int) -> None:
    """Two one-place mutations of a sample of golds; the truth by a plain interpreter. All of them: benchmarks/code_mutations.py"""
    records = read(data_dir, name)[::every]
    items = [
        (record, mutant)
        for seed, record in enumerate(records)
        for mutant in mutants(record["reference_solution"], limit=2, seed=seed)
    ]
    truths = [passes(mutant, record, limit_s=3.0) for record, mutant in items]
    assert truths.count(False) > len(items) // 2
    with RewardPool(code=TaskLimits(workers=2, deadline_s=3.0)) as pool:
        verdicts = pool.score_many([("code", f"```python\n{mutant}\n```", record) for record, mutant in items])
    wrong = [
        f"{record['id']}: {verdict.outcome} where a plain interpreter says {truth}\n{mutant}"
        for (record, mutant), truth, verdict in zip(items, truths, verdicts, strict=True)
        if verdict.reward != float(truth is True)
    ]
    assert not wrong, "\n".join(wrong)
