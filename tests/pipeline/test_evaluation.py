"""What evaluations come to, and how they go on beside training: on its samplers, and on samplers of their own."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from rlpost.engines.plain_sampler import PlainSampler
from rlpost.pipeline.buffer import Position
from rlpost.pipeline.evaluation import EvalSet, Sample, difference, figures, scores_after_stages
from rlpost.pipeline.fleet import Limits
from rlpost.pipeline.ports import WorkerLost
from rlpost.types import Prompt
from rlpost.workers.local import LocalSampler
from tests.pipeline.conftest import PROMPTS, Run, make_stage
from tests.test_tracking import documented

MakeRun = Callable[..., Run]


def held_out(*, samples: int = 3, every: int | None = None) -> EvalSet:
    def vote(prompt: Prompt, response: str) -> str:
        return response

    return EvalSet(
        name="held-out",
        prompts=PROMPTS[:4],
        num_samples=samples,
        temperature=1.0,
        max_tokens=4,
        every=every,
        vote=vote,
    )


class Evaluator:
    """Answers once it may, and dies instead the first few times."""

    def __init__(
        self, inner: LocalSampler, may: Callable[[], bool], deaths: int = 0, asked: Callable[..., None] = lambda _: None
    ) -> None:
        self.inner, self.name, self.may, self.deaths, self.asked = inner, inner.name, may, deaths, asked

    async def sample(self, request: Any) -> Any:
        while not self.may():
            await asyncio.sleep(0.005)
        if self.deaths:
            raise WorkerLost(self.name, f"sampling of {request.prompt.id}", "killed by the test")
        self.asked(await self.inner.held())
        return await self.inner.sample(request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def small(name: str = "rl", *, steps: int, **settings: Any) -> Any:
    return make_stage(name, steps=steps, prompts=2, group_size=2, max_tokens=3, **settings)


def evaluators_are(make: Callable[[LocalSampler], Any]) -> Callable[[LocalSampler], Any]:
    return lambda sampler: make(sampler) if sampler.name.startswith("evaluator") else sampler


def finish(run: Run) -> Run:
    asyncio.run(asyncio.wait_for(run.controller.run(), 60))
    return run


def judged(run: Run) -> list[tuple[str, int]]:
    return [(row["when"], row["step"]) for row in run.tracker.of("eval")]


# -- figures -----------------------------------------------------------------------------------------------------------


def make_samples(*answers: str) -> list[Sample]:
    """Samples of a problem whose answer is 7; "-" states none, and is cut off."""
    return [
        Sample(
            number=number,
            outcome="correct" if answer == "7" else "no_answer" if answer == "-" else "wrong",
            answer=None if answer == "-" else answer,
            num_tokens=10 * (number + 1),
            finish_reason="length" if answer == "-" else "stop",
            response=f"so {answer}",
        )
        for number, answer in enumerate(answers)
    ]


def test_figures_by_hand() -> None:
    """p has 2 of 4 right, q 1 of 4. pass@2: 1 - 1/6 and 1 - 3/6. maj@4: p has 7 twice and 3 once, q has 1 three times."""
    samples = {"p": make_samples("7", "7", "3", "-"), "q": make_samples("1", "7", "1", "1")}
    assert figures(held_out(samples=4), samples) == {
        "accuracy": 0.375,
        "accuracy_se": pytest.approx(0.125),
        "num_prompts": 2,
        "num_samples": 4,
        "temperature": 1.0,
        "outcomes": {"correct": 3, "wrong": 4, "no_answer": 1},
        "response_length_mean": 25.0,
        "truncated_share": 1 / 8,
        "pass_at": {
            2: pytest.approx({"mean": 2 / 3, "se": 1 / 6}),
            4: {"mean": 1.0, "se": 0.0},
        },
        "majority_at": {4: pytest.approx({"mean": 0.5, "se": 0.5})},
    }


def test_there_is_no_best_of_one_and_no_majority_of_two_or_of_programs() -> None:
    def keys(*answers: str) -> set[str]:
        samples = {prompt: make_samples(*answers) for prompt in "pq"}
        return figures(held_out(samples=len(answers)), samples).keys() & {"pass_at", "majority_at"}

    assert keys("7") == set() and keys("7", "1") == {"pass_at"} == keys("-", "-", "-")


def test_a_difference_is_of_the_same_problems_one_by_one() -> None:
    """Gains of 0.5 and 0.25: their mean varies by half of their distance, where unpaired scores would vary by more."""
    before, after = {"p": 0.5, "q": 0.0}, {"p": 1.0, "q": 0.25}
    assert difference(before, after) == pytest.approx({"mean": 0.375, "se": 0.125})
    assert difference(before, {"p": 1.0}) is None and difference({}, after) is None


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_evaluators", [0, 2])
def test_every_sample_is_kept_and_a_row_says_what_they_come_to(make_run: MakeRun, num_evaluators: int) -> None:
    """Gains are since version 0 and since the last stage's end, by scores counted anew from the samples."""
    eval_set, stages = held_out(every=2), [small("a", steps=3, lr=1e-2), small("b", steps=3, lr=1e-2)]
    run = finish(make_run(stages, eval_sets=[eval_set], num_evaluators=num_evaluators))
    rows, samples = run.tracker.of("eval"), run.tracker.of("eval_sample")
    assert {("start", 0), ("a", 3), ("b", 6)} <= set(judged(run)) and judged(run) == sorted(
        judged(run), key=lambda j: j[1]
    )
    scores: dict[int, dict[str, float]] = {}
    for row in rows:
        of_row = [sample for sample in samples if (sample["when"], sample["step"]) == (row["when"], row["step"])]
        asked = [(sample["prompt_id"], sample["number"]) for sample in of_row]
        assert asked == [(prompt.id, number) for prompt in eval_set.prompts for number in range(3)]
        right = [sample["outcome"] == "correct" for sample in of_row]
        assert row["accuracy"] == sum(right) / 12 and row["pass_at"][3]["mean"] >= row["accuracy"]
        scores[row["step"]] = {PROMPTS[i].id: sum(right[3 * i : 3 * i + 3]) / 3 for i in range(4)}
        since = {"since_start": 0, "since_stage": 0 if row["step"] <= 3 else 3} if row["step"] else {}
        assert {key: row.get(key) for key in ("since_start", "since_stage")} == {
            key: difference(scores[since[key]], scores[row["step"]]) if since else None
            for key in ("since_start", "since_stage")
        }
    assert scores_after_stages(samples) == {"held-out": {step: scores[step] for step in (0, 3, 6)}}
    assert {key for row in rows for key in row} | {"time"} == set(documented("eval.jsonl"))
    assert {key for row in samples for key in row} | {"time"} == set(documented("eval_samples.jsonl"))


def test_evaluators_find_what_shared_samplers_find_and_change_nothing_that_is_learned(make_run: MakeRun) -> None:
    stages = [small("a", staleness=0, steps=3), small("b", staleness=None, steps=2)]
    alone = finish(make_run(stages))
    shared = finish(make_run(stages, eval_sets=[held_out()]))
    own = finish(make_run(stages, eval_sets=[held_out()], num_evaluators=1))
    assert own.tracker.of("eval") == shared.tracker.of("eval") and judged(own) == [("start", 0), ("a", 3), ("b", 5)]
    assert own.tracker.of("eval_sample") == shared.tracker.of("eval_sample")
    assert own.digest == alone.digest and own.losses() == shared.losses()


def test_training_waits_for_no_evaluation_of_evaluators(make_run: MakeRun) -> None:
    """That of the start ends when training is at its last step; what falls due meanwhile is left out, and named."""
    may = evaluators_are(lambda sampler: Evaluator(sampler, lambda: run.controller.buffer.step >= 5))
    stages = [small(staleness=1, steps=6)]
    run = make_run(stages, eval_sets=[held_out(every=2)], num_evaluators=1, wrap_sampler=may)
    finish(run)
    assert judged(run) == [("start", 0), ("rl", 6)]
    skipped = [(event["step"], event["running"]) for event in run.tracker.events("evaluation_skipped")]
    assert skipped == [(2, 0), (4, 0)]
    rows = run.tracker.of("step")
    assert rows[4]["publish/version"] >= 3 and all(row["timing_s/evaluation"] == 0 for row in rows)
    assert "time/evaluator-0/generate" in rows[-1]


def test_a_lost_evaluator_is_replaced_by_one_that_holds_the_version_it_judged(
    make_run: MakeRun, tiny_model: Path
) -> None:
    """The only one, lost when the learner is two versions on; what it then finds is what it would have found."""
    held: list[int | None] = []

    def may() -> bool:
        return run.controller.buffer.step >= 2

    def evaluator(sampler: LocalSampler, deaths: int = 1) -> Evaluator:
        return Evaluator(sampler, may, deaths, held.append)

    async def restart(dead: Any) -> Evaluator:
        return evaluator(LocalSampler(dead.name, PlainSampler(tiny_model)), deaths=0)

    stages = [small("a", staleness=0, steps=2), small("b", staleness=0, steps=2)]
    undisturbed = finish(make_run(stages, eval_sets=[held_out()]))
    dying: dict[str, Any] = {"num_evaluators": 1, "wrap_sampler": evaluators_are(evaluator), "restart": restart}
    run = make_run(stages, eval_sets=[held_out()], **dying)
    finish(run)
    assert held == [0] * 4 + [2] * 4 + [4] * 4
    assert run.tracker.of("eval_sample") == undisturbed.tracker.of("eval_sample")
    (lost,) = run.tracker.events("sampler_lost")
    assert lost["worker"] == "evaluator-0"


def test_as_many_prompts_are_asked_as_evaluators_decode_twice_over(make_run: MakeRun) -> None:
    """3 rollouts at once, twice over, are 2 prompts of 3 samples: the queue of no request grows with the set."""
    asked: list[int] = []

    class Counting(Evaluator):
        async def sample(self, request: Any) -> Any:
            asked.append(1)
            await asyncio.sleep(0.01)
            try:
                return await super().sample(request)
            finally:
                asked.append(-1)

    counted = evaluators_are(lambda sampler: Counting(sampler, lambda: True))
    finish(make_run([small(steps=1)], eval_sets=[held_out()], num_evaluators=1, wrap_sampler=counted, max_num_seqs=3))
    assert max(accumulate(asked)) == 2 and asked.count(1) == 2 * 4


def test_evaluators_that_keep_dying_end_the_run_with_their_name(make_run: MakeRun) -> None:
    async def restart(dead: Any) -> Any:
        return dead

    dying = evaluators_are(lambda sampler: Evaluator(sampler, lambda: True, deaths=1))
    settings: dict[str, Any] = {"restart": restart, "limits": Limits(max_restarts=1), "wrap_sampler": dying}
    run = make_run([small(steps=2)], eval_sets=[held_out()], num_evaluators=2, **settings)
    with pytest.raises(WorkerLost, match=r"evaluator-\d was lost during sampling of"):
        finish(run)


def test_a_sample_of_another_version_ends_the_run(make_run: MakeRun) -> None:
    class Ahead(Evaluator):
        async def sample(self, request: Any) -> Any:
            handle, summary = await super().sample(request)
            return handle, dataclasses.replace(summary, newest_version=summary.newest_version + 1)

    ahead = evaluators_are(lambda sampler: Ahead(sampler, lambda: True))
    run = make_run([small(steps=2)], eval_sets=[held_out()], num_evaluators=1, wrap_sampler=ahead)
    with pytest.raises(RuntimeError, match=r"prompt-\d was to be judged of version 0, not of \{0, 1\}"):
        finish(run)


# -- checkpoints and resumes -------------------------------------------------------------------------------------------


def test_a_checkpoint_waits_for_evaluations_that_would_not_be_made_again(make_run: MakeRun) -> None:
    """Those of the start and of stages; that of step 2 ends when that of stage a has long waited for its turn."""
    started: set[int | None] = set()
    held_up = evaluators_are(
        lambda sampler: Evaluator(
            sampler, lambda: 2 not in started or run.controller.buffer.step >= 5, asked=started.add
        )
    )
    stages = [small("a", staleness=0, steps=4), small("b", staleness=0, steps=2)]
    run = make_run(stages, eval_sets=[held_out(every=1)], num_evaluators=1, wrap_sampler=held_up, checkpoint_every=1)
    written: dict[int, list[tuple[str, int]]] = {}
    write = run.checkpoints.write

    async def spy(position: Position, learner: Any) -> None:
        written[position.step] = judged(run)
        await write(position, learner)

    run.checkpoints.write = spy  # type: ignore[method-assign]
    finish(run)
    assert [written[step] for step in (1, 2, 3, 4)] == [[("start", 0)]] * 4, "version 2 was being judged"
    assert written[5] == [("start", 0), ("step", 2), ("a", 4)]


def scores_up_to(run: Run, step: int) -> Mapping[str, Any]:
    return scores_after_stages(row for row in run.tracker.of("eval_sample") if row["step"] < step)


@pytest.mark.parametrize("num_evaluators", [0, 1])
def test_a_resumed_run_compares_with_what_was_evaluated_before(make_run: MakeRun, num_evaluators: int) -> None:
    """From within the second stage: its rows are those of the whole run, and one of the version it resumed at."""
    stages = [small("a", staleness=0, steps=2), small("b", staleness=0, steps=4)]
    settings: dict[str, Any] = {"eval_sets": [held_out()], "num_evaluators": num_evaluators}
    whole = finish(make_run(stages, checkpoint_every=3, **settings))
    (start,) = [position for position in whole.checkpoints.written if position.step == 3]
    load_from = whole.checkpoints.path(3)
    resumed = finish(make_run(stages, start=start, load_from=load_from, evaluated=scores_up_to(whole, 3), **settings))
    assert judged(resumed) == [("resume", 3), ("b", 6)]
    assert resumed.tracker.of("eval")[1] == whole.tracker.of("eval")[2]
    assert {"since_start", "since_stage"} <= resumed.tracker.of("eval")[0].keys()


def test_an_evaluation_that_is_cut_off_leaves_no_row_and_no_sample_but_its_name(make_run: MakeRun) -> None:
    never = evaluators_are(lambda sampler: Evaluator(sampler, lambda: False))
    run = make_run([small(steps=30)], eval_sets=[held_out()], num_evaluators=1, wrap_sampler=never)

    async def interrupted() -> None:
        task = asyncio.ensure_future(run.controller.run())
        while run.controller.buffer.step < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(interrupted(), 60))
    assert [(event["step"], event["when"]) for event in run.tracker.events("evaluation_cut")] == [(0, "start")]
    assert not run.tracker.of("eval") and not run.tracker.of("eval_sample")
