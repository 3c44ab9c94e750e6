"""Decodes as CUDA graphs: all kernels of a step launched with one call, for a few batch sizes.

Not yet run on a GPU: its logic is tested on CPU, where "capturing" means to call again.
"""

# S sequences of a size, B blocks of the longest sequence, V vocabulary size

from collections.abc import Callable, Iterator

import torch
from torch.nn.attention.varlen import varlen_attn_out

from granite_ray.model.attention_parts import AttendVarlen
from granite_ray.model.attention_plan import AttentionPlan, decodes_part
from granite_ray.model.batch import ForwardBatch, Segment
from granite_ray.model.granite import GraniteModel
from granite_ray.model.layers import rotation_tables
from granite_ray.model.state import ModelState
from granite_ray.model.workspace import Workspace

Body = Callable[[], torch.Tensor]
NUM_WARM_UPS = 2


class DecodeGraphs:
    """One graph for each power of two up to `max_num_seqs`.

    A step's decodes are padded to the next size. Padding owns the last block and the last state
    slot of `state`: nothing else may use them.

    Args:
        max_num_blocks: Blocks of the longest sequence.
        capture: Makes of a step on fixed buffers one that runs the same again.
        attend_varlen: Paged attention, `varlen_attn_out` or what has its parameters.
    """

    def __init__(
        self,
        model: GraniteModel,
        state: ModelState,
        max_num_seqs: int,
        max_num_blocks: int,
        capture: Callable[[Body], Body] | None = None,
        attend_varlen: AttendVarlen = varlen_attn_out,
    ) -> None:
        self._model = model
        make = capture or capture_cuda_graph
        self._steps = {
            size: _FixedStep(model, state, (size, max_num_blocks), make, attend_varlen)
            for size in _sizes(max_num_seqs)
        }

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Return the logits of a batch of decodes alone, [S, V]; valid until the next call."""
        num_decodes = batch.num_decodes
        size = next(size for size in self._steps if size >= num_decodes)
        logits_SV = self._steps[size].run(batch)
        self._model.num_layers_run += len(self._model.layers)
        return logits_SV[:num_decodes]


class _FixedStep:
    """Buffers for one batch size, and the step that was captured on them."""

    def __init__(
        self,
        model: GraniteModel,
        state: ModelState,
        shape: tuple[int, int],
        capture: Callable[[Body], Body],
        attend_varlen: AttendVarlen,
    ) -> None:
        num_decodes, device = shape[0], next(model.parameters()).device
        num_blocks, block_size = state.key_caches[0].shape[:2] if state.key_caches else (1, 1)
        num_slots = len(state.ssm_states[0]) if state.ssm_states else 0
        self._spare_block, self._spare_slot = num_blocks - 1, num_slots - 1
        self._spare_position = self._spare_block * block_size

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._batch = ForwardBatch(
            segments=(Segment(1, 1),) * num_decodes,
            num_decodes=num_decodes,
            token_ids_T=full(0, num_decodes),
            positions_T=full(0, num_decodes),
            slot_mapping_T=full(self._spare_position, num_decodes),
            block_tables_SB=full(self._spare_block, *shape, dtype=torch.int32),
            state_slots_S=full(self._spare_slot, num_decodes),
            logits_indices_L=torch.arange(num_decodes, device=device),
        )
        self._context_lens_S = full(1, num_decodes, dtype=torch.int32)
        workspace = Workspace()  # its own: another's buffers may be replaced by larger ones

        def step() -> torch.Tensor:
            plan = self._plan(model, state, attend_varlen)
            return model.run(self._batch, plan, state, workspace)

        self._replay = capture(step)

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Fill the buffers and run the step; rows after the batch's are padding."""
        mine, num = self._batch, batch.num_decodes
        _fill(mine.token_ids_T, batch.token_ids_T, 0)
        _fill(mine.positions_T, batch.positions_T, 0)
        _fill(mine.slot_mapping_T, batch.slot_mapping_T, self._spare_position)
        _fill(mine.state_slots_S, batch.state_slots_S, self._spare_slot)
        _fill(self._context_lens_S, batch.positions_T + 1, 1)
        mine.block_tables_SB[:num, : batch.block_tables_SB.shape[1]].copy_(batch.block_tables_SB)
        mine.block_tables_SB[num:, :1] = self._spare_block
        return self._replay()

    def _plan(
        self, model: GraniteModel, state: ModelState, attend_varlen: AttendVarlen
    ) -> AttentionPlan:
        batch, architecture = self._batch, model.architecture
        if not state.key_caches:
            return AttentionPlan((), None, batch.slot_mapping_T, None)
        cache, theta = state.key_caches[0], architecture.rope_theta
        rotation = None
        if theta is not None:
            rotation = rotation_tables(batch.positions_T, theta, architecture.head_dim, cache.dtype)
        part = decodes_part(batch, self._context_lens_S, cache, attend_varlen)
        return AttentionPlan((part,), None, batch.slot_mapping_T, rotation)


def capture_cuda_graph(step: Body) -> Body:
    """Return the step as a CUDA graph; what it returns is overwritten by the next call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is allocated or tuned at first use is not captured
        for _ in range(NUM_WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def _sizes(max_num_seqs: int) -> Iterator[int]:
    size = 1
    while size < max_num_seqs:
        yield size
        size *= 2
    yield size


def _fill(buffer_S: torch.Tensor, values: torch.Tensor, padding: int) -> None:
    buffer_S[: len(values)].copy_(values)
    buffer_S[len(values) :] = padding
