"""What the tokens of a step attend to: all that differs between runs, tries and devices.

Where a kernel reads blocks in place, one part is for all runs. Elsewhere every run is a part, and
its keys and values are copied together for `scaled_dot_product_attention`. So is every trie.
"""

# T tokens, H query heads, G key-value heads, A head size, K keys that a query may see, Q queries of
# a block, N blocks, P positions in a block, B blocks of one sequence, S segments

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention import current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn_out

from granite_ray.model.batch import ForwardBatch, Segment
from granite_ray.model.trie import visible_nodes
from granite_ray.model.workspace import Workspace

QUERY_BLOCK = 256
"""Queries that attend together: more would look at more keys that they may not see."""


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's queries, its keys and values of the step's tokens, and its cache."""

    queries_THA: torch.Tensor
    keys_TGA: torch.Tensor
    values_TGA: torch.Tensor
    key_cache: torch.Tensor  # [N, P, G, A]
    value_cache: torch.Tensor  # [N, P, G, A]
    scale: float


AttendVarlen = Callable[..., object]
"""Has the parameters of `varlen_attn_out`, which needs CUDA."""


class AttentionPart(Protocol):
    """Some of the step's tokens, and what they see."""

    def attend(self, heads: Heads, attended_THA: torch.Tensor, workspace: Workspace) -> None:
        """Write these tokens' rows of `attended_THA`."""
        ...


def plan_parts(batch: ForwardBatch, cache: torch.Tensor) -> tuple[AttentionPart, ...]:
    """Return parts that cover the batch, to be run in this order; `cache` is any layer's."""
    if can_read_blocks(cache):
        return varlen_part(batch), *_trie_parts(batch, cache)
    return *_run_parts(batch, cache), *_trie_parts(batch, cache)


def can_read_blocks(cache: torch.Tensor) -> bool:
    """Whether `varlen_attn` can read this cache in place.

    It takes 16-bit numbers on CUDA. FlashAttention 2, which torch brings along, asks for blocks of
    a multiple of 256 positions; 3 and 4, packages to be installed and activated, take any
    (github.com/Dao-AILab/flash-attention, issues 828 and 1627). Not yet run on a GPU.
    """
    is_narrow = cache.dtype in (torch.float16, torch.bfloat16)
    takes_any = current_flash_attention_impl() in ("FA3", "FA4")
    return cache.is_cuda and is_narrow and (takes_any or cache.shape[1] % 256 == 0)


def _run_parts(batch: ForwardBatch, cache: torch.Tensor) -> Iterator[AttentionPart]:
    runs = [place for place in _places(batch) if not place[0].parents]
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


# scaled_dot_product_attention ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """The first `num_keys` positions of a sequence, which stand in these blocks."""

    block_ids_B: torch.Tensor
    num_keys: int

    def gather(
        self, cache: torch.Tensor, name: str, workspace: Workspace, num_more: int = 0
    ) -> torch.Tensor:
        """Copy them together, [K, G, A]; leave room for `num_more` rows at the end."""
        num_blocks, block_size = len(self.block_ids_B), cache.shape[1]
        num_rows = num_blocks * block_size
        rows = workspace.take(name, (num_rows + num_more, *cache.shape[2:]), cache)
        blocks = rows[:num_rows].view(num_blocks, *cache.shape[1:])
        torch.index_select(cache, 0, self.block_ids_B, out=blocks)
        return rows[: self.num_keys + num_more]


def _cached_keys(block_table_B: torch.Tensor, num_keys: int, cache: torch.Tensor) -> CachedKeys:
    num_blocks = -(-num_keys // cache.shape[1])
    return CachedKeys(block_table_B[:num_blocks], num_keys)


@dataclass(frozen=True, slots=True)
class RunPart:
    """The tokens of a run: they see what is cached before them, and each other so far.

    Their own keys are in the cache by now. `mask_QK` is that of `_causal_mask`.
    """

    tokens: slice
    cached: CachedKeys
    mask_QK: torch.Tensor

    def attend(self, heads: Heads, attended_THA: torch.Tensor, workspace: Workspace) -> None:
        keys_KGA = self.cached.gather(heads.key_cache, "keys", workspace)
        values_KGA = self.cached.gather(heads.value_cache, "values", workspace)
        for start in range(self.tokens.start, self.tokens.stop, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, self.tokens.stop)
            num_keys = len(keys_KGA) - (self.tokens.stop - stop)
            _attend(
                heads.queries_THA[start:stop],
                keys_KGA[:num_keys],
                values_KGA[:num_keys],
                None if stop - start == 1 else self.mask_QK[start - stop :, -num_keys:],
                heads.scale,
                attended_THA[start:stop],
            )


@dataclass(frozen=True, slots=True)
class TriePart:
    """A trie: each token sees what is cached and its ancestors; nothing of it is cached."""

    tokens: slice
    cached: CachedKeys
    mask_TK: torch.Tensor

    def attend(self, heads: Heads, attended_THA: torch.Tensor, workspace: Workspace) -> None:
        tokens, num_cached = self.tokens, self.cached.num_keys
        num_own = tokens.stop - tokens.start
        keys_KGA = self.cached.gather(heads.key_cache, "keys", workspace, num_own)
        keys_KGA[num_cached:] = heads.keys_TGA[tokens]
        values_KGA = self.cached.gather(heads.value_cache, "values", workspace, num_own)
        values_KGA[num_cached:] = heads.values_TGA[tokens]
        queries_THA = heads.queries_THA[tokens]
        _attend(queries_THA, keys_KGA, values_KGA, self.mask_TK, heads.scale, attended_THA[tokens])


def _attend(
    queries_THA: torch.Tensor,
    keys_KGA: torch.Tensor,
    values_KGA: torch.Tensor,
    mask_TK: torch.Tensor | None,
    scale: float,
    out_THA: torch.Tensor,
) -> None:
    num_kv_heads = keys_KGA.shape[1]
    # A key-value head is a batch entry that its group of query heads sees without a copy.
    grouped = (len(queries_THA), num_kv_heads, -1, queries_THA.shape[2])
    queries = queries_THA.view(grouped).permute(1, 2, 0, 3)
    keys, values = (seen.transpose(0, 1)[:, None] for seen in (keys_KGA, values_KGA))
    is_alone = len(queries_THA) == 1
    if is_alone:  # Then a group's heads are so many queries of one head, which is much faster.
        queries = queries.transpose(1, 2)
    keys, values = (seen.expand(-1, queries.shape[1], -1, -1) for seen in (keys, values))
    attended = F.scaled_dot_product_attention(queries, keys, values, mask_TK, scale=scale)
    if is_alone:
        attended = attended.transpose(1, 2)
    out_THA.view(grouped).copy_(attended.permute(2, 0, 1, 3))


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


# varlen_attn ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class VarlenPart:
    """All segments of a step in one call that reads the paged cache in place.

    What it writes for a trie is wrong: a part of the trie's own comes after this one. Needs what
    `can_read_blocks` says; not yet run on a GPU.
    """

    ends_S1: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor
    max_segment_len: int
    max_context_len: int
    attend_varlen: AttendVarlen = varlen_attn_out

    def attend(self, heads: Heads, attended_THA: torch.Tensor, workspace: Workspace) -> None:
        del workspace
        self.attend_varlen(
            attended_THA,
            heads.queries_THA,
            heads.key_cache,
            heads.value_cache,
            self.ends_S1,
            None,
            self.max_segment_len,
            self.max_context_len,
            scale=heads.scale,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=self.context_lens_S,
            block_table=self.block_tables_SB,
        )


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
