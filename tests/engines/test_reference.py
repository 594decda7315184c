"""What the reference said of a response is asked once, and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlpost.core.preference import Preference
from rlpost.engines.reference import Reference
from tests.engines.learner_jobs import FULL, LORA, PLAIN, PLAIN_LORA, SPEC, Job, Kind, run, run_in_children

RECURRING = replace(SPEC, objective=Preference(beta=0.5), responses_recur=True)


class Counting:
    """Scores a token by ten times itself plus its predecessor, over the temperature; counts the rows it is shown."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, ids_BT: Tensor, lengths_B: Tensor, mask_BT: Tensor, temperatures_B: Tensor) -> Any:
        self.rows.append(len(ids_BT))
        logprobs_BT = torch.where(mask_BT, 10.0 * ids_BT + ids_BT.roll(1, 1), 0.0) / temperatures_B[:, None]
        return logprobs_BT, logprobs_BT


def batch(
    *rows: tuple[list[int], int], width: int, padding: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of (token ids, tokens of the prompt), padded to `width` with `padding`."""
    ids_BT = torch.tensor([ids + [padding] * (width - len(ids)) for ids, _ in rows])
    lengths_B = torch.tensor([len(ids) for ids, _ in rows])
    at_T = torch.arange(width)
    mask_BT = torch.stack([(n <= at_T) & (at_T < len(ids)) for ids, n in rows])
    return ids_BT, lengths_B, mask_BT, torch.full((len(rows),), temperature)


def test_a_response_is_scored_once_whatever_it_is_batched_with() -> None:
    score = Counting()
    reference = Reference(score, remember=True)
    first, second, third = ([1, 2, 3], 1), ([1, 4, 5, 6], 2), ([7, 8], 1)
    assert reference(*batch(first, second, width=4, padding=0)).tolist() == [[0, 21, 32, 0], [0, 0, 54, 65]]
    assert reference(*batch(second, third, first, width=6, padding=9)).tolist() == [
        [0, 0, 54, 65, 0, 0],
        [0, 87, 0, 0, 0, 0],
        [0, 21, 32, 0, 0, 0],
    ]
    assert reference(*batch(third, width=2, padding=0)).tolist() == [[0, 87]]
    assert score.rows == [2, 1]


def test_the_same_tokens_after_another_prompt_are_another_response() -> None:
    reference = Reference(Counting(), remember=True)
    for num_prompt, expected in ((1, [0, 21, 32]), (2, [0, 0, 32]), (1, [0, 21, 32])):
        assert reference(*batch(([1, 2, 3], num_prompt), width=3, padding=0))[0].tolist() == expected


def test_the_same_tokens_at_another_temperature_are_another_response() -> None:
    reference = Reference(Counting(), remember=True)
    for temperature, expected in ((1.0, [0, 21]), (0.5, [0, 42]), (1.0, [0, 21])):
        asked = batch(([1, 2], 1), width=2, padding=0, temperature=temperature)
        assert reference(*asked)[0].tolist() == expected


def test_sampled_responses_are_not_remembered() -> None:
    score = Counting()
    reference = Reference(score, remember=False)
    for _ in range(2):
        reference(*batch(([1, 2], 1), width=2, padding=0))
    assert score.rows == [1, 1]


def test_every_rank_calls_as_often() -> None:
    """With ZeRO-3 a rank that knows all must still take its part in gathering the weights."""
    score = Counting()
    reference = Reference(score, remember=True, collective=True)
    for _ in range(3):
        assert reference(*batch(([1, 2], 1), ([3, 4], 1), width=2, padding=0)).tolist() == [[0, 21], [0, 43]]
    assert score.rows == [2, 1, 1]


@pytest.mark.parametrize("kind", [PLAIN, PLAIN_LORA], ids=str)
def test_remembering_changes_no_bit_of_the_plain_learner(kind: Kind, tied_model: Path) -> None:
    """It scores every unit alone, so a unit always comes in the same company."""
    job = Job(kind, tied_model, spec=RECURRING, cuts=(6,), lr=1e-2)
    remembered, asked = run(job), run(replace(job, spec=replace(RECURRING, responses_recur=False)))
    assert remembered.norms == asked.norms and torch.equal(remembered.moved, asked.moved)
    assert len(set(asked.norms)) == 3


@pytest.mark.engines
def test_two_ranks_remember_apart_and_agree(tied_model: Path) -> None:
    """Each pair alone goes to the first rank; of both together one goes to the second, which has not seen it. ZeRO-3
    without a copy would hang if the first then left it alone."""
    kinds = [FULL[0], replace(FULL[2], lora=LORA)]
    rows = (0, 1, 2, 3, 0, 1, 2, 3)
    jobs = [Job(kind, tied_model, spec=RECURRING, rows=rows, cuts=(2, 4), lr=1e-2) for kind in kinds]
    asked = [replace(job, spec=replace(RECURRING, responses_recur=False)) for job in jobs]
    results = run_in_children([*jobs, *asked], world_size=2)[0]
    for remembered, expected in zip(results[:2], results[2:], strict=True):
        assert remembered.norms == pytest.approx(expected.norms, rel=1e-5)
        assert (remembered.moved - expected.moved).norm() < 1e-4 * expected.moved.norm()
