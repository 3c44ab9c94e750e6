"""A step's plan → forward batch → logits, on one rank. Decides nothing."""

import torch

from granite_ray.engine.choices import make_trie
from granite_ray.engine.graphs import DecodeGraphs
from granite_ray.engine.sequence import ScheduledSequence, StepPlan
from granite_ray.model.batch import ForwardBatch, Segment
from granite_ray.model.granite import GraniteModel
from granite_ray.model.state import ModelState


class Runner:
    """A model with the memory of its running sequences."""

    def __init__(
        self,
        model: GraniteModel,
        state: ModelState,
        block_size: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self._graphs = graphs
        self._state = state
        self._block_size = block_size
        self._device = next(model.parameters()).device

    @property
    def num_steps(self) -> int:
        """Layers run so far: grows also within one long step."""
        return self.model.num_layers_run

    @property
    def dtype(self) -> torch.dtype:
        """That of weights, keys and values."""
        return next(self.model.parameters()).dtype

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Run one step.

        Returns:
            Float32 logits, [rows, vocabulary]: in the order of the plan, a row for each sequence
            that reaches its last known token, and one for each node of the trie of branches.
        """
        self._state.copy_slots(plan.restored)
        batch = build_batch(plan, self._block_size, self._device)
        if self._graphs is not None and plan.num_decodes == len(plan.scheduled):
            logits = self._graphs.run(batch)
        else:
            logits = self.model(batch, self._state)
        self._state.copy_slots(plan.saved)
        return logits

    def run_empty(self) -> None:
        """Take part in a step of this rank's group without tokens."""
        self.model.run_empty()


def num_logits_rows(scheduled: ScheduledSequence) -> int:
    """Return how many rows of a step's logits belong to one of its sequences."""
    if scheduled.branches:
        return len(make_trie(scheduled.branches).token_ids)
    return int(scheduled.needs_logits)


def build_batch(plan: StepPlan, block_size: int, device: torch.device) -> ForwardBatch:
    """Lay a plan's tokens flat."""
    segments: list[Segment] = []
    token_ids: list[int] = []
    positions: list[int] = []
    logits_indices: list[int] = []
    for scheduled in plan.scheduled:
        segment, new_token_ids, new_positions = _lay_out(scheduled)
        token_ids += new_token_ids
        positions += new_positions
        num_rows = num_logits_rows(scheduled)
        logits_indices += range(len(token_ids) - num_rows, len(token_ids))
        segments.append(segment)
    positions_T = torch.tensor(positions)
    block_tables_SB = _pad([item.sequence.block_table for item in plan.scheduled])
    slot_mapping_T = _map_slots(segments, positions_T, block_tables_SB, block_size)
    return ForwardBatch(
        segments=tuple(segments),
        num_decodes=plan.num_decodes,
        token_ids_T=torch.tensor(token_ids).to(device),
        positions_T=positions_T.to(device),
        slot_mapping_T=slot_mapping_T.to(device),
        block_tables_SB=block_tables_SB.to(device),
        state_slots_S=torch.tensor([segment.state_slot for segment in segments]).to(device),
        logits_indices_L=torch.tensor(logits_indices, dtype=torch.int64).to(device),
    )


def _lay_out(scheduled: ScheduledSequence) -> tuple[Segment, list[int], list[int]]:
    """Return one sequence's segment, token ids and positions."""
    sequence = scheduled.sequence
    start, slot = sequence.num_computed_tokens, sequence.state_slot
    if scheduled.branches:
        trie = make_trie(scheduled.branches)
        positions: list[int] = []
        for parent in trie.parents:
            positions.append(start if parent < 0 else positions[parent] + 1)
        segment = Segment(len(trie.token_ids), start, slot, trie.parents)
        return segment, list(trie.token_ids), positions
    stop = start + scheduled.num_tokens
    segment = Segment(scheduled.num_tokens, start, slot)
    return segment, sequence.token_ids[start:stop], list(range(start, stop))


def _pad(block_tables: list[list[int]]) -> torch.Tensor:
    width = max(map(len, block_tables), default=0)
    rows = [table + [0] * (width - len(table)) for table in block_tables]
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), width)


def _map_slots(
    segments: list[Segment],
    positions_T: torch.Tensor,
    block_tables_SB: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Return where in the cache each token is written, -1 where it is not."""
    is_written = torch.tensor([not segment.parents for segment in segments])
    num_tokens = torch.tensor([segment.num_tokens for segment in segments])
    rows_T = torch.arange(len(segments)).repeat_interleave(num_tokens)
    blocks_T = block_tables_SB[rows_T, _within(positions_T // block_size, block_tables_SB)]
    slots_T = blocks_T.long() * block_size + positions_T % block_size
    return slots_T.where(is_written[rows_T], -1)


def _within(columns_T: torch.Tensor, block_tables_SB: torch.Tensor) -> torch.Tensor:
    """Keep columns of branches, which may lie behind the last block, inside of the table."""
    return columns_T.clamp(max=block_tables_SB.shape[1] - 1)
