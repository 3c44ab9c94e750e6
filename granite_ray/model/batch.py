"""All that a forward pass needs besides weights and state.

Tokens of all sequences lie flat, one after the other, without padding. Integers that steer loops
stay plain Python; what goes into a kernel is a tensor.
"""

# T tokens, S segments, B blocks of the longest block table, L positions whose logits are wanted

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Segment:
    """What one sequence contributes to a forward batch.

    `num_cached_tokens` tokens of it are in the cache already; the segment's own follow them.

    Without `branch_lens` the segment's tokens are one run: their keys and values are written to
    the sequence's blocks and its Mamba state moves on. With `branch_lens` they are so many
    branches, one after the other, each of which continues the cached tokens by itself and sees no
    other branch; nothing of them is written.
    """

    num_tokens: int
    num_cached_tokens: int
    state_slot: int = -1
    branch_lens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's tokens.

    The first `num_decodes` segments have one token each, no branches, and at least one cached
    token. A run with no cached tokens starts from empty Mamba state, whatever its slot holds.

    Attributes:
        token_ids_T: int64.
        positions_T: int64; a branch's first token has position `num_cached_tokens`.
        slot_mapping_T: int64; where each token's key and value are written: block id times block
            size plus offset; -1 for tokens of branches.
        block_tables_SB: int32, padded with 0; block ids of each segment's sequence in order, those
            for the segment's own tokens included (branches need none).
        logits_indices_L: int64, positions in T whose logits are wanted.
    """

    segments: tuple[Segment, ...]
    num_decodes: int
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slot_mapping_T: torch.Tensor
    block_tables_SB: torch.Tensor
    logits_indices_L: torch.Tensor
