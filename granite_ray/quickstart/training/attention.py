"""Attention of rows that begin with the same tokens: these are computed once for all of them."""

# T tokens, H query heads, K key and value heads, G query heads for each of them (H = K * G), D head
# size; in a group: P tokens that all rows begin with, N rows, L tokens of the longest row

import torch
import torch.nn.functional as F

from granite_ray.model.architecture import Architecture
from granite_ray.quickstart.training.batches import RowGroup
from granite_ray.quickstart.training.gathers import pad, unpad
from granite_ray.quickstart.training.kernels import Kernels


def rotation(
    architecture: Architecture, positions_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines that rotate queries and keys, [T, D/2] each (2104.09864)."""
    half, theta = architecture.head_dim // 2, architecture.rope_theta
    assert theta, "its positions are encoded"
    exponents = torch.arange(half, device=positions_T.device) / half
    angles = positions_T[:, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def attend_group(
    group: RowGroup,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    scale: float,
    kernels: Kernels,
) -> list[torch.Tensor]:
    """Return what the shared tokens see, and what the rows see: [P, H * D] and [rows, H * D]."""
    first, rows = group.start, group.start + group.num_shared
    shared_q, shared_k, shared_v = (x[first:rows] for x in (q_THD, k_TKD, v_TKD))
    q, k, v = (x.transpose(0, 1)[None] for x in (shared_q, shared_k, shared_v))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    of_shared = seen[0].transpose(0, 1).flatten(1)

    q, k, v = (_table(x[rows : group.stop], group, k_TKD.shape[1]) for x in (q_THD, k_TKD, v_TKD))
    own_k, own_v = k.flatten(0, 1)[:, 0], v.flatten(0, 1)[:, 0]  # each [K * N, L, D]
    own_q = q.flatten(0, 1).flatten(1, 2)  # [K * N, G * L, D]
    own_scores = torch.bmm(own_q, own_k.transpose(1, 2)).view(*q.shape[:4], -1)
    # One product for all rows: [K, N * G * L, D] times [K, D, P].
    shared_scores = torch.bmm(q.flatten(1, 3), shared_k.permute(1, 2, 0)).view(*q.shape[:4], -1)
    shared_p, own_p = kernels.attention_weights(shared_scores, own_scores, scale)
    seen = torch.bmm(shared_p.flatten(1, 3), shared_v.transpose(0, 1)).view_as(own_q)
    seen = torch.baddbmm(seen, own_p.flatten(0, 1).flatten(1, 2), own_v).view_as(q)
    table = seen.permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)
    return [of_shared, unpad(table, group.places)]


def _table(x: torch.Tensor, group: RowGroup, num_kv_heads: int) -> torch.Tensor:
    """Return the heads of a group's rows as a padded table, [K, N, G, L, D]; G is 1 for keys."""
    N, L = group.padded_NL.shape
    padded = pad(x.flatten(1), group.padded_NL.flatten(), group.places)
    return padded.view(N, L, num_kv_heads, -1, x.shape[-1]).permute(2, 0, 3, 1, 4)
