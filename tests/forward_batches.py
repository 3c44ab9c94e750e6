"""Token lists → `ForwardBatch`, in the plainest way, with blocks handed out in a shuffled order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from granite_ray.model.batch import ForwardBatch, Segment
from granite_ray.model.granite import GraniteModel
from granite_ray.model.state import allocate_state

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Turn:
    """Tokens that one sequence contributes to a step; with `parents` they are a trie."""

    seq_id: int
    token_ids: Sequence[int]
    parents: tuple[int, ...] = ()


@dataclass
class Stepper:
    """Runs a model step by step and remembers what each sequence has in the cache."""

    model: GraniteModel
    num_blocks: int = 512
    num_slots: int = 32
    num_cached: dict[int, int] = field(default_factory=dict)
    block_tables: dict[int, list[int]] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shuffle = random.Random(0).shuffle
        self.free_blocks, self.free_slots = (
            list(range(self.num_blocks)),
            list(range(self.num_slots)),
        )
        shuffle(self.free_blocks)
        shuffle(self.free_slots)
        weight = self.model.norm.weight
        self.state = allocate_state(
            self.model.architecture,
            self.num_blocks,
            BLOCK_SIZE,
            self.num_slots,
            weight.dtype,
            weight.device,
        )
        # What nobody wrote must not matter.
        for tensors in (self.state.key_caches, self.state.value_caches, self.state.conv_states):
            for tensor in tensors:
                tensor.fill_(float("nan"))
        for tensor in self.state.ssm_states:
            tensor.fill_(float("nan"))

    def run(self, *turns: Turn) -> list[torch.Tensor]:
        """Run one step; return for each turn the logits after each of its tokens."""
        ordered = sorted(turns, key=lambda turn: not self._is_decode(turn))
        batch = self.build_batch(ordered)
        with torch.inference_mode():
            logits = self.model(batch, self.state)
        pieces = dict(
            zip(map(id, ordered), logits.split([len(t.token_ids) for t in ordered]), strict=True)
        )
        for turn in turns:
            if not turn.parents:
                self.num_cached[turn.seq_id] += len(turn.token_ids)
        return [pieces[id(turn)] for turn in turns]

    def build_batch(self, turns: Sequence[Turn]) -> ForwardBatch:
        """Build the batch of these turns, decodes first; every position's logits are wanted."""
        segments = [self._segment(turn) for turn in turns]
        width = max(len(self.block_tables[turn.seq_id]) for turn in turns)
        tables = [
            self.block_tables[turn.seq_id] + [0] * (width - len(self.block_tables[turn.seq_id]))
            for turn in turns
        ]
        pairs = list(zip(turns, segments, strict=True))
        positions = [position for _, segment in pairs for position in _positions(segment)]
        slot_mapping = [
            slot for turn, segment in pairs for slot in self._slot_mapping(turn, segment)
        ]
        token_ids = [token_id for turn in turns for token_id in turn.token_ids]
        return ForwardBatch(
            segments=tuple(segments),
            num_decodes=sum(map(self._is_decode, turns)),
            token_ids_T=torch.tensor(token_ids),
            positions_T=torch.tensor(positions),
            slot_mapping_T=torch.tensor(slot_mapping),
            block_tables_SB=torch.tensor(tables, dtype=torch.int32),
            state_slots_S=torch.tensor([segment.state_slot for segment in segments]),
            logits_indices_L=torch.arange(len(token_ids)),
        )

    def _is_decode(self, turn: Turn) -> bool:
        is_later = self.num_cached.get(turn.seq_id, 0) > 0
        return len(turn.token_ids) == 1 and is_later and not turn.parents

    def _segment(self, turn: Turn) -> Segment:
        if turn.seq_id not in self.slots:
            self.slots[turn.seq_id] = self.free_slots.pop()
            self.num_cached[turn.seq_id], self.block_tables[turn.seq_id] = 0, []
        num_cached = self.num_cached[turn.seq_id]
        num_kept = num_cached + (0 if turn.parents else len(turn.token_ids))
        while len(self.block_tables[turn.seq_id]) * BLOCK_SIZE < num_kept:
            self.block_tables[turn.seq_id].append(self.free_blocks.pop())
        return Segment(len(turn.token_ids), num_cached, self.slots[turn.seq_id], turn.parents)

    def _slot_mapping(self, turn: Turn, segment: Segment) -> list[int]:
        if turn.parents:
            return [-1] * segment.num_tokens
        table = self.block_tables[turn.seq_id]
        return [
            table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for position in _positions(segment)
        ]


def _positions(segment: Segment) -> list[int]:
    if not segment.parents:
        return list(
            range(segment.num_cached_tokens, segment.num_cached_tokens + segment.num_tokens)
        )
    positions: list[int] = []
    for parent in segment.parents:
        positions.append(segment.num_cached_tokens if parent < 0 else positions[parent] + 1)
    return positions
