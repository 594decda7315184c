"""The run: two loops over one buffer.

    rollout_loop   admit -> sample -> judge -> put | drop          one task per group
    train_loop     take -> accumulate -> step -> commit -> publish  one step at a time

                  consumes            produces          waits for                     woken by
    rollout_loop  prompts             finished groups   a slot of the buffer          publish, drop, commit
    a group       a slot, a sampler   one group         a live sampler, the verifier  (their answers, with deadlines)
    train_loop    finished groups     weight versions   the groups of its step        put, drop

Nothing waits for itself: a slot opens when versions advance; versions advance when a step's groups have finished; those
groups hold their slots already (`pipeline.buffer` has the proof). Samplers swap their weights beside the learner's next
step, whose groups the bound already allowed; one publish is under way at a time, so a step waits only for the one before.
Where a rank reads its weights without the others, it exports them beside the next step's gradient too; `step` waits until
they are read.

Failures are handled in one place, `_run_group`: a rollout that no verifier could judge, or a group that no sampler survived,
is dropped and counted, and the run stops when their share passes `max_failed_share`. Everything else ends the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch

from rlpost.core.metrics import StepReport
from rlpost.core.objective import StageSpec, Supervised, credit, step_denominator
from rlpost.core.patch import WeightPatch
from rlpost.core.schedule import Schedule, learning_rate
from rlpost.core.subnetwork import Coverage
from rlpost.core.temperature import EntropyTarget
from rlpost.pipeline.buffer import Position, RolloutBuffer, StagePlan, Ticket
from rlpost.pipeline.deadlines import Bell, task_group, within
from rlpost.pipeline.evaluation import RESUME, START, STEP, EvalSet, Evaluations, Scores
from rlpost.pipeline.fleet import Fleet, Limits
from rlpost.pipeline.moving_on import HOURS, REWARD, TOKENS, History, Until, eval_figure, moves_on
from rlpost.pipeline.ports import Export, GradedGroup, GroupRequest, Handle, PromptSource, WorkerLost, Workers
from rlpost.pipeline.seeds import derive_seed
from rlpost.pipeline.step_metrics import Published, StepRecord, step_metrics
from rlpost.types import GroupSummary, Judgement, Prompt, Rollout, RolloutGroup, summarize

MIN_GROUPS_TO_JUDGE_FAILURES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One entry of the recipe's list, resolved."""

    name: str
    plan: StagePlan
    prompts: PromptSource
    spec: StageSpec
    group_size: int
    max_response_tokens: int
    lr: float
    temperature: float = 1.0
    """Of its first groups."""
    entropy_target: EntropyTarget | None = None
    """What moves it from there; None: it stays."""
    lr_warmup_steps: int = 0
    lr_schedule: Schedule = "constant"
    lr_frozen_steps: int = 0
    """First steps at which the policy's lr is 0, while a critic warms up; the schedule begins after them."""
    refill: bool = False
    """Replace groups whose rewards are all equal by fresh ones (DAPO's dynamic sampling)."""
    patience_s: float | None = None
    """How long the learner waits for a straggler while finished groups stand behind it; None: as long as it takes."""
    shaping: Mapping[str, Any] | None = None
    """The table of `reward.shaping.shape`; None: the verifier's reward as it is."""
    until: Until | None = None
    """What may end it early."""

    @property
    def sampled(self) -> bool:
        return self.plan.max_staleness is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A group ready to train: its tokens by handle, everything else by value and of the kept rollouts alone."""

    ticket: Ticket
    prompt: Prompt
    handle: Handle
    kept_G: tuple[int, ...]
    """All rollouts but those on which the verifier broke."""
    summary: GroupSummary
    judgements: tuple[Judgement, ...]
    advantages_G: tuple[float, ...]

    def graded(self) -> GradedGroup:
        return GradedGroup(handle=self.handle, kept_G=self.kept_G, advantages_G=self.advantages_G)


class Tracker(Protocol):
    """Where figures go. Never raises for a reason that training could survive."""

    def log(self, kind: str, row: Mapping[str, Any]) -> None: ...


class Checkpoints(Protocol):
    async def write(self, position: Position, learner: Any) -> None: ...

    async def export(self, stage: str, learner: Any) -> None: ...


class Archive(Protocol):
    """Keeps every version that is published."""

    @property
    def needs_complete(self) -> bool:
        """Whether the next version should be complete."""
        ...

    def append(self, patch: WeightPatch) -> None: ...


class Observer(Protocol):
    """Measures versions that are published, in its own time."""

    @property
    def held(self) -> int | None:
        """The version it was given last."""
        ...

    def wants(self, version: int) -> bool: ...

    def let_pass(self, version: int) -> None:
        """It wanted this version, which is not to be had any more."""
        ...

    def see(self, patch: WeightPatch) -> None:
        """Take a version, complete or as changes of the one `held`; returns at once."""
        ...

    def end_early(self, stage: str, last: int) -> None:
        """The stage's last version, which is not published yet, will be this one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    seed: int
    limits: Limits
    max_num_seqs: int = 256
    """Rollouts that a sampler decodes at once."""
    checkpoint_every: int = 0
    """Steps between checkpoints within a stage; 0: only when a stage ends."""
    publish_every: int = 1
    """Of a stage's versions, each whose number of steps this divides is published, and its last one."""
    max_failed_share: float = 0.05
    """Of all rollouts, those that may be lost or not judged before the run stops."""
    max_refills: int = 10
    """Batches' worth of groups without signal one step may discard before the run stops (only with `refill`)."""
    log_groups: int = 1
    """Groups per step whose rollouts are written out whole."""


class Controller:
    """Runs the stages of a recipe from `start` to the end."""

    def __init__(
        self,
        stages: Sequence[Stage],
        workers: Workers,
        tracker: Tracker,
        checkpoints: Checkpoints,
        settings: RunSettings,
        *,
        decode: Callable[[Sequence[int]], str],
        eval_sets: Sequence[EvalSet] = (),
        evaluated: Mapping[str, Mapping[int, Scores]] | None = None,
        archive: Archive | None = None,
        observer: Observer | None = None,
        start: Position | None = None,
        history: History | None = None,
        load_from: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            evaluated: what a resumed run had evaluated before (`evaluation.scores_after_stages`).
        """
        self.stages, self.workers, self.tracker, self.checkpoints = stages, workers, tracker, checkpoints
        self.settings, self._clock = settings, clock
        self._eval_sets, self._evaluated = eval_sets, evaluated or {}
        self._decode = decode
        self._archive, self._observer, self._load_from = archive, observer, load_from
        self.buffer = RolloutBuffer([stage.plan for stage in stages], start)
        self._history = history or History()
        if start is not None and start.sources:
            for stage, state in zip(stages, start.sources, strict=True):
                stage.prompts.restore(state)
        self._temperatures = [stage.temperature for stage in stages]
        """Of each stage's next groups."""
        if start is not None and start.temperatures:
            self._temperatures = list(start.temperatures)
        self._bell = Bell()
        self._read: asyncio.Event | None = None  # set once the latest version's weights are read
        self._publishing: asyncio.Task[Export] | None = None
        self._holding = asyncio.Lock()  # samplers keep their version while it is held: evaluation against publishing
        self._showing: asyncio.Task[None] | None = None
        self._refills = self._failed_rollouts = self._ended_rollouts = 0
        self._published: Published | None = None

    async def run(self) -> None:
        """Train every stage to its end; raises the first error that ends the run, all tasks cancelled."""
        workers = self.workers
        async with task_group() as tasks:
            self._tasks = tasks
            routing = (workers.restart, self.settings.limits, tasks.create_task, self._event)
            self.fleet = Fleet(workers.samplers, *routing, learner=workers.learner)
            self._evaluations = Evaluations(
                self._eval_sets,
                workers,
                self.settings,
                self._log_evaluation,
                tasks.create_task,
                fleet=self.fleet,
                holding=self._holding,
                evaluators=Fleet(workers.evaluators, *routing) if workers.evaluators else None,
                complete=self._complete,
                earlier=self._evaluated,
                clock=self._clock,
            )
            tasks.create_task(self._train_loop())
            tasks.create_task(self._rollout_loop())

    def position(self) -> Position:
        """As of the buffer, with the state of each stage's prompts and its temperature; call between steps."""
        sources = tuple(stage.prompts.state for stage in self.stages)
        return replace(self.buffer.position(), sources=sources, temperatures=tuple(self._temperatures))

    # -- rollout loop --------------------------------------------------------------------------------------------------

    async def _rollout_loop(self) -> None:
        while not self.buffer.finished:
            ticket = self.buffer.admit()
            if ticket is None:
                await self._bell.wait()
                continue
            stage = self.stages[ticket.stage]
            num_prompts, prompt = len(stage.prompts), stage.prompts[ticket.ordinal]
            if num_left := num_prompts - len(stage.prompts):
                self._event("prompts_retired", stage=stage.name, left=num_left, remain=len(stage.prompts))
            if stage.sampled:
                self._tasks.create_task(self._run_group(ticket, stage, prompt))
            else:
                self._put_given(ticket, stage, prompt)

    async def _run_group(self, ticket: Ticket, stage: Stage, prompt: Prompt) -> None:
        """Sample and judge one group; the one place where failures become data."""
        names = (self.settings.seed, stage.name, ticket.ordinal)
        request = GroupRequest(
            prompt=prompt,
            seeds_G=tuple(derive_seed(*names, index) for index in range(stage.group_size)),
            temperature=self._temperatures[ticket.stage],
            max_tokens=stage.max_response_tokens,
        )
        try:
            handle, summary = await self.fleet.sample(request)
            verifier = self.workers.verifier
            judgements = await within(
                self.settings.limits.judge_s,
                verifier.judge(handle, stage.shaping),
                worker=verifier.name,
                phase=f"judging {prompt.id}",
            )
        except WorkerLost as error:
            self._fail(ticket, prompt, "worker_lost", str(error), stage.group_size)
            return
        kept_G = tuple(index for index, j in enumerate(judgements) if j.outcome != "verifier_error")
        broken = [j for j in judgements if j.outcome == "verifier_error"]
        if len(kept_G) < min(2, stage.group_size):
            self._fail(ticket, prompt, "verifier_error", broken[0].detail, stage.group_size)
            return
        if broken:
            self._event("rollouts_unjudged", prompt=prompt.id, rollouts=len(broken), detail=broken[0].detail)
        latest = f"{prompt.id}: {broken[0].detail}" if broken else ""
        self._count_failures(len(broken), stage.group_size, latest)
        judgements, summary = tuple(judgements[index] for index in kept_G), summary.only(kept_G)
        stage.prompts.observe(ticket.ordinal, sum(j.outcome == "correct" for j in judgements) / len(judgements))
        advantages_G = credit(stage.spec.objective, [j.reward for j in judgements], summary.finish_reasons_G)
        if stage.refill and not any(advantages_G):
            self._filter(ticket, stage)
            return
        finished = Finished(
            ticket=ticket,
            prompt=prompt,
            handle=handle,
            kept_G=kept_G,
            summary=summary,
            judgements=judgements,
            advantages_G=advantages_G,
        )
        self.buffer.put(ticket, finished, oldest_version=summary.oldest_version)
        self._bell.ring()

    def _put_given(self, ticket: Ticket, stage: Stage, prompt: Prompt) -> None:
        """A group that no policy sampled: a demonstration, or a pair of one and a worse response."""
        pair = not isinstance(stage.spec.objective, Supervised)
        responses = (prompt.demonstration_ids, prompt.rejected_ids) if pair else (prompt.demonstration_ids,)
        group = RolloutGroup(prompt=prompt, rollouts=tuple(given_rollout(prompt, ids) for ids in responses))
        finished = Finished(
            ticket=ticket,
            prompt=prompt,
            handle=self.workers.put(group),
            kept_G=tuple(range(len(responses))),
            summary=summarize(group),
            judgements=(),
            advantages_G=(1.0, -1.0) if pair else (1.0,),
        )
        self.buffer.put(ticket, finished, oldest_version=None)
        self._bell.ring()

    def _fail(self, ticket: Ticket, prompt: Prompt, kind: str, detail: str, num_rollouts: int) -> None:
        self.buffer.drop(ticket, "failed")
        self._event("group_failed", prompt=prompt.id, failure=kind, detail=detail)
        self._count_failures(num_rollouts, num_rollouts, f"{prompt.id}: {kind}: {detail}")
        self._bell.ring()

    def _count_failures(self, failed: int, ended: int, latest: str) -> None:
        """`failed` of the `ended` rollouts of a group were lost or could not be judged.

        Raises:
            RuntimeError: past `max_failed_share` of all since this process began.
        """
        self._failed_rollouts += failed
        self._ended_rollouts += ended
        share = self._failed_rollouts / max(self._ended_rollouts, MIN_GROUPS_TO_JUDGE_FAILURES * ended)
        if failed and share > self.settings.max_failed_share:
            raise RuntimeError(
                f"{self._failed_rollouts} of {self._ended_rollouts} rollouts were lost or could not be judged, more than"
                f" max_failed_share = {self.settings.max_failed_share:g}; the last: {latest}"
            )

    def _filter(self, ticket: Ticket, stage: Stage) -> None:
        self.buffer.drop(ticket, "filtered")
        self._refills += 1
        limit = self.settings.max_refills * stage.plan.groups_per_step
        if self._refills > limit:
            raise RuntimeError(
                f"step {self.buffer.step} of stage {stage.name!r} discarded {self._refills} groups whose rewards are all"
                f" equal (limit {limit}): the prompts are too hard or too easy for this policy. Use other prompts, a"
                " larger group_size, or refill = false"
            )
        self._bell.ring()

    # -- train loop ----------------------------------------------------------------------------------------------------

    async def _train_loop(self) -> None:
        resumed_stage = await self._load()
        start = self.buffer.step
        for index, stage in enumerate(self.stages):
            trains, resumed = start < self.buffer.end_step(index), index == resumed_stage
            if not trains and not resumed:
                continue
            if not resumed:
                await self._begin(index)
            if self._read is None:
                await self._publish()
                if trains:
                    self._evaluate(START if self._load_from is None else RESUME, self._eval_sets)
            self._event("stage_start", stage=stage.name, step=self.buffer.step)
            self._noted = self._clock()
            while self.buffer.step < self.buffer.end_step(index):
                await self._train_step(index)
            if not stage.sampled and trains:
                await self._publish()
            # Saved before it is judged: what follows can be done again from the checkpoint, and is, on a resume.
            if trains:
                await self._checkpoint()
            self._evaluate(stage.name, self._eval_sets)
            await self.checkpoints.export(stage.name, self.workers.learner)
            self._event("stage_end", stage=stage.name, step=self.buffer.step)
        if self._publishing is not None:
            await self._publishing
        await self._evaluations.ended()
        if self._showing is not None:
            await self._showing
        self._bell.ring()

    async def _checkpoint(self) -> None:
        """Write one; it vouches for everything before it, so evaluations of earlier versions end first."""
        await self._evaluations.vouched()
        await self._weights_are_read()  # and so finite
        await self.checkpoints.write(self.position(), self.workers.learner)

    async def _begin(self, stage_index: int) -> None:
        stage = self.stages[stage_index]
        await self._weights_are_read()
        coverage: Coverage = await self._learn("begin_stage", self.workers.learner.begin_stage(stage.spec))
        if coverage:
            trained, entries = map(sum, zip(*coverage.values(), strict=True))
            shares = {name: trained / entries for name, (trained, entries) in coverage.items()}
            self._event("subnetwork", stage=stage.name, density=trained / entries, density_by_weight=shares)

    async def _load(self) -> int | None:
        """Restore the learner in the stage it was saved in, which may have just ended; returns that stage's index."""
        if self._load_from is None:
            return None
        saved_stage = self.buffer.stage_of(self.buffer.step - 1)
        await self._begin(saved_stage)
        await self._learn("load", self.workers.learner.load(self._load_from))
        return saved_stage

    async def _train_step(self, index: int) -> None:
        started, waited_s, groups = self._clock(), 0.0, []
        stage, version = self.stages[index], self.buffer.step
        bound = stage.plan.max_staleness
        while self.buffer.num_missing:
            arrived: list[Finished] = self.buffer.take()
            if not arrived:
                before = self._clock()
                if not await self._bell.wait(stage.patience_s) and self.buffer.defer():
                    self._event("stragglers_deferred", step=version)
                waited_s += self._clock() - before
                continue
            groups += arrived
            graded = [group.graded() for group in arrived]
            await self._learn(
                "accumulate",
                self.workers.learner.accumulate(graded, learner_version=version, max_staleness=bound),
            )
        lr = learning_rate(
            version - self.buffer.first_step(index),
            peak=stage.lr,
            warmup_steps=stage.lr_warmup_steps,
            num_steps=stage.plan.num_steps,
            schedule=stage.lr_schedule,
            frozen_steps=stage.lr_frozen_steps,
        )
        report = await self._step(denominator=self._denominator(stage, groups), lr=lr)
        if stage.entropy_target is not None:  # before anybody is admitted on the strength of this step
            summaries = [group.summary for group in groups]
            self._temperatures[index] = stage.entropy_target.adjusted(self._temperatures[index], summaries)
        self._move_on(index, groups)
        self._refills = 0
        due = self._due(index)
        if due or (stage.sampled and self._is_published(index)):
            await self._publish()
        self._bell.ring()
        self.buffer.check_accounting()
        record = StepRecord(
            step=self.buffer.step,
            stage=stage.name,
            sampled=stage.sampled,
            lr=lr,
            report=report,
            groups=tuple(groups),
            seconds=self._clock() - started,
            waited_s=waited_s,
            evaluating_s=self._evaluations.shared_s(),
            buffer=dict(self.buffer.snapshot()),
            published=self._published if stage.sampled else None,
            worker_seconds=await self._worker_seconds(),
        )
        self.tracker.log("step", step_metrics(record))
        await self._log_rollouts(stage, groups)
        if self.settings.checkpoint_every and self.buffer.step % self.settings.checkpoint_every == 0:
            await self._checkpoint()
        if due:  # after the checkpoint, which then need not wait for it
            self._evaluate(STEP, due)

    async def _step(self, *, denominator: float, lr: float) -> StepReport:
        """Step and commit, both or neither: whoever interrupts the run finds version and weights in agreement."""
        await self._weights_are_read()
        call = self._learn("step", self.workers.learner.step(denominator=denominator, lr=lr))
        task = asyncio.ensure_future(call)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await task
            raise
        finally:
            if task.done() and not task.cancelled() and task.exception() is None:
                self.buffer.commit()

    def _move_on(self, index: int, groups: Sequence[Finished]) -> None:
        """End the stage early if its rule says so. Nothing is awaited since the commit: nobody has been admitted."""
        stage, version, now = self.stages[index], self.buffer.step, self._clock()
        figures = {TOKENS: sum(sum(g.summary.num_tokens_G) for g in groups), HOURS: (now - self._noted) / 3600}
        if stage.sampled:
            figures[REWARD] = fmean(j.reward for group in groups for j in group.judgements)
        self._history.note(version - 1, figures)
        self._noted = now
        if stage.until is None:
            return
        reason = moves_on(self._history.since(self.buffer.first_step(index)), stage.until)
        if reason is None or not self.buffer.end_early(index):
            return
        last = self.buffer.end_step(index)
        self._event("stage_moves_on", stage=stage.name, step=version, last=last, reason=reason)
        if self._observer is not None:
            self._observer.end_early(stage.name, last)
        self._bell.ring()

    @staticmethod
    def _denominator(stage: Stage, groups: Sequence[Finished]) -> float:
        return step_denominator(
            stage.spec.objective,
            [group.summary for group in groups],
            [group.advantages_G for group in groups],
            max_response_tokens=stage.max_response_tokens,
        )

    def _is_published(self, index: int) -> bool:
        """Whether the present version, which this stage made, is for the samplers."""
        num_steps = self.buffer.step - self.buffer.first_step(index)
        return num_steps % self.settings.publish_every == 0 or self.buffer.step == self.buffer.end_step(index)

    async def _publish(self) -> None:
        """Start bringing the present version to the samplers, once the previous one has arrived."""
        if self._publishing is not None:
            await self._publishing
        self._read = asyncio.Event()
        self._publishing = self._tasks.create_task(self._bring(self.buffer.step, self._read))
        if not self.workers.learner.exports_beside:
            await self._read.wait()

    async def _weights_are_read(self) -> None:
        """The export that reads them beside the learner's work has ended: they may change."""
        if self._read is not None:
            await self._read.wait()

    async def _bring(self, version: int, read: asyncio.Event) -> Export:
        # Exported under the lock too: a sampler that is lost during an evaluation gets the version that is evaluated.
        async with self._holding:
            before = self._clock()
            export: Export = await self._learn("export", self.workers.learner.export(version))
            read.set()
            exported = self._clock()
            await self.fleet.publish(export)
            self._published = Published(export=export, export_s=exported - before, update_s=self._clock() - exported)
            self.buffer.publish(export.version)
            self._bell.ring()
        if self._archive is not None:
            await self._keep(self._archive, export)
        if self._observer is not None:
            self._showing = self._tasks.create_task(self._show(self._observer, export, self._showing))
        return export

    async def _show(self, observer: Observer, export: Export, showing: asyncio.Task[None] | None) -> None:
        """Beside everything else, one version after another."""
        if showing is not None:
            await showing
        if not observer.wants(export.version):
            return
        if export.base is not None and export.base != observer.held:
            complete = await self._complete()
            if complete.version != export.version:  # the next one has been exported meanwhile
                observer.let_pass(export.version)
                return
            export = complete
        observer.see(await self.workers.fetch_version(export))

    async def _keep(self, archive: Archive, export: Export) -> None:
        """Beside learning; the next version is published when this one is on the disk, so that none waits in memory.

        Raises:
            RuntimeError: when the archive does not take it.
        """
        if archive.needs_complete and export.base is not None:
            export = await self._complete()
        patch = await self.workers.fetch_version(export)
        try:
            await asyncio.to_thread(archive.append, patch)
        except ValueError as error:
            raise RuntimeError(f"version {export.version} could not be archived: {error}") from error

    def _due(self, index: int) -> list[EvalSet]:
        """Sets to judge within the stage, of the present version, if it is for samplers."""
        step = self.buffer.step
        if step == self.buffer.end_step(index) or (self.stages[index].sampled and not self._is_published(index)):
            return []
        return self._evaluations.due(step)

    def _evaluate(self, when: str, eval_sets: Sequence[EvalSet]) -> None:
        """Judge the version just published, beside whatever else goes on."""
        assert self._publishing is not None
        self._evaluations.begin(when, eval_sets, self.buffer.step, self._publishing)

    def _log_evaluation(self, kind: str, row: Mapping[str, Any]) -> None:
        self.tracker.log(kind, row)
        if kind == "eval":
            self._history.note(row["step"], {eval_figure(row["eval"]): row["accuracy"]})

    async def _complete(self) -> Export:
        """The version exported last, whole."""
        return await self._learn("complete export", self.workers.learner.complete())

    async def _learn(self, phase: str, call: Any) -> Any:
        return await within(self.settings.limits.learn_s, call, worker=self.workers.learner.name, phase=phase)

    # -- observation ---------------------------------------------------------------------------------------------------

    async def _worker_seconds(self) -> dict[str, Mapping[str, float]]:
        samplers = [*self.fleet.samplers, *self._evaluations.evaluators]
        workers = [self.workers.learner, self.workers.verifier, *samplers]
        seconds = await asyncio.gather(*(worker.seconds() for worker in workers), return_exceptions=True)
        # A worker that dies while it is asked for its times is found out by whoever needs its work.
        return {w.name: s for w, s in zip(workers, seconds, strict=True) if not isinstance(s, BaseException)}

    async def _log_rollouts(self, stage: Stage, groups: Sequence[Finished]) -> None:
        if not stage.sampled:
            return
        for finished in groups[: self.settings.log_groups]:
            group = (await self.workers.fetch(finished.handle)).only(finished.kept_G)
            prompt = self._decode(finished.prompt.token_ids)
            for rollout, judgement, advantage in zip(
                group.rollouts, finished.judgements, finished.advantages_G, strict=True
            ):
                row = {
                    "step": self.buffer.step,
                    "stage": stage.name,
                    "prompt_id": finished.prompt.id,
                    "prompt": prompt,
                    "response": rollout.text,
                    "reward": judgement.reward,
                    "outcome": judgement.outcome,
                    "advantage": advantage,
                    "finish_reason": rollout.finish_reason,
                    "versions": [[span.version, span.start, span.end] for span in rollout.spans],
                }
                self.tracker.log("rollout", row)

    def _event(self, name: str, **details: Any) -> None:
        self.tracker.log("event", {"event": name, **details})


def given_rollout(prompt: Prompt, response_ids: tuple[int, ...] | None) -> Rollout:
    """A response of the data set as a rollout no policy sampled: trained like one, with nothing to correct for.

    Raises:
        ValueError: when the prompt has none.
    """
    if response_ids is None:
        raise ValueError(f"prompt {prompt.id} lacks a response to learn from: this stage needs a source that has them")
    num_response = len(response_ids)
    num_prompt = len(prompt.token_ids)
    return Rollout(
        token_ids=torch.tensor([*prompt.token_ids, *response_ids]),
        loss_mask=torch.tensor([False] * num_prompt + [True] * num_response),
        sampler_logprobs=torch.zeros(num_prompt + num_response),
        temperature=1.0,
        spans=(),
        finish_reason="stop",
        text="",
    )
