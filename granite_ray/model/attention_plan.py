"""What all attention layers of a step have in common, worked out once."""

# T tokens, D hidden size, H query heads, G key-value heads, A head size, K keys that a query may
# see, Q queries of a block, N blocks, P positions in a block, B blocks of a sequence, S segments,
# W tokens whose keys and values are kept

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.attention import current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn_out

from granite_ray.model.architecture import Architecture
from granite_ray.model.attention_parts import (
    QUERY_BLOCK,
    AttendVarlen,
    AttentionPart,
    CachedKeys,
    DecodesInPlace,
    RunPart,
    TriePart,
    VarlenPart,
)
from granite_ray.model.batch import ForwardBatch, Segment
from granite_ray.model.kernels import CpuKernels, kernels_for
from granite_ray.model.layers import rotation_tables
from granite_ray.model.state import ModelState
from granite_ray.model.trie import visible_nodes


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all attention layers of one step have in common.

    `written_W` are the tokens whose keys and values are kept, at `slots_W`; None: all tokens.
    `rotation` is None where positions are not encoded.
    """

    parts: tuple[AttentionPart, ...]
    written_W: torch.Tensor | None
    slots_W: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None


def plan_attention(
    batch: ForwardBatch, state: ModelState, architecture: Architecture
) -> AttentionPlan:
    """Work out what every attention layer of this step will need."""
    if not state.key_caches:
        return AttentionPlan((), None, batch.slot_mapping_T, None)
    cache, theta = state.key_caches[0], architecture.rope_theta
    rotation = None
    if theta is not None:
        rotation = rotation_tables(batch.positions_T, theta, architecture.head_dim, cache.dtype)
    has_tries = any(segment.parents for segment in batch.segments)
    written_W = batch.slot_mapping_T.ge(0).nonzero()[:, 0] if has_tries else None
    slots_W = batch.slot_mapping_T if written_W is None else batch.slot_mapping_T[written_W]
    return AttentionPlan(plan_parts(batch, cache), written_W, slots_W, rotation)


def plan_parts(batch: ForwardBatch, cache: torch.Tensor) -> tuple[AttentionPart, ...]:
    """Return parts that cover the batch, to be run in this order; `cache` is any layer's."""
    if can_read_blocks(cache):
        return varlen_part(batch), *_trie_parts(batch, cache)
    _, block_size, _, head_dim = cache.shape
    kernels = kernels_for(cache, (block_size, 4), (head_dim, 64)) if batch.num_decodes else None
    if kernels is None:
        return *_run_parts(batch, cache), *_trie_parts(batch, cache)
    decodes = _decodes_in_place(batch, kernels)
    return decodes, *_run_parts(batch, cache, batch.num_decodes), *_trie_parts(batch, cache)


def can_read_blocks(cache: torch.Tensor) -> bool:
    """Whether `varlen_attn` can read this cache in place.

    It takes 16-bit numbers on CUDA. FlashAttention 2, which torch brings along, asks for blocks of
    a multiple of 256 positions; 3 and 4, packages to be installed and activated, take any
    (github.com/Dao-AILab/flash-attention, issues 828 and 1627). Not yet run on a GPU.
    """
    is_narrow = cache.dtype in (torch.float16, torch.bfloat16)
    takes_any = current_flash_attention_impl() in ("FA3", "FA4")
    return cache.is_cuda and is_narrow and (takes_any or cache.shape[1] % 256 == 0)


def _run_parts(batch: ForwardBatch, cache: torch.Tensor, first: int = 0) -> Iterator[AttentionPart]:
    """Return a part for each run, from one of the segments on."""
    runs = [place for place in list(_places(batch))[first:] if not place[0].parents]
    long_runs = [segment for segment, _, _ in runs if segment.num_tokens > 1]
    mask_QK = _causal_mask(max(map(_num_keys, long_runs), default=0), cache)
    for segment, tokens, block_table_B in runs:
        yield RunPart(tokens, _cached_keys(block_table_B, _num_keys(segment), cache), mask_QK)


def _trie_parts(batch: ForwardBatch, cache: torch.Tensor) -> Iterator[AttentionPart]:
    for segment, tokens, block_table_B in _places(batch):
        if segment.parents:
            cached = _cached_keys(block_table_B, segment.num_cached_tokens, cache)
            yield TriePart(tokens, cached, _trie_mask(segment, cache))


def _places(batch: ForwardBatch) -> Iterator[tuple[Segment, slice, torch.Tensor]]:
    """Return each segment with its tokens and its block table."""
    start = 0
    for segment, block_table_B in zip(batch.segments, batch.block_tables_SB, strict=True):
        stop = start + segment.num_tokens
        yield segment, slice(start, stop), block_table_B
        start = stop


def _num_keys(run: Segment) -> int:
    return run.num_cached_tokens + run.num_tokens


def _cached_keys(block_table_B: torch.Tensor, num_keys: int, cache: torch.Tensor) -> CachedKeys:
    num_blocks = -(-num_keys // cache.shape[1])
    return CachedKeys(block_table_B[:num_blocks], num_keys)


def _causal_mask(max_num_keys: int, like: torch.Tensor) -> torch.Tensor:
    """Return what is added to the scores of `QUERY_BLOCK` queries that see that many keys at most.

    Its lower right corner of n rows and k columns is the mask of n queries with k keys, their own
    the last: one mask serves all runs of a step.
    """
    mask_QK = like.new_zeros(QUERY_BLOCK, max(max_num_keys, QUERY_BLOCK))
    hidden_QQ = torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool, device=like.device).triu(1)
    mask_QK[:, -QUERY_BLOCK:].masked_fill_(hidden_QQ, -torch.inf)
    return mask_QK


def _trie_mask(trie: Segment, like: torch.Tensor) -> torch.Tensor:
    num_tokens, num_cached = trie.num_tokens, trie.num_cached_tokens
    mask_TK = like.new_zeros(num_tokens, num_cached + num_tokens)
    is_seen_TT = visible_nodes(trie.parents, like.device)
    mask_TK[:, num_cached:].masked_fill_(~is_seen_TT, -torch.inf)
    return mask_TK


def _decodes_in_place(batch: ForwardBatch, kernels: CpuKernels) -> DecodesInPlace:
    num_keys = [_num_keys(segment) for segment in batch.segments[: batch.num_decodes]]
    tables_SB = batch.block_tables_SB[: batch.num_decodes]
    return DecodesInPlace(kernels, tables_SB, torch.tensor(num_keys), max(num_keys))


def varlen_part(batch: ForwardBatch, attend_varlen: AttendVarlen = varlen_attn_out) -> VarlenPart:
    """Return a part for all segments of a batch."""
    device = batch.token_ids_T.device
    segment_lens = [segment.num_tokens for segment in batch.segments]
    context_lens = [
        segment.num_cached_tokens + (0 if segment.parents else segment.num_tokens)
        for segment in batch.segments
    ]
    return VarlenPart(
        ends_S1=torch.tensor([0, *accumulate(segment_lens)], dtype=torch.int32, device=device),
        context_lens_S=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables_SB=batch.block_tables_SB,
        max_segment_len=max(segment_lens),
        max_context_len=max(1, *context_lens),
        attend_varlen=attend_varlen,
    )


def decodes_part(
    batch: ForwardBatch,
    context_lens_S: torch.Tensor,
    cache: torch.Tensor,
    attend_varlen: AttendVarlen = varlen_attn_out,
) -> VarlenPart:
    """Return a part for a batch of decodes alone whose lengths stand in a tensor, to be changed."""
    num_decodes, num_blocks = batch.block_tables_SB.shape
    return VarlenPart(
        ends_S1=torch.arange(num_decodes + 1, dtype=torch.int32, device=cache.device),
        context_lens_S=context_lens_S,
        block_tables_SB=batch.block_tables_SB,
        max_segment_len=1,
        max_context_len=num_blocks * cache.shape[1],
        attend_varlen=attend_varlen,
    )
