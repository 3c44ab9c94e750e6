"""Steps of an engine without a model: memory that remembers which tokens made its content.

Where a model would compute a token's keys and values, the token's whole beginning is written at
its place; where it would attend, the places are read back and must hold the sequence's own. A
block shared or taken wrongly, or a state restored from the wrong snapshot, shows at once.
"""

from granite_ray.engine.cache import Cache
from granite_ray.engine.scheduler import Scheduler, SchedulerLimits
from granite_ray.engine.sequence import ScheduledSequence, Sequence, SequenceStatus, StepPlan

Tokens = tuple[int, ...]
GARBAGE = (-1,)


class Simulation:
    """A scheduler with its cache, the memory that they rule, and the sequences handed in."""

    def __init__(
        self, limits: SchedulerLimits, num_blocks: int, block_size: int, num_slots: int = 0
    ) -> None:
        self.limits = limits
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_slots = num_slots
        self.cache = Cache(num_blocks, block_size, num_slots, has_state=num_slots > 0)
        self.scheduler = Scheduler(limits, self.cache)
        self.live: dict[int, Sequence] = {}
        self.finished: list[int] = []
        self.num_computed = 0
        self.is_broken = False  # a step was not ended: what comes after it means nothing
        self._jumps: dict[int, list[int]] = {}
        self._num_added = 0
        self._keys: dict[tuple[int, int], Tokens] = {}
        self._states: dict[int, Tokens] = {}

    def add(
        self,
        prompt: Tokens,
        *,
        num_new: int = 1,
        junctions: Tokens = (),
        is_interactive: bool = False,
        branches: tuple[Tokens, ...] | None = None,
        jumps: Tokens = (1,),
    ) -> Sequence:
        """Hand in a sequence that grows by `num_new` tokens, by as many at a time as jumps says."""
        is_scoring = branches is not None
        sequence = Sequence(
            seq_id=self._num_added,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            max_num_tokens=len(prompt) + (0 if is_scoring else num_new),
            junctions=junctions,
            is_interactive=is_interactive,
            is_scoring=is_scoring,
            branches=branches or (),
        )
        self._num_added += 1
        self._jumps[sequence.seq_id] = list(jumps)
        self.live[sequence.seq_id] = sequence
        self.scheduler.add(sequence)
        return sequence

    def step(self, *, prefers_interactive: bool = False) -> StepPlan:
        """Run one step as the engine does, and check all that can be checked on the way."""
        self.is_broken = True
        running_before = self._running()
        plan = self.scheduler.schedule(prefers_interactive=prefers_interactive)
        others_rest = prefers_interactive and any(
            item.sequence.is_interactive for item in plan.scheduled
        )
        assert not others_rest or all(item.sequence.is_interactive for item in plan.scheduled)
        self._check_plan(plan, running_before, others_rest=others_rest)
        for source, target in plan.restored:
            self._states[target] = self._states[source]
        for scheduled in plan.scheduled:
            self._forward(scheduled)
        for source, target in plan.saved:
            self._states[target] = self._states[source]
        needing_logits = [item.sequence for item in plan.scheduled if item.needs_logits]
        self.scheduler.complete(plan)
        for sequence in needing_logits:
            self._sample(sequence)
        self.check_ownership()
        self.is_broken = False
        return plan

    def fail_step(self) -> StepPlan:
        """Run a step whose forward pass ends in the middle: what it was to write is anything."""
        plan = self.scheduler.schedule()
        for source, target in plan.restored:
            self._states[target] = self._states[source]
        for scheduled in plan.scheduled:
            if not scheduled.branches:
                self._forward(scheduled, is_garbled=True)
        self.scheduler.give_up_step()
        self.limits = halved(self.limits)
        self.check_ownership()
        return plan

    def run(self, max_num_steps: int = 2000) -> list[StepPlan]:
        """Step until nothing is left."""
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
            assert len(plans) <= max_num_steps, f"not finished: {list(self.live)}"
        return plans

    def finish(self, sequence: Sequence) -> None:
        """Let go of a sequence, done or cancelled."""
        self.scheduler.finish(sequence)
        del self.live[sequence.seq_id]
        self.finished.append(sequence.seq_id)

    def check_ownership(self) -> None:
        """Compare what the cache counts with what the sequences hold."""
        running = self._running()
        held = {block_id for sequence in running for block_id in sequence.block_table}
        assert self.cache.num_free_blocks == self.num_blocks - len(held)
        slots = [sequence.state_slot for sequence in running]
        if self.num_slots:
            assert len(set(slots)) == len(slots)
            assert min(slots, default=0) >= 0
            assert self.cache.num_free_slots == self.num_slots - len(slots)
        for sequence in self.live.values():
            if sequence.status is SequenceStatus.WAITING:
                assert sequence.block_table == []
                assert sequence.state_slot == -1
                assert sequence.num_computed_tokens == 0
        assert self.scheduler.num_running == len(running)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)

    def _running(self) -> list[Sequence]:
        return [s for s in self.live.values() if s.status is SequenceStatus.RUNNING]

    def _check_plan(
        self, plan: StepPlan, running_before: list[Sequence], *, others_rest: bool
    ) -> None:
        assert plan.scheduled or not self.live, "nothing was planned although there was work"
        sequences = [item.sequence for item in plan.scheduled]
        assert len(set(sequences)) == len(sequences)
        assert len(self._running()) <= self.limits.max_num_seqs
        admitted = set(self._running()) - set(running_before)
        assert admitted <= set(sequences), "whoever is admitted runs at once"
        decodes = plan.scheduled[: plan.num_decodes]
        assert all(item.is_decode for item in decodes)
        num_tokens = sum(item.num_tokens for item in plan.scheduled)
        branches = [branch for item in plan.scheduled for branch in item.branches]
        num_branch_tokens = sum(map(len, branches))
        assert num_branch_tokens <= self.limits.max_num_branch_tokens or len(branches) == 1
        is_alone = len(plan.scheduled) == len(branches) == 1
        assert num_tokens <= self.limits.max_num_batched_tokens or is_alone
        # Whoever is left without tokens was preempted, or lacked memory or budget; a plain decode
        # lacks budget only if others took all of it.
        if num_tokens < self.limits.max_num_batched_tokens - 1:
            for sequence in running_before:
                is_due = sequence.is_interactive or not others_rest
                if is_due and sequence.num_uncomputed_tokens == 1 and sequence not in sequences:
                    assert sequence.status is SequenceStatus.WAITING or self._lacks_block(sequence)
        targets = [target for _, target in (*plan.restored, *plan.saved)]
        assert len(set(targets)) == len(targets)
        kept = {source for source, _ in plan.restored} | {target for _, target in plan.saved}
        assert kept.isdisjoint(sequence.state_slot for sequence in self._running())

    def _lacks_block(self, sequence: Sequence) -> bool:
        return len(sequence.block_table) * self.block_size < len(sequence.token_ids)

    def _forward(self, scheduled: ScheduledSequence, is_garbled: bool = False) -> None:
        sequence = scheduled.sequence
        assert sequence.status is SequenceStatus.RUNNING
        start = sequence.num_computed_tokens
        tokens = tuple(sequence.token_ids)
        for position in range(start):
            assert self._keys.get(self._place(sequence, position)) == tokens[: position + 1]
        if self.num_slots and start:
            assert self._states[sequence.state_slot] == tokens[:start]
        if scheduled.branches:
            self._check_branches(scheduled)
            return
        stop = start + scheduled.num_tokens
        assert 0 < scheduled.num_tokens <= sequence.num_uncomputed_tokens
        for position in range(start, stop):
            content = GARBAGE if is_garbled else tokens[: position + 1]
            self._keys[self._place(sequence, position)] = content
        self._states[sequence.state_slot] = GARBAGE if is_garbled else tokens[:stop]
        self.num_computed += scheduled.num_tokens

    def _check_branches(self, scheduled: ScheduledSequence) -> None:
        sequence, branches = scheduled.sequence, scheduled.branches
        assert sequence.num_uncomputed_tokens == 0
        first = sequence.num_scored_branches
        assert branches == sequence.branches[first : first + len(branches)]
        assert scheduled.num_tokens == sum(map(len, branches))

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block_index, offset = divmod(position, self.block_size)
        return sequence.block_table[block_index], offset

    def _sample(self, sequence: Sequence) -> None:
        if sequence.is_scoring:
            if sequence.num_scored_branches == len(sequence.branches):
                self.finish(sequence)
            return
        jumps = self._jumps[sequence.seq_id]
        num_new = jumps[len(sequence.token_ids) % len(jumps)]
        num_new = min(num_new, sequence.max_num_tokens - len(sequence.token_ids))
        # Alike for all sequences, so that what they generate can be shared as well.
        start = len(sequence.token_ids)
        sequence.token_ids += [position % 3 for position in range(start, start + num_new)]
        if len(sequence.token_ids) == sequence.max_num_tokens:
            self.finish(sequence)


def halved(limits: SchedulerLimits) -> SchedulerLimits:
    """Return the limits after a step that was too large for memory."""
    return SchedulerLimits(
        limits.max_num_seqs,
        max(1, limits.max_num_batched_tokens // 2),
        max(1, limits.max_num_branch_tokens // 2),
    )
