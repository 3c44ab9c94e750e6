"""Grouped-query attention over the paged cache.

What all layers of a step share is planned once, in `plan_attention`; a layer then projects, writes
keys and values to their slots, and lets each part of the plan attend.
"""

# T tokens, D hidden size, H query heads, G key-value heads, A head size, K keys that a
# query may see, N blocks, P positions in a block, S segments, Q = S + 1, B blocks of one sequence,
# W tokens whose keys and values are kept

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn_out

from granite_ray.model.architecture import Architecture
from granite_ray.model.batch import ForwardBatch, Segment
from granite_ray.model.layers import Linear, rotate, rotation_tables
from granite_ray.model.state import ModelState
from granite_ray.model.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's queries, its keys and values of the step's tokens, and its cache."""

    queries_THA: torch.Tensor
    keys_TGA: torch.Tensor
    values_TGA: torch.Tensor
    key_cache: torch.Tensor  # [N, P, G, A]
    value_cache: torch.Tensor  # [N, P, G, A]
    scale: float


class AttentionPart(Protocol):
    """Some of the step's tokens, and what they see."""

    def attend(self, heads: Heads, attended_THA: torch.Tensor, workspace: Workspace) -> None:
        """Write these tokens' rows of `attended_THA`."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all attention layers of one step have in common.

    `written_W` are the tokens whose keys and values are kept, and `slots_W` where; None as the
    former means all of them. `rotation` is None where positions are not encoded.
    """

    parts: tuple[AttentionPart, ...]
    written_W: torch.Tensor | None
    slots_W: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None


class Attention(nn.Module):
    """An attention mixer; rows of `qkv_proj` are those of queries, keys, values."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.num_heads = architecture.num_attention_heads
        self.num_kv_heads = architecture.num_key_value_heads
        self.head_dim = architecture.head_dim
        self.scale = architecture.attention_multiplier
        num_rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = Linear(architecture.hidden_size, num_rows)
        self.o_proj = Linear(self.num_heads * self.head_dim, architecture.hidden_size)

    def forward(
        self,
        x_TD: torch.Tensor,
        plan: AttentionPlan,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        workspace: Workspace,
    ) -> torch.Tensor:
        num_tokens, num_heads, num_kv_heads = len(x_TD), self.num_heads, self.num_kv_heads
        qkv = workspace.take("qkv", (num_tokens, len(self.qkv_proj.weight)), x_TD)
        qkv = self.qkv_proj(x_TD, qkv).view(num_tokens, -1, self.head_dim)
        if plan.rotation is not None:
            rotate(qkv[:, : num_heads + num_kv_heads], *plan.rotation)
        queries_THA, keys_TGA, values_TGA = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
        _write(key_cache, keys_TGA, plan)
        _write(value_cache, values_TGA, plan)
        heads = Heads(queries_THA, keys_TGA, values_TGA, key_cache, value_cache, self.scale)
        attended_THA = workspace.take("attended", tuple(queries_THA.shape), x_TD)
        for part in plan.parts:
            part.attend(heads, attended_THA, workspace)
        out_TD = workspace.take("attention_out", tuple(x_TD.shape), x_TD)
        self.o_proj(attended_THA.flatten(1), out_TD)
        return out_TD


def _write(cache: torch.Tensor, heads_TGA: torch.Tensor, plan: AttentionPlan) -> None:
    written = heads_TGA if plan.written_W is None else heads_TGA[plan.written_W]
    cache.view(-1, *cache.shape[2:]).index_copy_(0, plan.slots_W, written)


# plan ────────────────────────────────────────────────────────────────────────────────────────────


def plan_attention(
    batch: ForwardBatch, state: ModelState, architecture: Architecture
) -> AttentionPlan:
    """Work out what every attention layer of this step will need."""
    if not state.key_caches:
        return AttentionPlan((), None, batch.slot_mapping_T, None)
    cache = state.key_caches[0]
    has_branches = any(segment.branch_lens for segment in batch.segments)
    written_W = batch.slot_mapping_T.ge(0).nonzero()[:, 0] if has_branches else None
    make_parts = _varlen_parts if batch.token_ids_T.is_cuda else _sdpa_parts
    theta = architecture.rope_theta
    return AttentionPlan(
        parts=tuple(make_parts(batch, cache.shape[1])),
        written_W=written_W,
        slots_W=batch.slot_mapping_T if written_W is None else batch.slot_mapping_T[written_W],
        rotation=None
        if theta is None
        else rotation_tables(batch.positions_T, theta, architecture.head_dim, cache.dtype),
    )


def _sdpa_parts(batch: ForwardBatch, block_size: int) -> Iterator[AttentionPart]:
    start = 0
    for index, segment in enumerate(batch.segments):
        yield _sdpa_part(segment, start, batch.block_tables_SB[index], block_size)
        start += segment.num_tokens


def _varlen_parts(batch: ForwardBatch, block_size: int) -> Iterator[AttentionPart]:
    yield _varlen_part(batch)
    for segment, part in zip(batch.segments, _sdpa_parts(batch, block_size), strict=True):
        if segment.branch_lens:
            yield part


# scaled_dot_product_attention ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SdpaPart:
    """The tokens of one segment.

    They see `num_cached_keys` keys from the blocks `block_ids_B`, then the segment's own keys if
    `sees_own_keys` (a run's own are in the cache by now, and are taken from there if it has others
    there), as far as `mask_TK` allows.
    """

    tokens: slice
    block_ids_B: torch.Tensor
    num_cached_keys: int
    sees_own_keys: bool
    mask_TK: torch.Tensor | None
    is_causal: bool

    def attend(self, heads: Heads, attended_THA: torch.Tensor, workspace: Workspace) -> None:
        keys_KGA = self._visible(heads.key_cache, heads.keys_TGA, "keys", workspace)
        values_KGA = self._visible(heads.value_cache, heads.values_TGA, "values", workspace)
        queries_THA = heads.queries_THA[self.tokens]
        (num_tokens, _, head_dim), num_kv_heads = queries_THA.shape, keys_KGA.shape[1]
        # A key-value head is a batch entry, seen by its group of query heads without a copy.
        grouped_shape = (num_tokens, num_kv_heads, -1, head_dim)
        queries = queries_THA.view(grouped_shape).permute(1, 2, 0, 3)
        keys, values = (seen.transpose(0, 1)[:, None] for seen in (keys_KGA, values_KGA))
        if num_tokens == 1:  # then a group's heads are so many queries of one head
            queries = queries.transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            queries,
            keys.expand(-1, queries.shape[1], -1, -1),
            values.expand(-1, queries.shape[1], -1, -1),
            attn_mask=self.mask_TK,
            is_causal=self.is_causal,
            scale=heads.scale,
        )
        if num_tokens == 1:
            attended = attended.transpose(1, 2)
        attended_THA[self.tokens].view(grouped_shape).copy_(attended.permute(2, 0, 1, 3))

    def _visible(
        self, cache: torch.Tensor, own_TGA: torch.Tensor, name: str, workspace: Workspace
    ) -> torch.Tensor:
        own_TGA = own_TGA[self.tokens]
        if not self.num_cached_keys:
            return own_TGA
        shape = (len(self.block_ids_B), *cache.shape[1:])
        num_own = len(own_TGA) if self.sees_own_keys else 0
        num_rows = shape[0] * shape[1] + num_own
        seen = workspace.take(name, (num_rows, *cache.shape[2:]), cache)
        torch.index_select(cache, 0, self.block_ids_B, out=seen[: num_rows - num_own].view(shape))
        seen[self.num_cached_keys : self.num_cached_keys + num_own] = own_TGA[:num_own]
        return seen[: self.num_cached_keys + num_own]


def _sdpa_part(
    segment: Segment, start: int, block_table_B: torch.Tensor, block_size: int
) -> SdpaPart:
    num_tokens, num_cached = segment.num_tokens, segment.num_cached_tokens
    is_fresh = num_cached == 0 and not segment.branch_lens
    num_cached_keys = num_cached
    mask_TK = None
    if segment.branch_lens:
        mask_TK = _branch_mask(segment, block_table_B.device)
    elif not is_fresh:
        num_cached_keys = num_cached + num_tokens
        if num_tokens > 1:
            seen_TK = torch.ones(
                num_tokens, num_cached_keys, dtype=torch.bool, device=block_table_B.device
            )
            mask_TK = seen_TK.tril(num_cached)
    return SdpaPart(
        tokens=slice(start, start + num_tokens),
        block_ids_B=block_table_B[: -(-num_cached_keys // block_size)],
        num_cached_keys=num_cached_keys,
        sees_own_keys=bool(segment.branch_lens) or is_fresh,
        mask_TK=mask_TK,
        is_causal=is_fresh and num_tokens > 1,
    )


def _branch_mask(segment: Segment, device: torch.device) -> torch.Tensor:
    """Let each branch see what is cached and its own tokens so far."""
    lens = torch.tensor(segment.branch_lens, device=device)
    branch_T = torch.arange(len(lens), device=device).repeat_interleave(lens)
    own_TT = branch_T[:, None].eq(branch_T).tril()
    cached = torch.ones(
        segment.num_tokens, segment.num_cached_tokens, dtype=torch.bool, device=device
    )
    return torch.cat([cached, own_TT], dim=1)


# varlen_attn ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class VarlenPart:
    """All segments of a step in one call that reads the paged cache in place.

    Branches get what their whole segment would see; a part of their own comes after this one.
    Needs CUDA; not yet run on any.
    """

    ends_Q: torch.Tensor
    context_lens_S: torch.Tensor
    block_tables_SB: torch.Tensor
    max_segment_len: int
    max_context_len: int

    def attend(self, heads: Heads, attended_THA: torch.Tensor, workspace: Workspace) -> None:
        del workspace
        varlen_attn_out(
            attended_THA,
            heads.queries_THA,
            heads.key_cache,
            heads.value_cache,
            self.ends_Q,
            None,
            self.max_segment_len,
            self.max_context_len,
            scale=heads.scale,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=self.context_lens_S,
            block_table=self.block_tables_SB,
        )


def _varlen_part(batch: ForwardBatch) -> VarlenPart:
    device = batch.token_ids_T.device
    segment_lens = [segment.num_tokens for segment in batch.segments]
    context_lens = [
        segment.num_cached_tokens + (0 if segment.branch_lens else segment.num_tokens)
        for segment in batch.segments
    ]
    return VarlenPart(
        ends_Q=torch.tensor([0, *accumulate(segment_lens)], dtype=torch.int32, device=device),
        context_lens_S=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables_SB=batch.block_tables_SB,
        max_segment_len=max(segment_lens),
        max_context_len=max(context_lens),
    )
