"""The staleness bound as a data structure: admit -> put -> take -> commit. Synchronous, no I/O; the caller waits.

Why the bound holds. Surviving groups of a stage stand in a queue in admission order; with P groups per step, the group
at position k of the queue trains at step t + k // P, where t is the step the learner is working on. Let v be the oldest
version any live sampler holds. A group is admitted only if its step is at most v + S.

    1. A position never grows: groups leave from the front (trained), or from anywhere (dropped), and newcomers stand at
       the back. So a group trains at the step it was admitted for, or earlier.
    2. Its tokens are decoded under versions >= v, since samplers only move forward.
    3. A step updates weights whose version is the step's own number (versions count optimizer steps).
       Hence age = step - version of the oldest token <= (v + S) - v = S.                                        QED

No deadlock: while the learner is at step t every sampler reaches version t, so all P positions of step t are admissible. If
one version in N is published, it reaches t - N + 1 at least, which is enough with N - 1 <= S. With N - 1 = S the groups of N
steps are all of one version: those of the next N are admissible when it is published, and not before.
At most (S + 1) P groups are alive. With S = 0 nothing of step t + 1 is admitted before every sampler holds the weights
step t produced: the synchronous loop. Stages queue separately: a group dropped at the end of one stage is replaced within
that stage, so a stage switch neither drains the pipeline nor shifts the next stage's steps.

Early ends. `end_early` makes the step that a stage's admitted groups reach its last one; all later stages begin that much
earlier. The groups keep their steps, and those of later stages train earlier than they were admitted for (1), so the bound
holds. Groups of the next stage are admitted for the steps right behind, at once: nobody's work is thrown away, nobody waits.

Stragglers. `defer` makes an unfinished group change places with a finished one behind it. This is the one move that
can make a group train later than it was admitted for; the learner then masks the tokens older than S
(`core.batching.collate`), so the bound still holds for every trained token, and no whole group is thrown away for its age.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

DropReason = Literal["filtered", "failed"]
PREFETCH = 1
"""Steps of demonstrations held ready beyond the one in progress: they have no age, but the buffer stays bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """The shape of a stage, all the buffer needs to know of it."""

    num_steps: int
    groups_per_step: int
    max_staleness: int | None
    """S, in versions; None for demonstrations, which no policy sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """The right to put one group into the pipeline."""

    id: int
    stage: int
    ordinal: int
    """Which prompt of the stage's source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a run stands, enough to resume it: derived from versions, so nothing needs repair afterwards."""

    step: int = 0
    next_ordinals: tuple[int, ...] = ()
    """Per stage: the first prompt never admitted."""
    pending: tuple[tuple[int, ...], ...] = ()
    """Per stage: admitted prompts neither trained nor dropped yet, in order; a resumed run admits them first."""
    sources: tuple[Any, ...] = ()
    """Per stage: the state of its prompts, by which these ordinals are the prompts that they were."""
    num_steps: tuple[int, ...] = ()
    """Per stage: its steps, fewer than planned where it ends early."""
    temperatures: tuple[float, ...] = ()
    """Per stage: at which its next groups are drawn."""


@dataclass(slots=True)
class _Entry:
    ticket: Ticket
    group: Any = None
    oldest_version: int | None = None
    finished: bool = False
    taken: bool = False
    deferred: bool = False


@dataclass(slots=True)
class _StageQueue:
    plan: StagePlan
    num_steps: int
    next_ordinal: int
    pending: deque[int]
    first_step: int = 0
    entries: list[_Entry] = field(default_factory=list)

    @property
    def end_step(self) -> int:
        return self.first_step + self.num_steps


class RolloutBuffer:
    """Holds every group between admission and training, in order. See the module docstring for the proof."""

    def __init__(self, plans: Sequence[StagePlan], start: Position | None = None) -> None:
        start = start or Position()
        self.step = start.step
        """The optimizer step in progress; equals the version of the learner's weights."""
        self.published: int | None = None
        """The oldest version any live sampler has proved to hold; None before the first proof."""
        self.counts: Counter[str] = Counter()
        self._tickets = 0
        self._queues: list[_StageQueue] = []
        for index, plan in enumerate(plans):
            num_steps = start.num_steps[index] if start.num_steps else plan.num_steps
            next_ordinal = start.next_ordinals[index] if start.next_ordinals else 0
            pending = deque(start.pending[index] if start.pending else ())
            self._queues.append(_StageQueue(plan, num_steps, next_ordinal, pending))
        self._line_up()
        self._alive: dict[int, _Entry] = {}

    # -- what the two loops call ---------------------------------------------------------------------------------------

    def admit(self) -> Ticket | None:
        """A ticket for one new group, or None while the bound allows no more."""
        for stage, queue in enumerate(self._queues):
            plan = queue.plan
            step = max(queue.first_step, self.step) + len(queue.entries) // plan.groups_per_step
            if step >= queue.end_step:
                continue
            if plan.max_staleness is None:
                admissible = step <= self.step + PREFETCH
            else:
                admissible = self.published is not None and step <= self.published + plan.max_staleness
            if not admissible:
                return None
            if queue.pending:
                ordinal = queue.pending.popleft()
            else:
                ordinal, queue.next_ordinal = queue.next_ordinal, queue.next_ordinal + 1
            ticket = Ticket(id=self._tickets, stage=stage, ordinal=ordinal)
            self._tickets += 1
            entry = _Entry(ticket)
            queue.entries.append(entry)
            self._alive[ticket.id] = entry
            self.counts["admitted"] += 1
            return ticket
        return None

    def put(self, ticket: Ticket, group: Any, *, oldest_version: int | None) -> None:
        """Hand in the finished group of `ticket`; `oldest_version` is that of its oldest token."""
        entry = self._alive[ticket.id]
        assert not entry.finished, f"group {ticket.id} was handed in twice"
        entry.group, entry.oldest_version, entry.finished = group, oldest_version, True

    def drop(self, ticket: Ticket, reason: DropReason) -> None:
        """Give up on a group: everything behind it moves up one place, and another may be admitted at once."""
        entry = self._alive.pop(ticket.id)
        assert not entry.taken, f"group {ticket.id} is being trained and cannot be dropped"
        self._queues[ticket.stage].entries.remove(entry)
        self.counts[reason] += 1

    def take(self) -> list[Any]:
        """The groups of the step in progress that have finished since the last call, in admission order.

        Raises:
            RuntimeError: if a group breaks the staleness bound. Admission rules it out, so this is an error, no filter.
        """
        current, taken = self._current(), []
        bound = current.plan.max_staleness
        for entry in current.entries[: current.plan.groups_per_step]:
            if not entry.finished or entry.taken:
                continue
            if bound is not None and not entry.deferred:
                age = self.step - entry.oldest_version  # type: ignore[operator]
                if age > bound:
                    raise RuntimeError(
                        f"staleness bound broken: group {entry.ticket.id} has tokens of version {entry.oldest_version},"
                        f" step {self.step} may train on {self.step - bound} or newer (max_staleness = {bound})"
                    )
            entry.taken = True
            taken.append(entry.group)
            entry.group = None  # the learner has it: nothing here keeps its tokens alive
        return taken

    @property
    def num_missing(self) -> int:
        """Groups the step in progress still waits for."""
        current = self._current()
        return current.plan.groups_per_step - sum(e.taken for e in current.entries)

    def defer(self) -> int:
        """Let finished groups of later steps overtake unfinished ones of this step; returns how many did."""
        current = self._current()
        groups_per_step, entries = current.plan.groups_per_step, current.entries
        late = [e for e in entries[:groups_per_step] if not e.finished]
        ready = [e for e in entries[groups_per_step:] if e.finished]
        for straggler, substitute in zip(late, ready, strict=False):
            # They change places and nobody else moves: no third group may train later than it was admitted for.
            i, j = entries.index(straggler), entries.index(substitute)
            entries[i], entries[j] = substitute, straggler
            straggler.deferred = True
        return min(len(late), len(ready))

    def commit(self) -> None:
        """The step in progress is done: its groups are trained and leave."""
        current = self._current()
        size = current.plan.groups_per_step
        trained = current.entries[:size]
        assert len(trained) == size and all(e.taken for e in trained), "commit before every group of the step was taken"
        del current.entries[:size]
        for entry in trained:
            del self._alive[entry.ticket.id]
        self.counts["trained"] += size
        self.step += 1

    def end_early(self, stage: int) -> bool:
        """End `stage` with the step that its admitted groups reach; False where it ends there anyway, or early already.

        Call right after a `commit` of the stage, before groups are admitted again: with max_staleness = 0 it is over then.
        """
        queue = self._queues[stage]
        assert queue.first_step < self.step <= queue.end_step, f"step {self.step - 1} was none of stage {stage}"
        num_admitted = len(queue.entries) + len(queue.pending)
        end_step = self.step + -(-num_admitted // queue.plan.groups_per_step)
        if queue.num_steps < queue.plan.num_steps or end_step >= queue.end_step:
            return False
        queue.num_steps = end_step - queue.first_step
        self._line_up()
        return True

    def publish(self, version: int) -> None:
        """Every live sampler now holds `version` or newer."""
        assert version <= self.step and (self.published is None or self.published <= version), (version, self.step)
        self.published = version

    # -- what observers ask --------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.step >= self._queues[-1].end_step

    @property
    def in_flight(self) -> int:
        return sum(not e.finished for e in self._alive.values())

    @property
    def buffered(self) -> int:
        return sum(e.finished and not e.taken for e in self._alive.values())

    def position(self) -> Position:
        """Call between steps, before the next group is taken."""
        return Position(
            step=self.step,
            next_ordinals=tuple(q.next_ordinal for q in self._queues),
            pending=tuple((*(e.ticket.ordinal for e in q.entries), *q.pending) for q in self._queues),
            num_steps=tuple(q.num_steps for q in self._queues),
        )

    def stage_of(self, step: int) -> int:
        """Index of the stage that `step` belongs to."""
        return next(i for i, q in enumerate(self._queues) if step < q.end_step)

    def first_step(self, stage: int) -> int:
        return self._queues[stage].first_step

    def end_step(self, stage: int) -> int:
        """The version that `stage` ends with."""
        return self._queues[stage].end_step

    def check_accounting(self) -> None:
        """Nothing is lost and nothing counted twice: admitted = in flight + buffered + being trained + ended."""
        taken = sum(e.taken for e in self._alive.values())
        ended = sum(self.counts[reason] for reason in ("trained", "filtered", "failed"))
        assert self.counts["admitted"] == self.in_flight + self.buffered + taken + ended, self.snapshot()

    def snapshot(self) -> Mapping[str, int]:
        return {"in_flight": self.in_flight, "buffered": self.buffered, **self.counts}

    def _line_up(self) -> None:
        first_step = 0
        for queue in self._queues:
            queue.first_step, first_step = first_step, first_step + queue.num_steps

    def _current(self) -> _StageQueue:
        return self._queues[self.stage_of(self.step)]
