"""Grouped-query attention over the paged cache.

What all layers of a step share is planned once (attention_plan.py); a layer then projects, writes
keys and values to their slots, and lets each part of the plan attend.
"""

# T tokens, D hidden size, H query heads, G key-value heads, X all heads of a fused projection,
# A head size, W tokens whose keys and values are kept

import torch
from torch import nn

from granite_ray.model.architecture import Architecture
from granite_ray.model.attention_parts import Heads
from granite_ray.model.attention_plan import AttentionPlan
from granite_ray.model.kernels import kernels_for
from granite_ray.model.layers import Linear, rotate
from granite_ray.model.workspace import Workspace


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
        self.kernels = kernels_for(self.qkv_proj.weight, (self.head_dim, 32))
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
        heads_TXA = self.qkv_proj(x_TD, qkv).view(num_tokens, -1, self.head_dim)
        if plan.rotation is not None:
            turn = rotate if self.kernels is None else self.kernels.rotate
            turn(heads_TXA[:, : num_heads + num_kv_heads], *plan.rotation)
        queries_THA, keys_TGA, values_TGA = heads_TXA.split_with_sizes(
            [num_heads, num_kv_heads, num_kv_heads], dim=1
        )
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
    written_WGA = heads_TGA if plan.written_W is None else heads_TGA[plan.written_W]
    cache.view(-1, *cache.shape[2:]).index_copy_(0, plan.slots_W, written_WGA)
