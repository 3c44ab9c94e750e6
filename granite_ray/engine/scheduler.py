"""Who runs in the next step: admission, preemption, turns. Decides on integers; computes nothing.

A step's tokens are given out in this order: branches of scoring sequences (few, and bounded),
decodes, runs of those already running, runs of those newly admitted; among equals, precedence
decides, see `_precedence`.
"""

from bisect import insort
from dataclasses import dataclass, field, replace
from itertools import chain

from granite_ray.engine.cache import Cache
from granite_ray.engine.sequence import ScheduledSequence, Sequence, SequenceStatus, StepPlan

MAX_OVERTAKES = 4
"""Interactive admissions after which the oldest of the others that got nothing counts as
interactive for good: under a steady stream of interactive work, others are one admission in 4."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What one step and one replica may hold.

    Attributes:
        max_num_seqs: Sequences that run at once.
        max_num_batched_tokens: Tokens in one step.
        max_num_branch_tokens: Tokens of branches in one step; each costs a row of logits. A branch
            is not divided: one that is longer than a limit goes without another beside it.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_branch_tokens: int


class Scheduler:
    """All sequences that are not finished.

    Every sequence finishes: the one of highest precedence always gets its blocks, if need be from
    all others, and only finitely many ever come to precede a given one.
    """

    def __init__(self, limits: SchedulerLimits, cache: Cache) -> None:
        self._limits = limits
        self._cache = cache
        self._waiting: list[Sequence] = []  # both lists: highest precedence first
        self._running: list[Sequence] = []
        self._num_overtakes = 0
        self.num_cached_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence is not finished."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        assert sequence.token_ids, "there is nothing to start from"
        assert sequence.max_num_tokens <= self._cache.max_num_tokens, "it must fit when alone"
        insort(self._waiting, sequence, key=_precedence)

    def schedule(self, *, prefers_interactive: bool = False) -> StepPlan:
        """Choose what the next step does; nothing only if there is nothing to do.

        Args:
            prefers_interactive: Leave the others out, if an interactive sequence can do something.
        """
        num_running = len(self._running)
        num_ready = self._make_room()
        has_room = num_ready == num_running  # whoever runs gets memory before whoever waits
        ready = self._running[:num_ready]
        step = _Step(self._limits, self._cache)
        if prefers_interactive:
            self._fill(step, _interactive(ready), _interactive(self._waiting), has_room=has_room)
        if not step.scheduled:
            self._fill(step, ready, self._waiting, has_room=has_room)
            if self._num_overtakes >= MAX_OVERTAKES:
                self._promote(step)
        return step.plan()

    def complete(self, plan: StepPlan) -> None:
        """Take note that a plan's forward pass and copies are done.

        To be called before new tokens are appended, and before any sequence is finished.
        """
        for scheduled in plan.scheduled:
            sequence = scheduled.sequence
            if scheduled.branches:
                sequence.num_scored_branches += len(scheduled.branches)
            else:
                self._cache.advance(sequence, scheduled.num_tokens)
        self._cache.end_step()

    def give_up_step(self) -> None:
        """Take note that a planned step failed for lack of memory: plan half as much from now on.

        All sequences wait and compute again what the cache does not hold; a state may have moved.
        """
        while self._running:
            self._preempt(self._running.pop())
        self._cache.give_up_step()
        self._limits = replace(
            self._limits,
            max_num_batched_tokens=max(1, self._limits.max_num_batched_tokens // 2),
            max_num_branch_tokens=max(1, self._limits.max_num_branch_tokens // 2),
        )

    def finish(self, sequence: Sequence) -> None:
        """Let go of a sequence, done or cancelled, between two steps."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._cache.release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _make_room(self) -> int:
        """Give every running sequence the blocks of its tokens, from the last ones if need be.

        Returns:
            How many have them. The last may lack some: it keeps what it holds and sits this step
            out.
        """
        index = 0
        while index < len(self._running):
            while not self._cache.grow(self._running[index]):
                if index == len(self._running) - 1:
                    return index
                self._preempt(self._running.pop())
            index += 1
        return index

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks back; it waits, and computes again what is not found then."""
        self._cache.release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        insort(self._waiting, sequence, key=_precedence)

    def _fill(
        self, step: "_Step", ready: list[Sequence], waiting: list[Sequence], *, has_room: bool
    ) -> None:
        """Give a step's tokens to sequences that run, and then to those that wait."""
        # Without uncomputed tokens: branches. With one: a decode. With more: a run.
        for sequence in sorted(ready, key=_num_uncomputed_up_to_two):
            step.add(sequence)
        if has_room:
            self._admit(step, ready, waiting)

    def _admit(self, step: "_Step", ready: list[Sequence], waiting: list[Sequence]) -> None:
        """Let waiting sequences run while there is room, in order of precedence.

        Left out for now are those with a junction that a sequence at work is about to reach:
        they will find what it computes. A block for each running sequence is left free, lest the
        next step preempts whom this one admits.
        """
        max_num_seqs = self._limits.max_num_seqs
        if not waiting or len(self._running) == max_num_seqs:
            return
        in_progress = set(chain.from_iterable(map(self._cache.junctions_ahead, ready)))
        for sequence in waiting[:max_num_seqs]:
            if len(self._running) == max_num_seqs or step.num_tokens_left <= 0:
                return
            if not in_progress.isdisjoint(self._cache.junctions_ahead(sequence)):
                continue
            if not self._cache.admit(sequence, num_spare_blocks=len(self._running)):
                return
            self._start(sequence)
            step.add(sequence)
            in_progress.update(self._cache.junctions_ahead(sequence))

    def _start(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_precedence)
        sequence.status = SequenceStatus.RUNNING
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_cached_tokens += min(sequence.num_cached_tokens, sequence.num_prompt_tokens)
        self._num_overtakes += sequence.is_interactive

    def _promote(self, step: "_Step") -> None:
        """Let the oldest sequence of lower precedence that got nothing count as interactive."""
        self._num_overtakes = 0
        served = {id(scheduled.sequence) for scheduled in step.scheduled}
        passed_over = [
            sequence
            for sequence in chain(self._running, self._waiting)
            if not sequence.is_interactive and id(sequence) not in served
        ]
        if passed_over:
            min(passed_over, key=_precedence).is_interactive = True
            self._running.sort(key=_precedence)
            self._waiting.sort(key=_precedence)


@dataclass(slots=True)
class _Step:
    """A plan in the making, and what is left of its limits."""

    limits: SchedulerLimits
    cache: Cache
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    num_tokens_left: int = field(init=False)
    num_branch_tokens_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens_left = self.limits.max_num_batched_tokens
        self.num_branch_tokens_left = self.limits.max_num_branch_tokens

    def add(self, sequence: Sequence) -> None:
        """Let a sequence do what there is to do for it, as far as the limits allow."""
        num_uncomputed = sequence.num_uncomputed_tokens
        if not num_uncomputed:
            self._add_branches(sequence)
        elif self.num_tokens_left > 0:
            num_tokens = min(num_uncomputed, self.num_tokens_left)
            num_tokens = self.cache.stop_at_junction(sequence, num_tokens)
            self.scheduled.append(ScheduledSequence(sequence, num_tokens))
            self.num_tokens_left -= num_tokens

    def plan(self) -> StepPlan:
        """Return the plan, decodes first."""
        scheduled = sorted(self.scheduled, key=lambda scheduled: not scheduled.is_decode)
        return StepPlan(tuple(scheduled), self.cache.restored, self.cache.saved)

    def _add_branches(self, sequence: Sequence) -> None:
        first = last = sequence.num_scored_branches
        num_tokens = 0
        for branch in sequence.branches[first:]:
            if (self.scheduled or num_tokens) and len(branch) > self._num_left_for_branches():
                break
            self.num_tokens_left -= len(branch)
            self.num_branch_tokens_left -= len(branch)
            num_tokens += len(branch)
            last += 1
        if num_tokens:
            branches = sequence.branches[first:last]
            self.scheduled.append(ScheduledSequence(sequence, num_tokens, branches))

    def _num_left_for_branches(self) -> int:
        return min(self.num_tokens_left, self.num_branch_tokens_left)


def _interactive(sequences: list[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.is_interactive]


def _precedence(sequence: Sequence) -> tuple[bool, int]:
    """Order sequences: interactive ones first, then in order of arrival."""
    return not sequence.is_interactive, sequence.seq_id


def _num_uncomputed_up_to_two(sequence: Sequence) -> int:
    return min(sequence.num_uncomputed_tokens, 2)
