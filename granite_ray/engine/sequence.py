"""A sequence as the scheduler sees it: token ids and integers, no tensors, no text."""

from dataclasses import dataclass, field
from enum import Enum


class SequenceStatus(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's living state for one request.

    A sequence that generates grows: whoever samples appends to `token_ids`. One that scores has
    `branches`: beginnings of choices that are weighed after its prompt, each by itself; its
    `token_ids` stay the prompt.

    Attributes:
        seq_id: Given in the order of arrival.
        token_ids: The prompt, then what was chosen.
        num_prompt_tokens: Length of the prompt.
        max_num_tokens: The most tokens it can come to have, branches left out.
        junctions: Positions, ascending, up to which others begin in the same way.
        is_interactive: Goes before those that are not. The scheduler sets it on one that others
            have overtaken for long.
        branches: Token ids of each branch of a sequence that scores; none is empty.
        num_computed_tokens: Of `token_ids`, how many are in the cache.
        num_cached_tokens: Of the prompt, how many were found in the cache at first admission.
        num_scored_branches: Of `branches`, how many are done, the first ones first.
        block_table: Block ids of all its tokens, in order; none while it waits.
        block_digests: Of each full block, as far as known, the digest of all tokens up to its end.
        state_slot: Its Mamba state, -1 where it has none.
        num_preemptions: How often its blocks were taken back.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_num_tokens: int
    junctions: tuple[int, ...] = ()
    is_interactive: bool = False
    is_scoring: bool = False
    branches: tuple[tuple[int, ...], ...] = ()
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_scored_branches: int = 0
    block_table: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    state_slot: int = -1
    num_preemptions: int = 0

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens known and not yet in the cache: 1 for a plain decode."""
        return len(self.token_ids) - self.num_computed_tokens


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """What one sequence does in a step.

    Without branches: its next `num_tokens` tokens go through the model and into the cache. With
    branches: those of its branches from `num_scored_branches` on, `num_tokens` tokens in all; the
    prompt is in the cache.
    """

    sequence: Sequence
    num_tokens: int
    branches: tuple[tuple[int, ...], ...] = ()

    @property
    def needs_logits(self) -> bool:
        """Whether the step reaches the sequence's last known token, or goes along branches."""
        return bool(self.branches) or self.num_tokens == self.sequence.num_uncomputed_tokens

    @property
    def is_decode(self) -> bool:
        """Whether it is one token, a cached one before it, and no branch."""
        return self.num_tokens == 1 and self.sequence.num_computed_tokens > 0 and not self.branches


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler chose for one step; decodes come first.

    `restored` and `saved` are pairs of state slots, source and target: those of snapshots that
    sequences start from, copied before the forward pass, and of sequences whose state is kept,
    copied after it.
    """

    scheduled: tuple[ScheduledSequence, ...]
    restored: tuple[tuple[int, int], ...] = ()
    saved: tuple[tuple[int, int], ...] = ()

    @property
    def num_decodes(self) -> int:
        """How many decodes stand at the front; to be asked before the plan is completed."""
        return sum(scheduled.is_decode for scheduled in self.scheduled)
