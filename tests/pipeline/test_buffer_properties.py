"""The staleness bound under adversarial schedules.

`play` drives a real `RolloutBuffer` through a random schedule: any group may finish, be dropped or be filtered at any
moment, samplers may swap weights late, the run may be cut and resumed at any version, a stage may end early, stages differ
in every setting. It plays the controller's part and asserts every promise at every event. `AdmissionByCount` is the rule many systems use
(capacity = (S + 1 + version) x P - admitted, oldest finished first); it fails the same schedules.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.pipeline.buffer import Position, RolloutBuffer, StagePlan, Ticket

NUM_SCHEDULES = 1500

plans_strategy = st.lists(
    st.builds(
        StagePlan,
        num_steps=st.integers(1, 6),
        groups_per_step=st.integers(1, 4),
        max_staleness=st.sampled_from([None, 0, 1, 2, 3, 5]),
    ),
    min_size=1,
    max_size=3,
)


@dataclasses.dataclass
class Outcome:
    trained: list[tuple[int, int]]
    """(stage, ordinal) in training order."""
    ended: Counter
    ages: list[int]
    max_alive: int
    end: Position


def play(
    plans: list[StagePlan],
    seed: int,
    *,
    drop_share: float,
    cut_share: float,
    patience: bool,
    end_share: float = 0.0,
    publish_every: int = 1,
) -> Outcome:
    """One run from start to end under a random schedule; asserts every promise on the way.

    Of a stage's versions, those that `publish_every` divides are published, and its last one.
    """
    rng = random.Random(seed)
    buffer, published = RolloutBuffer(plans), None
    running: dict[int, tuple[Ticket, int | None]] = {}
    oldest: dict[int, int | None] = {}
    trained, ages, ended, max_alive, num_events = [], [], Counter(), 0, 0
    batch: list[Ticket] = []
    newest = 0
    while not buffer.finished:
        num_events += 1
        assert num_events < 50_000, "no progress: deadlock"
        while rng.random() < 0.9 and (ticket := buffer.admit()) is not None:
            plan = plans[ticket.stage]
            # The oldest token of a group is decoded under the version held when it is admitted, at the earliest.
            running[ticket.id] = (ticket, None if plan.max_staleness is None else published)
        plan = plans[buffer.stage_of(buffer.step)]
        if plan.max_staleness is not None:
            alive = buffer.in_flight + buffer.buffered + len(batch)
            max_alive = max(max_alive, alive)
        buffer.check_accounting()
        events = ["publish"] if published != newest else []
        events += ["finish"] * 3 * bool(running) + ["take"] + (["defer"] if patience else [])
        match rng.choice(events):
            case "publish":
                published = rng.randint(published if published is not None else 0, newest)
                buffer.publish(published)
            case "finish":
                # Adversarial durations: the newest group finishes as readily as the oldest.
                id_ = rng.choice(sorted(running))
                ticket, version = running.pop(id_)
                if rng.random() < drop_share:
                    buffer.drop(ticket, rng.choice(["failed", "filtered"]))
                    ended[ticket.stage, ticket.ordinal] += 1
                else:
                    oldest[id_] = version
                    buffer.put(ticket, ticket, oldest_version=version)
            case "defer":
                buffer.defer()
            case "take":
                for ticket in buffer.take():
                    batch.append(ticket)
                    if (decoded_under := oldest[ticket.id]) is not None:
                        ages.append(buffer.step - decoded_under)
                if not buffer.num_missing:
                    stage = buffer.stage_of(buffer.step)
                    buffer.commit()
                    if rng.random() < end_share:
                        admitted, pending = buffer.position().next_ordinals, buffer.position().pending[stage]
                        ends_at, early = buffer.end_step(stage), buffer.end_early(stage)
                        if early:  # as soon as nothing is thrown away, and not sooner
                            left = (buffer.end_step(stage) - buffer.step) * plans[stage].groups_per_step
                            assert len(pending) <= left < len(pending) + plans[stage].groups_per_step
                        assert (buffer.end_step(stage) < ends_at) == early and not buffer.end_early(stage)
                        assert buffer.position().next_ordinals == admitted
                    steps = buffer.step - buffer.first_step(stage)
                    if steps % publish_every == 0 or buffer.step == buffer.end_step(stage):
                        newest = buffer.step
                    for ticket in batch:
                        trained.append((ticket.stage, ticket.ordinal))
                        ended[ticket.stage, ticket.ordinal] += 1
                    batch = []
                    if not buffer.finished and rng.random() < cut_share:  # the run dies here and is resumed
                        position = buffer.position()
                        buffer, running, published, newest = RolloutBuffer(plans, position), {}, None, position.step
    return Outcome(trained=trained, ended=ended, ages=ages, max_alive=max_alive, end=buffer.position())


@settings(max_examples=NUM_SCHEDULES, deadline=None)
@given(
    plans=plans_strategy,
    seed=st.integers(0, 2**32),
    drop_share=st.sampled_from([0.0, 0.2, 0.6]),
    cut=st.booleans(),
    end=st.booleans(),
)
def test_no_schedule_breaks_the_bound_or_loses_a_prompt(
    plans: list[StagePlan], seed: int, drop_share: float, cut: bool, end: bool
) -> None:
    outcome = play(plans, seed, drop_share=drop_share, cut_share=0.3 * cut, patience=False, end_share=0.3 * end)
    bound = max((p.max_staleness for p in plans if p.max_staleness is not None), default=0)
    assert max(outcome.ages, default=0) <= bound
    steps = Counter(stage for stage, _ in outcome.trained)
    assert steps == {
        i: n * p.groups_per_step for i, (n, p) in enumerate(zip(outcome.end.num_steps, plans, strict=True))
    }
    assert end or outcome.end.num_steps == tuple(p.num_steps for p in plans)
    # Each admitted prompt ended exactly once, and none of the first N ordinals was skipped.
    assert set(outcome.ended.values()) == {1}
    for stage in range(len(plans)):
        ordinals = sorted(ordinal for s, ordinal in outcome.ended if s == stage)
        assert ordinals == list(range(outcome.end.next_ordinals[stage]))
    capacity = (
        max((p.max_staleness + 1) * p.groups_per_step for p in plans if p.max_staleness is not None)
        if any(p.max_staleness is not None for p in plans)
        else 0
    )
    if len(plans) == 1:
        assert outcome.max_alive <= capacity


@settings(max_examples=300, deadline=None)
@given(plans=plans_strategy, seed=st.integers(0, 2**32), every=st.integers(2, 4), end=st.booleans())
def test_a_version_in_n_is_enough_where_every_stage_may_learn_from_groups_that_old(
    plans: list[StagePlan], seed: int, every: int, end: bool
) -> None:
    """N - 1 <= S. `play` fails when it makes no progress."""
    allowed = [
        dataclasses.replace(p, max_staleness=max(p.max_staleness, every - 1)) if p.max_staleness is not None else p
        for p in plans
    ]
    outcome = play(
        allowed, seed, drop_share=0.1, cut_share=0.1, patience=False, end_share=0.2 * end, publish_every=every
    )
    assert max(outcome.ages, default=0) <= max((p.max_staleness or 0 for p in allowed), default=0)
    assert set(outcome.ended.values()) == {1}


@settings(max_examples=300, deadline=None)
@given(plans=plans_strategy, seed=st.integers(0, 2**32))
def test_stragglers_may_be_overtaken_without_losing_a_prompt_or_stopping_the_run(
    plans: list[StagePlan], seed: int
) -> None:
    outcome = play(plans, seed, drop_share=0.1, cut_share=0.1, patience=True)
    assert set(outcome.ended.values()) == {1}
    assert len(outcome.trained) == sum(p.num_steps * p.groups_per_step for p in plans)


@pytest.mark.parametrize("bound", [0, 1, 2, 4])
def test_the_bound_is_reached(bound: int) -> None:
    plan = StagePlan(num_steps=8, groups_per_step=2, max_staleness=bound)
    ages = [age for seed in range(60) for age in play([plan], seed, drop_share=0.0, cut_share=0.0, patience=False).ages]
    assert max(ages) == bound


def test_without_drops_groups_train_in_the_order_they_were_admitted() -> None:
    plan = StagePlan(num_steps=5, groups_per_step=3, max_staleness=2)
    for seed in range(50):
        outcome = play([plan], seed, drop_share=0.0, cut_share=0.2, patience=False)
        steps = [sorted(outcome.trained[i : i + 3]) for i in range(0, 15, 3)]
        assert [ordinal for step in steps for _, ordinal in step] == list(range(15))


def test_admission_by_count_breaks_the_same_bound() -> None:
    """Control: capacity (S + 1 + version) P - admitted bounds how many groups were admitted, not how old one may be.

    P = 2, S = 1, group 0 is slow. While it runs, others finish and train; after n steps group 0 has age n.
    """
    groups_per_step, bound, version, admitted, finished = 2, 1, 0, 0, 0
    for _ in range(10):
        capacity = (bound + version + 1) * groups_per_step - admitted
        admitted += capacity
        finished = admitted - 1 - version * groups_per_step  # all but the straggler, minus those trained
        if finished >= groups_per_step:
            version += 1
    assert version - 0 > bound, "the straggler of version 0 would train at this age"


def make_buffer(**plan: int | None) -> RolloutBuffer:
    settings_ = {"num_steps": 3, "groups_per_step": 2, "max_staleness": 1, **plan}
    buffer = RolloutBuffer([StagePlan(**settings_)])  # type: ignore[arg-type]
    buffer.publish(0)
    return buffer


def admit(buffer: RolloutBuffer) -> Ticket:
    ticket = buffer.admit()
    assert ticket is not None
    return ticket


def test_nothing_is_admitted_before_a_sampler_proved_its_weights() -> None:
    buffer = RolloutBuffer([StagePlan(num_steps=1, groups_per_step=1, max_staleness=3)])
    assert buffer.admit() is None
    buffer.publish(0)
    assert buffer.admit() is not None


def test_s_plus_one_times_p_groups_are_admitted_and_no_more() -> None:
    buffer = make_buffer()
    tickets = [buffer.admit() for _ in range(5)]
    assert [t.ordinal for t in tickets if t] == [0, 1, 2, 3] and tickets[4] is None


def test_a_dropped_group_returns_its_slot_at_once_and_the_rest_move_up() -> None:
    buffer = make_buffer()
    tickets = [admit(buffer) for _ in range(4)]
    buffer.drop(tickets[0], "failed")
    assert admit(buffer).ordinal == 4
    for ticket in tickets[1:3]:
        buffer.put(ticket, ticket.ordinal, oldest_version=0)
    assert buffer.take() == [1, 2]


def test_a_stale_group_is_an_error_that_names_all_numbers() -> None:
    buffer = make_buffer(num_steps=9)
    for step in range(3):
        tickets = [admit(buffer), admit(buffer)]
        for ticket in tickets:
            buffer.put(ticket, ticket, oldest_version=step if step < 2 else 0)  # a sampler that lies about its version
        if step == 2:
            with pytest.raises(RuntimeError, match=r"tokens of version 0, step 2 may train on 1 or newer"):
                buffer.take()
            return
        buffer.take()
        buffer.commit()
        buffer.publish(step + 1)


def test_a_position_counts_unfinished_finished_and_not_yet_readmitted_prompts_in_order() -> None:
    start = Position(step=1, next_ordinals=(9,), pending=((3, 5, 7),), num_steps=(4,))
    buffer = RolloutBuffer([StagePlan(num_steps=4, groups_per_step=2, max_staleness=0)], start)
    buffer.publish(1)
    assert [admit(buffer).ordinal for _ in range(2)] == [3, 5]
    assert buffer.position() == start


def test_a_stage_that_ends_early_trains_what_it_admitted_and_the_next_one_is_admitted_right_behind() -> None:
    """P = 2, S = 2: after the first step three groups of it are alive, so it has two more steps, one of them to be filled
    up. The group behind that is for step 3: with version 1 published, 1 + 2 = 3 allows the next stage's first two at once."""
    plans = [StagePlan(num_steps=9, groups_per_step=2, max_staleness=2)] * 2
    buffer = RolloutBuffer(plans)
    buffer.publish(0)
    for _ in range(5):
        ticket = admit(buffer)
        buffer.put(ticket, ticket.ordinal, oldest_version=0)
    assert buffer.take() == [0, 1]
    buffer.commit()
    assert buffer.end_early(0)
    assert (buffer.first_step(0), buffer.end_step(0), buffer.first_step(1), buffer.end_step(1)) == (0, 3, 3, 12)
    buffer.publish(1)
    admitted = [(t.stage, t.ordinal) for t in iter(buffer.admit, None)]
    assert admitted == [(0, 5), (1, 0), (1, 1)]
    assert RolloutBuffer(plans, buffer.position()).end_step(0) == 3


def test_a_synchronous_stage_that_ends_early_is_over_at_once() -> None:
    buffer = RolloutBuffer([StagePlan(num_steps=9, groups_per_step=1, max_staleness=0)])
    buffer.publish(0)
    buffer.put(admit(buffer), None, oldest_version=0)
    buffer.take()
    buffer.commit()
    assert buffer.end_early(0) and buffer.finished
