"""The two loops on the plain pair: synchrony, resume, streaming, failures."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpost.core.advantages import group_advantages
from rlpost.core.critic import Critic
from rlpost.core.kto import KTO
from rlpost.core.objective import PolicyGradient
from rlpost.core.patch import diff
from rlpost.core.preference import Preference
from rlpost.core.subnetwork import RandomEntries
from rlpost.core.temperature import EntropyTarget
from rlpost.core.weights import checksum, unchanged_fraction
from rlpost.data.prompts import Prompts, ShuffledPrompts
from rlpost.engines.base import RolloutRequest
from rlpost.engines.plain_learner import PlainLearner
from rlpost.engines.plain_sampler import PlainSampler
from rlpost.pipeline.buffer import Position
from rlpost.pipeline.controller import Stage
from rlpost.pipeline.evaluation import EvalSet, scores_after_stages
from rlpost.pipeline.fleet import Limits
from rlpost.pipeline.ports import WorkerLost
from rlpost.pipeline.seeds import derive_seed
from rlpost.types import Judgement, Rollout, RolloutGroup, WeightImage
from tests.pipeline.conftest import PROMPTS, Run, make_stage, parity_judge

MakeRun = Callable[..., Run]


HELD: dict[str, Any] = {
    "temperature": 0.9,
    "entropy_target": EntropyTarget(entropy=4.5, min=0.5, max=1.5, gain=0.5),
}
"""Settings of a stage: the policy has 5.6 nats at this temperature."""


def synchronous_loop(model: Path, stage: Any) -> tuple[list[tuple[float, float]], dict[str, str]]:
    """GRPO as a textbook writes it: sample the batch, learn from it, copy the weights, repeat."""
    torch.set_num_threads(1)
    sampler, learner = PlainSampler(model), PlainLearner(model)
    learner.begin_stage(stage.spec)
    losses = []
    for step in range(stage.plan.num_steps):
        sampler.update(diff(None, WeightImage(version=step, tensors=learner.weights())))
        rollouts, advantages = [], []
        for place in range(stage.plan.groups_per_step):
            ordinal = step * stage.plan.groups_per_step + place
            prompt = stage.prompts[ordinal]
            for index in range(stage.group_size):
                seed = derive_seed(0, stage.name, ordinal, index)
                sampler.add(
                    RolloutRequest(
                        id=f"{place}-{index}",
                        prompt_ids=prompt.token_ids,
                        seed=seed,
                        temperature=1.0,
                        max_tokens=stage.max_response_tokens,
                    )
                )
        done = {}
        while sampler.has_work():
            done.update(sampler.step())
        for place in range(stage.plan.groups_per_step):
            group = [done[f"{place}-{index}"] for index in range(stage.group_size)]
            rewards = [parity_judge(RolloutGroup(prompt=PROMPTS[0], rollouts=()), r).reward for r in group]
            rollouts += group
            advantages += group_advantages(torch.tensor(rewards), advantage="group_std").tolist()
        learner.accumulate(rollouts, advantages, learner_version=step, max_staleness=0)
        num_tokens = sum(r.num_response_tokens for r in rollouts)
        report = learner.step(denominator=num_tokens, lr=stage.lr)
        losses.append((report.tally.sums["loss"] / report.tally.sums["tokens"], report.grad_norm))
    return losses, {n: checksum(t) for n, t in learner.weights().items()}


def test_max_staleness_0_is_the_synchronous_loop_bit_for_bit(make_run: MakeRun, tiny_model: Path) -> None:
    stage = make_stage(staleness=0, steps=4)
    run = make_run([stage]).start()
    losses, digest = synchronous_loop(tiny_model, stage)
    assert run.losses() == losses
    assert run.digest == digest


def test_a_temperature_moves_the_entropy_of_each_stage_and_every_token_is_scored_as_it_was_drawn(
    make_run: MakeRun,
) -> None:
    """Groups of several temperatures are trained in one step, where some were replaced. The second stage begins where its recipe says, also those of
    its groups that are drawn before the first one ends."""
    stages = [make_stage(name, staleness=2, steps=steps, refill=True, **HELD) for name, steps in (("a", 8), ("b", 4))]
    run = make_run(stages)
    learner = run.controller.workers.learner
    accumulate, drawn = learner.accumulate, []

    async def spy(groups: Any, *, learner_version: int, **kwargs: Any) -> None:
        drawn.extend((learner_version, group.handle) for group in groups)
        await accumulate(groups, learner_version=learner_version, **kwargs)

    learner.accumulate = spy
    rows = run.start().tracker.of("step")
    temperatures = [{g.rollouts[0].temperature for v, g in drawn if v == version} for version in range(12)]
    assert temperatures[0] == temperatures[8] == {0.9} and max(map(len, temperatures)) > 1
    assert max(temperatures[7]) < 0.8
    for version, row in enumerate(rows):
        assert min(temperatures[version]) <= row["sampling/temperature"] <= max(temperatures[version])
        logprobs = [r.sampler_logprobs[r.loss_mask] for v, g in drawn if v == version for r in g.rollouts]
        assert row["sampling/entropy"] == pytest.approx(-float(torch.cat(logprobs).mean()))
        assert row.get("mismatch/logprob_gap_mean_age_0", 0.0) < 1e-5
    assert rows[7]["sampling/entropy"] < rows[0]["sampling/entropy"] - 0.2


def test_a_stage_on_given_pairs_learns_to_prefer_the_chosen(make_run: MakeRun) -> None:
    """At the first step policy and reference are one: loss ln 2, no margin."""
    stage = make_stage(staleness=None, steps=12, prompts=6, group_size=2, lr=3e-3, objective=Preference())
    rows = make_run([stage]).start().tracker.of("step")
    assert rows[0]["actor/pg_loss"] == rows[0]["preference/loss"] == pytest.approx(math.log(2))
    assert rows[0]["preference/margin"] == 0.0 and rows[0]["preference/pairs"] == 6
    assert rows[-1]["preference/accuracy"] == 1.0 and rows[-1]["preference/loss"] < 0.5 * rows[0]["preference/loss"]
    assert not any(key.startswith(("reward/", "mismatch/", "actor/pg_clipfrac")) for row in rows for key in row)


def test_a_stage_on_its_own_pairs_learns_from_the_judge_and_counts_ties(make_run: MakeRun) -> None:
    def judge(group: RolloutGroup, rollout: Any) -> Judgement:
        low = int(rollout.token_ids[rollout.loss_mask][0]) < 150
        return Judgement(reward=float(low), outcome="correct" if low else "wrong")

    stage = make_stage(staleness=1, steps=20, prompts=6, lr=1e-2, objective=Preference())
    rows = make_run([stage], judge=judge).start().tracker.of("step")
    for row in rows:  # one whose groups are all tied has no pairs, and trains no token
        assert row.get("preference/pairs", 0) == round(6 * (1 - row["reward/frac_zero_std"]))
        assert row.get("staleness/token_max", 0) <= 1 and "actor/pg_clipfrac" not in row
    assert any(0 < row["reward/frac_zero_std"] < 1 for row in rows)
    first, last = ([row["reward/mean"] for row in part] for part in (rows[:5], rows[-5:]))
    assert sum(last) > sum(first) + 1.0


def test_kto_takes_the_two_responses_of_a_given_pair_each_on_its_own(make_run: MakeRun) -> None:
    """At the first step policy and reference are one: every score is 0, and half of every weight is lost."""
    objective = KTO(beta=0.5, undesirable_weight=2.0)
    stage = make_stage(staleness=None, steps=12, prompts=6, group_size=2, lr=3e-3, objective=objective)
    rows = make_run([stage]).start().tracker.of("step")
    assert rows[0]["actor/pg_loss"] == rows[0]["preference/loss"] == pytest.approx(0.75)
    assert rows[0]["preference/responses"] == 12 and rows[0]["preference/desirable_share"] == 0.5
    assert rows[-1]["preference/desirable_score"] > 0.0 > rows[-1]["preference/undesirable_score"]
    assert rows[-1]["preference/accuracy"] == 1.0 and rows[-1]["preference/loss"] < 0.5 * rows[0]["preference/loss"]


def test_kto_learns_from_every_rollout_that_the_judge_has_seen(make_run: MakeRun) -> None:
    def judge(group: RolloutGroup, rollout: Any) -> Judgement:
        low = int(rollout.token_ids[rollout.loss_mask][0]) < 150
        return Judgement(reward=float(low), outcome="correct" if low else "wrong")

    stage = make_stage(staleness=1, steps=14, prompts=4, max_tokens=2, lr=3e-3, objective=KTO())
    rows = make_run([stage], judge=judge).start().tracker.of("step")
    for row in rows:
        assert row["preference/responses"] == 16 and row["reward/frac_zero_std"] == 0.0
        assert row["preference/desirable_share"] == pytest.approx(row["reward/mean"])
    first, last = ([row["reward/mean"] for row in part] for part in (rows[:5], rows[-5:]))
    assert sum(last) > sum(first) + 1.0


def test_a_policy_learns_from_its_critic_with_one_rollout_per_prompt(make_run: MakeRun) -> None:
    def judge(group: RolloutGroup, rollout: Any) -> Judgement:
        low = int(rollout.token_ids[rollout.loss_mask][0]) < 150
        return Judgement(reward=float(low), outcome="correct" if low else "wrong")

    objective = PolicyGradient(advantage=Critic(lr=3e-3, gae_lambda=0.95))
    stage = make_stage(staleness=1, steps=30, prompts=24, group_size=1, max_tokens=2, lr=3e-3, objective=objective)
    rows = make_run([stage], judge=judge).start().tracker.of("step")
    assert all("reward/frac_zero_std" not in row and row["staleness/token_max"] <= 1 for row in rows)
    first, last = ([row["reward/mean"] for row in part] for part in (rows[:5], rows[-5:]))
    assert sum(last) > sum(first) + 1.0


def test_a_critic_warms_up_on_the_unchanged_policy_and_foresees_what_can_be_foreseen(make_run: MakeRun) -> None:
    """The reward is a matter of the prompt alone, so that all of its variance can be explained."""

    def judge(group: RolloutGroup, rollout: Any) -> Judgement:
        return Judgement(reward=float(int(group.prompt.id.split("-")[1]) % 3), outcome="correct")

    objective = PolicyGradient(advantage=Critic(lr=3e-3))
    stage = make_stage(steps=32, prompts=12, group_size=1, max_tokens=2, objective=objective, lr_frozen_steps=30)
    rows = make_run([stage], judge=judge).start().tracker.of("step")
    assert [row["actor/lr"] for row in rows] == [0.0] * 30 + [1e-3] * 2
    unchanged = {row["publish/version"]: row.get("publish/unchanged_fraction") for row in rows}
    assert all(share in (None, 1.0) for version, share in unchanged.items() if version <= 30)
    assert unchanged[31] is not None and unchanged[31] < 1.0
    assert rows[0]["critic/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert rows[29]["critic/explained_variance"] > 0.9
    assert rows[0]["critic/value_mean"] == 0.0 and rows[29]["critic/value_mean"] == pytest.approx(1.0, abs=0.2)


def test_a_step_of_ties_moves_nothing_and_says_so(make_run: MakeRun) -> None:
    def judge(group: RolloutGroup, rollout: Any) -> Judgement:
        return Judgement(reward=0.5, outcome="correct")

    run = make_run([make_stage(staleness=1, steps=2, objective=Preference())], judge=judge).start()
    rows = run.tracker.of("step")
    assert [row["reward/frac_zero_std"] for row in rows] == [1.0, 1.0]
    assert [row["actor/grad_norm"] for row in rows] == [0.0, 0.0]


def test_asynchrony_trains_the_same_prompts_on_older_tokens(make_run: MakeRun) -> None:
    run = make_run([make_stage(staleness=2, steps=6)]).start()
    ages = [row["staleness/group_max"] for row in run.tracker.of("step")]
    assert max(ages) == 2 and ages[0] == 0
    assert run.controller.buffer.counts["trained"] == 18


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_supervised_stage_hands_over_to_a_sampled_one(make_run: MakeRun, staleness: int) -> None:
    stages = [make_stage("warm", staleness=None, steps=5), make_stage("rl", staleness=staleness, steps=3)]
    run = make_run(stages).start()
    rows = run.tracker.of("step")
    assert [row["stage"] for row in rows] == ["warm"] * 5 + ["rl"] * 3
    assert rows[4]["actor/pg_loss"] < rows[0]["actor/pg_loss"]
    # The first rollouts of the sampled stage were drawn from the version the supervised stage ended with.
    assert rows[5]["staleness/group_max"] == 0


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([make_stage(staleness=0, steps=6)], id="within a stage"),
        pytest.param(
            [make_stage("a", staleness=None, steps=3), make_stage("b", staleness=0, steps=3)], id="at a stage boundary"
        ),
        pytest.param(
            [make_stage(staleness=0, steps=6, objective=PolicyGradient(kl_coef=0.1))], id="with a reference policy"
        ),
        pytest.param(
            [make_stage(staleness=0, steps=6, lr_frozen_steps=4, objective=PolicyGradient(advantage=Critic(lr=1e-2)))],
            id="with a critic, while it warms up",
        ),
        pytest.param([make_stage(staleness=0, steps=6, **HELD)], id="with a temperature that moves"),
    ],
)
def test_n_steps_then_resume_then_n_equals_2n_bit_for_bit(make_run: MakeRun, stages: list[Any]) -> None:
    whole = make_run(stages, checkpoint_every=3).start()
    middle = next(p for p in whole.checkpoints.written if p.step == 3)
    resumed = make_run(stages, start=middle, load_from=whole.checkpoints.path(3)).start()
    assert resumed.losses() == whole.losses()[3:]
    assert resumed.digest == whole.digest


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_killed_between_a_stages_checkpoint_and_its_end_is_judged_and_exported_on_resume(
    make_run: MakeRun, step: int
) -> None:
    sets = [EvalSet(name="held-out", prompts=PROMPTS[:4], num_samples=2, temperature=1.0, max_tokens=4)]
    stages = [make_stage("a", staleness=None, steps=3), make_stage("b", staleness=0, steps=2)]
    whole = make_run(stages, eval_sets=sets).start()
    position = next(p for p in whole.checkpoints.written if p.step == step)
    kept = [row for row in whole.tracker.of("eval_sample") if row["step"] < step]
    resumed = make_run(
        stages,
        eval_sets=sets,
        evaluated=scores_after_stages(kept),
        start=position,
        load_from=whole.checkpoints.path(step),
    ).start()
    whole_evals = [row for row in whole.tracker.of("eval") if row["step"] >= step]
    assert resumed.tracker.of("eval") == whole_evals
    assert [row["when"] for row in whole_evals] == (["a", "b"] if step == 3 else ["b"])
    assert resumed.checkpoints.exported == [row["when"] for row in whole_evals]
    assert resumed.digest == whole.digest


def test_a_checkpoint_waits_for_the_evaluations_of_earlier_versions(make_run: MakeRun) -> None:
    sets = [EvalSet(name="held-out", prompts=PROMPTS[:4], num_samples=2, temperature=1.0, max_tokens=4)]
    run = make_run([make_stage("a", staleness=2, steps=2), make_stage("b", staleness=2, steps=2)], eval_sets=sets)
    judged_at_write: list[tuple[int, list[str]]] = []
    write = run.checkpoints.write

    async def spy(position: Position, learner: Any) -> None:
        judged_at_write.append((position.step, [row["when"] for row in run.tracker.of("eval")]))
        await write(position, learner)

    run.checkpoints.write = spy  # type: ignore[method-assign]
    run.start()
    assert judged_at_write == [(2, ["start"]), (4, ["start", "a"])]


def test_an_asynchronous_resume_trains_the_prompts_the_whole_run_trains(make_run: MakeRun) -> None:
    stages = [make_stage(staleness=2, steps=6)]
    whole = make_run(stages, checkpoint_every=2, log_groups=3).start()
    position = next(p for p in whole.checkpoints.written if p.step == 2)
    assert any(position.pending), "nothing was in flight: this test would prove nothing"
    resumed = make_run(stages, start=position, load_from=whole.checkpoints.path(2), log_groups=3).start()

    def trained(run: Run, after: int) -> list[str]:
        return sorted(row["prompt_id"] for row in run.tracker.of("rollout") if row["step"] > after)

    assert trained(resumed, 2) == trained(whole, 2)


def test_prompts_that_have_become_easy_are_not_asked_again_resumed_or_not(make_run: MakeRun) -> None:
    """Twelve prompts, three a step; the first six are always solved. Where those groups are replaced, each is drawn once."""

    def judge(group: RolloutGroup, rollout: Any) -> Judgement:
        easy = int(group.prompt.id.removeprefix("prompt-")) < 6
        right = easy or rollout is not group.rollouts[0]
        return Judgement(reward=float(right), outcome="correct" if right else "wrong")

    def stage(**settings: Any) -> Stage:
        source = ShuffledPrompts(Prompts.listed(PROMPTS), seed=0, retire_above=0.99)
        return dataclasses.replace(make_stage(staleness=0, steps=8, group_size=6, **settings), prompts=source)

    def trained(run: Run, after: int) -> list[str]:
        return [row["prompt_id"] for row in run.tracker.of("rollout") if row["step"] > after]

    whole = make_run([stage()], judge=judge, checkpoint_every=1, log_groups=3).start()
    assert [(event["left"], event["remain"]) for event in whole.tracker.events("prompts_retired")] == [(6, 6)]
    assert len(set(trained(whole, 0))) == 12 and set(trained(whole, 4)) == {f"prompt-{i}" for i in range(6, 12)}
    middle, saved = whole.checkpoints.written[4], whole.checkpoints.path(5)
    resumed = make_run([stage()], judge=judge, start=middle, load_from=saved, log_groups=3).start()
    assert trained(resumed, 5) == trained(whole, 5) and resumed.digest == whole.digest

    replaced = make_run([stage(refill=True)], judge=judge).start()
    assert replaced.controller.buffer.counts["filtered"] < 12, "in four epochs of twelve there would be 24"


def test_the_rollouts_that_are_written_out_show_what_the_policy_was_asked(make_run: MakeRun) -> None:
    run = make_run([make_stage(staleness=0, steps=1, prompts=2)], log_groups=2).start()
    asked = {prompt.id: " ".join(map(str, prompt.token_ids)) for prompt in PROMPTS}
    rows = run.tracker.of("rollout")
    assert rows and all(row["prompt"] == asked[row["prompt_id"]] for row in rows)


def test_groups_reach_the_learner_before_their_batch_is_complete(make_run: MakeRun) -> None:
    """The first group's gradient is accumulated while the last group has not been sampled yet."""
    run = make_run([make_stage(staleness=0, steps=1, prompts=4)])
    log: list[str] = []
    learner, sampler = run.controller.workers.learner, run.controller.workers.samplers[0]
    accumulate, sample = learner.accumulate, sampler.sample

    async def logged_accumulate(groups: Any, **kwargs: Any) -> None:
        log.append("learn")
        await accumulate(groups, **kwargs)

    async def one_after_another(request: Any) -> Any:
        async with lock:
            result = await sample(request)
            log.append("sampled")
            await asyncio.sleep(0.01)
            return result

    lock = asyncio.Lock()
    learner.accumulate, sampler.sample = logged_accumulate, one_after_another  # type: ignore[method-assign]
    run.start()
    assert log.index("learn") < len(log) - 1 - log[::-1].index("sampled")


def test_evaluation_judges_one_version_while_training_goes_on(make_run: MakeRun) -> None:
    sets = [EvalSet(name="held-out", prompts=PROMPTS[:4], num_samples=2, temperature=1.0, max_tokens=4)]
    run = make_run(
        [make_stage("a", staleness=1, steps=3), make_stage("b", staleness=1, steps=2)], eval_sets=sets
    ).start()
    rows = run.tracker.of("eval")
    assert [(row["when"], row["step"]) for row in rows] == [("start", 0), ("a", 3), ("b", 5)]
    assert all(row["num_prompts"] == 4 for row in rows)


def held_out(name: str = "held-out", *, every: int | None) -> EvalSet:
    return EvalSet(name=name, prompts=PROMPTS[:4], num_samples=2, temperature=1.0, max_tokens=4, every=every)


def test_a_set_is_judged_every_few_steps_within_stages_of_any_kind(make_run: MakeRun) -> None:
    stages = [make_stage("a", staleness=0, steps=5), make_stage("b", staleness=None, steps=5)]
    run = make_run(stages, eval_sets=[held_out("often", every=3), held_out("rarely", every=None)]).start()
    rows, skipped = run.tracker.of("eval"), [e["step"] for e in run.tracker.events("evaluation_skipped")]
    often = [(row["when"], row["step"]) for row in rows if row["eval"] == "often"]
    between = [("start", 0), ("a", 5), ("b", 10)]
    assert [of for of in often if of[0] != "step"] == between
    # A stage that is not sampled does not wait for evaluations of versions before it.
    assert ("step", 3) in often and sorted([step for when, step in often if when == "step"] + skipped) == [3, 6, 9]
    assert [(row["when"], row["step"]) for row in rows if row["eval"] == "rarely"] == between


def test_an_evaluation_that_is_due_while_another_goes_on_is_left_out_and_named(make_run: MakeRun) -> None:
    run = make_run([make_stage(staleness=3, steps=12)], eval_sets=[held_out(every=1)]).start()
    judged = [row["step"] for row in run.tracker.of("eval") if row["when"] == "step"]
    skipped = [event["step"] for event in run.tracker.events("evaluation_skipped")]
    assert judged and skipped and sorted(judged + skipped) == list(range(1, 12))


def test_versions_that_samplers_do_not_get_are_not_judged(make_run: MakeRun) -> None:
    stages = [make_stage(staleness=3, steps=10)]
    run = make_run(stages, eval_sets=[held_out(every=3)], publish_every=4).start()
    steps = {row["step"] for row in run.tracker.of("eval")} | {
        e["step"] for e in run.tracker.events("evaluation_skipped")
    }
    assert steps == {0, 4, 8, 10}


class DyingSampler:
    """Dies at its n-th request, and stays dead."""

    def __init__(self, inner: Any, dies_at: int) -> None:
        self.inner, self.name, self.dies_at, self.num_calls = inner, inner.name, dies_at, 0

    async def sample(self, request: Any) -> Any:
        self.num_calls += 1
        if self.num_calls >= self.dies_at:
            raise WorkerLost(self.name, "sampling", "killed by the test")
        return await self.inner.sample(request)

    async def held(self) -> int | None:
        return await self.inner.held()

    async def update(self, export: Any) -> int:
        return await self.inner.update(export)

    async def seconds(self) -> Any:
        return await self.inner.seconds()


def test_a_dead_samplers_groups_are_sampled_after_its_restart(make_run: MakeRun) -> None:
    stage = make_stage(staleness=0, steps=4)
    undisturbed = make_run([stage]).start()

    async def restart(dead: DyingSampler) -> Any:
        return dead.inner

    run = make_run([stage], wrap_sampler=lambda s: DyingSampler(s, dies_at=5), restart=restart).start()
    assert len(run.tracker.events("sampler_lost")) == 1
    assert run.tracker.events("sampler_restarted")[0]["version"] >= 1
    # Seeds name the rollout, not the sampler: the run learned exactly what it would have learned undisturbed.
    assert run.digest == undisturbed.digest


def test_a_sampler_that_keeps_dying_ends_the_run_with_its_name(make_run: MakeRun) -> None:
    async def restart(dead: DyingSampler) -> Any:
        return dead

    limits = Limits(max_restarts=2)
    run = make_run([make_stage()], wrap_sampler=lambda s: DyingSampler(s, 2), restart=restart, limits=limits)
    with pytest.raises(WorkerLost, match="sampler-0 was lost during sampling"):
        run.start()


def test_a_sampler_that_never_answers_is_lost_by_its_deadline(make_run: MakeRun) -> None:
    class Silent(DyingSampler):
        async def sample(self, request: Any) -> Any:
            await asyncio.sleep(3600)

    async def restart(dead: Silent) -> Any:
        return dead.inner

    limits = Limits(sample_s=2.0)
    run = make_run([make_stage(steps=2)], wrap_sampler=lambda s: Silent(s, 0), restart=restart, limits=limits).start()
    assert "no answer within 2 s" in run.tracker.events("sampler_lost")[0]["detail"]


def test_a_shaped_reward_moves_the_weights_and_accuracy_is_still_reported(make_run: MakeRun) -> None:
    """Nobody is ever right, so a plain reward has no signal; half a point for a well-formed answer has."""

    def never_right(group: RolloutGroup, rollout: Rollout) -> Judgement:
        well_formed = parity_judge(group, rollout).reward
        return Judgement(reward=0.0, outcome="wrong", parts={"accuracy": 0.0, "format": well_formed})

    table: dict[str, Any] = {"accuracy": 1.0, "format": 0.5, "thinking_format": 0.0, "max_tokens": 4}
    table |= {"cosine_length": None, "overlong": None, "repetition": None}
    stage = make_stage(steps=2, max_tokens=4, group_size=8)
    plain = make_run([stage], judge=never_right).start()
    shaped = make_run([dataclasses.replace(stage, shaping=table)], judge=never_right).start()
    for run, signal in ((plain, False), (shaped, True)):
        for row in run.tracker.of("step"):
            assert (row["reward/accuracy/mean"], row["reward/mean"] != 0.0) == (0.0, signal)
            assert (row["reward/frac_zero_std"] < 1.0) == signal
    row = shaped.tracker.of("step")[0]
    assert row["reward/mean"] == pytest.approx(0.5 * row["reward/format/mean"])


def test_a_broken_verifier_is_counted_and_stops_the_run_past_the_limit(make_run: MakeRun) -> None:
    def broken(group: RolloutGroup, rollout: Any) -> Judgement:
        return Judgement(reward=0.0, outcome="verifier_error", detail="no such module")

    with pytest.raises(RuntimeError, match=r"could not be judged, more than max_failed_share = 0.05.*no such module"):
        make_run([make_stage()], judge=broken).start()


def test_a_rollout_nobody_could_judge_is_in_nothing_its_group_teaches(make_run: MakeRun) -> None:
    def breaks_once(group: RolloutGroup, rollout: Any) -> Judgement:
        if rollout is group.rollouts[1] and group.prompt.id.endswith("0"):
            return Judgement(reward=1e6, outcome="verifier_error", detail="no such module")
        return parity_judge(group, rollout)

    run = make_run([make_stage(steps=3, group_size=4)], judge=breaks_once)
    learner = run.controller.workers.learner
    accumulate, graded = learner.accumulate, []

    async def spy(groups: Any, **kwargs: Any) -> None:
        graded.extend(groups)
        await accumulate(groups, **kwargs)

    learner.accumulate = spy
    run.start()
    events = run.tracker.events("rollouts_unjudged")
    short = [(g.kept_G, len(g.advantages_G)) for g in graded if len(g.kept_G) < 4]
    assert short and short == [((0, 2, 3), 3)] * len(events)
    assert all(event["rollouts"] == 1 and event["detail"] == "no such module" for event in events)
    assert all(abs(sum(g.advantages_G)) < 1e-6 for g in graded), "the baseline is the mean of the rest"
    assert all(row["reward/mean"] <= 1.0 for row in run.tracker.of("step"))


def test_a_stage_reports_the_subnetwork_it_trains_and_moves_no_other_entry(make_run: MakeRun) -> None:
    """A quarter of each weight: of the output layer's 300 x 64 entries 4,800."""
    full = make_stage("full", steps=1)
    stage = make_stage("part", steps=2)
    spec = dataclasses.replace(stage.spec, subnetwork=RandomEntries(density=0.25))
    run = make_run([dataclasses.replace(stage, spec=spec)])
    before = run.learner.weights()
    run.start()
    (event,) = run.tracker.events("subnetwork")
    assert event["stage"] == "part" and event["density"] == pytest.approx(0.25, abs=1e-3)
    assert event["density_by_weight"].keys() == before.keys() and event["density_by_weight"]["lm_head.weight"] == 0.25
    assert 0.75 <= unchanged_fraction(before, run.learner.weights()) < 0.8
    assert not make_run([full]).start().tracker.events("subnetwork")


def test_groups_without_signal_are_replaced_when_asked(make_run: MakeRun) -> None:
    def easy_for_some(group: RolloutGroup, rollout: Any) -> Judgement:
        if int(group.prompt.id.split("-")[1]) % 2:
            return Judgement(reward=1.0, outcome="correct")
        return parity_judge(group, rollout)

    run = make_run([make_stage(staleness=1, steps=3, refill=True)], judge=easy_for_some).start()
    assert run.controller.buffer.counts["filtered"] > 0
    assert all(row["reward/frac_zero_std"] == 0 for row in run.tracker.of("step"))


def test_prompts_nobody_can_learn_from_end_the_run_with_advice(make_run: MakeRun) -> None:
    hopeless = lambda group, rollout: Judgement(reward=0.0, outcome="wrong")  # noqa: E731
    with pytest.raises(RuntimeError, match="too hard or too easy"):
        make_run([make_stage(refill=True)], judge=hopeless, max_refills=3).start()


def test_a_step_without_any_signal_leaves_the_weights_alone(make_run: MakeRun) -> None:
    hopeless = lambda group, rollout: Judgement(reward=0.0, outcome="wrong")  # noqa: E731
    run = make_run([make_stage(steps=2)], judge=hopeless)
    before = run.digest
    assert run.start().digest == before
    assert [row["reward/frac_zero_std"] for row in run.tracker.of("step")] == [1.0, 1.0]


def test_an_interrupt_between_step_and_commit_leaves_version_and_weights_in_agreement(make_run: MakeRun) -> None:
    run = make_run([make_stage(staleness=0, steps=5)])
    learner = run.controller.workers.learner
    step, num_steps = learner.step, 0

    async def main() -> None:
        task = asyncio.ensure_future(run.controller.run())

        async def interrupted_step(**kwargs: Any) -> Any:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 3:
                task.cancel()
                await asyncio.sleep(0.01)
            return await step(**kwargs)

        learner.step = interrupted_step  # type: ignore[method-assign]
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert run.controller.buffer.step == num_steps == 3


def test_seconds_of_every_worker_sum_to_the_time_between_two_steps(make_run: MakeRun) -> None:
    run = make_run([make_stage(steps=4)]).start()
    rows = run.tracker.of("step")[1:]
    for row in rows:
        for worker in ("learner-0", "sampler-0", "verifier-0"):
            seconds = sum(v for k, v in row.items() if k.startswith(f"time/{worker}/"))
            assert seconds == pytest.approx(row["timing_s/step"], abs=1.0)
