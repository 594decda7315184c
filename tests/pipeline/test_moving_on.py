"""Stages that end before their last planned step: the rules by hand, and on the plain pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from rlpost.pipeline.evaluation import EvalSet
from rlpost.pipeline.moving_on import HOURS, REWARD, TOKENS, History, Plateau, Until, has_settled, moves_on
from tests.pipeline.conftest import PROMPTS, Run, make_stage

MakeRun = Callable[..., Run]


def first_settled(values: list[float], plateau: Plateau) -> int | None:
    return next((n for n in range(len(values) + 1) if has_settled(values[:n], plateau)), None)


def test_a_figure_has_settled_when_its_last_values_bring_no_gain_on_the_best_before() -> None:
    """Best before the last two: of five 0.61, of six 0.61, of seven 0.62. 0.63 is a gain of 0.02, 0.64 none on it."""
    plateau = Plateau(figure="eval/math/accuracy", mean_over=1, without_gain=2, min_gain=0.02)
    assert not has_settled([], plateau) and not has_settled([0.6, 0.5], plateau), "nothing was before"
    assert first_settled([0.50, 0.61, 0.60, 0.62], plateau) == 4
    assert first_settled([0.50, 0.61, 0.60, 0.64, 0.65, 0.66], plateau) is None
    assert first_settled([0.50, 0.61, 0.60, 0.64, 0.65, 0.65, 0.6], plateau) == 6


def test_means_over_a_noisy_figure_do_not_overlap() -> None:
    """Means over 2: 0.5, 0.5 and then, of the values 1 and 0, 0.5 again: a last odd value is in no mean yet."""
    plateau = Plateau(figure=REWARD, mean_over=2, without_gain=2, min_gain=0.1)
    assert first_settled([0, 1, 1, 0, 1, 0, 1], plateau) == 6
    assert first_settled([0, 1, 1, 0, 1, 1, 1, 1], plateau) is None


def test_a_budget_is_of_the_stage_alone_and_begins_again_where_a_run_goes_on() -> None:
    history = History.of(
        [
            {"step": step, "timing_s/step": 1800.0, "perf/tokens_per_s": 1 / 18, "reward/mean": 0.1 * step}
            for step in (1, 2, 3, 4)
        ],
        [{"step": step, "eval": "math", "accuracy": 0.1 * step} for step in (0, 2, 4, 4)],
    )
    figures = history.since(2)
    assert figures == {TOKENS: [100, 100], HOURS: [0.5, 0.5], REWARD: [0.1 * 3, 0.4], "eval/math/accuracy": [0.2, 0.4]}
    assert moves_on(figures, Until(tokens=201, hours=1.1)) is None
    assert moves_on(figures, Until(tokens=200)) == "200 response tokens are trained on, of 200"
    assert moves_on(figures, Until(hours=1.0)) == "it took 1.00 hours, of 1"
    assert moves_on({}, Until(plateau=Plateau(figure=REWARD, mean_over=1, without_gain=1, min_gain=0.1))) is None


def ends_after(num_tokens: int, **settings: Any) -> Any:
    return dataclasses.replace(make_stage(**settings), until=Until(tokens=num_tokens))


def rows_of(run: Run, stage: str) -> list[Any]:
    return [row for row in run.tracker.of("step") if row["stage"] == stage]


def tokens_of(rows: list[Any]) -> list[int]:
    return [round(row["perf/tokens_per_s"] * row["timing_s/step"]) for row in rows]


def test_a_synchronous_stage_ends_with_the_step_that_reaches_its_budget(make_run: MakeRun) -> None:
    """What it learned is what the first steps of the whole stage learn: the learning rate falls as planned."""
    planned = make_stage("a", staleness=0, steps=6, lr_schedule="linear")
    budget = sum(tokens_of(make_run([planned]).start().tracker.of("step"))[:3])
    stages = [dataclasses.replace(planned, until=Until(tokens=budget)), make_stage("b", staleness=0, steps=2)]
    run = make_run(stages).start()
    (event,) = run.tracker.events("stage_moves_on")
    assert (event["stage"], event["step"], event["last"]) == ("a", 3, 3)
    assert [(row["stage"], row["step"]) for row in run.tracker.of("step")] == [(s, i) for i, s in enumerate("aaabb", 1)]
    assert run.losses()[:3] == make_run([planned]).start().losses()[:3]
    assert [row["actor/lr"] for row in rows_of(run, "a")] == pytest.approx([1e-3, 1e-3 * 5 / 6, 1e-3 * 4 / 6])
    assert run.checkpoints.exported == ["a", "b"]


def test_a_stage_that_ends_early_trains_every_group_it_admitted_and_nobody_waits(make_run: MakeRun) -> None:
    stages = [ends_after(1, name="a", staleness=2, steps=9), make_stage("b", staleness=2, steps=3)]
    run = make_run(stages, log_groups=3)
    admit, open_tickets = run.controller.buffer.admit, []

    def spy() -> Any:
        ticket = admit()
        if ticket is not None:
            open_tickets.append((ticket.stage, run.controller.buffer.step))
        return ticket

    run.controller.buffer.admit = spy
    run.start()
    (event,) = run.tracker.events("stage_moves_on")
    last = event["last"]
    assert event["step"] == 1 and 1 < last <= 3, "one step is done, and those of S = 2 further ones are admitted"
    assert [row["stage"] for row in run.tracker.of("step")] == ["a"] * last + ["b"] * 3
    counts = run.controller.buffer.counts
    assert counts["admitted"] == counts["trained"] == 3 * (last + 3)
    assert min(step for stage, step in open_tickets if stage == 1) < last, "admitted before the stage before it ended"
    assert all(row["staleness/group_max"] <= 2 for row in run.tracker.of("step"))


@pytest.mark.parametrize("staleness", [0, None])
def test_a_run_that_goes_on_between_decision_and_end_is_the_whole_run_bit_for_bit(
    make_run: MakeRun, staleness: int | None
) -> None:
    """And one that goes on before the decision: what the stage has come to is read from the rows."""
    stages = [ends_after(1, name="a", staleness=staleness, steps=9), make_stage("b", staleness=0, steps=2)]
    lone = make_run(stages).start()
    stages[0] = ends_after(sum(tokens_of(rows_of(lone, "a")[:1])) + 1, name="a", staleness=staleness, steps=9)
    whole = make_run(stages, checkpoint_every=1).start()
    (event,) = whole.tracker.events("stage_moves_on")
    assert (event["step"], event["last"]) == ((2, 2) if staleness == 0 else (2, 3))
    for step in (1, 2, 3):
        position = next(p for p in whole.checkpoints.written if p.step == step)
        assert position.num_steps == ((9 if step == 1 else event["last"]), 2)
        resumed = make_run(
            stages,
            start=position,
            load_from=whole.checkpoints.path(step),
            history=History.of([row for row in whole.tracker.of("step") if row["step"] <= step], ()),
        ).start()
        assert resumed.losses() == whole.losses()[step:] and resumed.digest == whole.digest
        assert [e["last"] for e in resumed.tracker.events("stage_moves_on")] == [event["last"]] * (step == 1)


def test_a_stage_ends_when_its_reward_has_settled_and_evaluations_are_noted_too(make_run: MakeRun) -> None:
    """A gain of 2 is out of reach: two of its steps after the first, whatever the stage before has come to."""
    sets = [EvalSet(name="held-out", prompts=PROMPTS[:4], num_samples=2, temperature=1.0, max_tokens=4)]
    plateau = Plateau(figure=REWARD, mean_over=1, without_gain=2, min_gain=2.0)
    stages = [make_stage("a", staleness=0, steps=2), make_stage("b", staleness=0, steps=6)]
    run = make_run([stages[0], dataclasses.replace(stages[1], until=Until(plateau=plateau))], eval_sets=sets).start()
    assert [row["stage"] for row in run.tracker.of("step")] == list("aabbb")
    assert [event["reason"] for event in run.tracker.events("stage_moves_on")] == [
        "the last 2 values of reward/mean brought no gain of 2"
    ]
    noted = History.of(run.tracker.of("step"), run.tracker.of("eval")).since(0)
    ours = run.controller._history.since(0)
    assert {**ours, HOURS: None} == {**noted, HOURS: None} and len(ours["eval/held-out/accuracy"]) == 3
