"""What the tokens of a step attend to: all that differs between runs, tries and devices.

Where a kernel reads blocks in place, one part is for all runs, or on a CPU for all decodes. Every
other run is a part, and its keys and values are copied together for `scaled_dot_product_attention`.
So is every trie.
"""

# T tokens, H query heads, G key-value heads, A head size, K keys that a query may see, Q queries of
# a block, N blocks, P positions in a block, B blocks of one sequence, S segments

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn_out

from granite_ray.model.kernels import CpuKernels, PagedKeys
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


# the CPU kernel ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class DecodesInPlace:
    """All decodes of a step in one call that reads the paged cache in place."""

    kernels: CpuKernels
    block_tables_SB: torch.Tensor
    num_keys_S: torch.Tensor
    max_num_keys: int

    def attend(self, heads: Heads, attended_THA: torch.Tensor, workspace: Workspace) -> None:
        num = len(self.num_keys_S)
        cache = PagedKeys(
            heads.key_cache,
            heads.value_cache,
            self.block_tables_SB,
            self.num_keys_S,
            self.max_num_keys,
        )
        self.kernels.attend(
            heads.queries_THA[:num], cache, heads.scale, workspace, attended_THA[:num]
        )


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
