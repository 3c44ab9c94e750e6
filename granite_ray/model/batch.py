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

    Without `parents` the segment's tokens are one run: their keys and values are written to the
    sequence's blocks and its Mamba state moves on. With `parents` they are a trie, each token after
    its parent: -1 stands for the cached tokens, and parents stand before their children. A token
    of a trie sees what is cached and its ancestors; nothing of a trie is written.
    """

    num_tokens: int
    num_cached_tokens: int
    state_slot: int = -1
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's tokens.

    The first `num_decodes` segments are runs of one token after at least one cached token. A run
    with no cached tokens starts from empty Mamba state, whatever its slot holds.

    Attributes:
        token_ids_T: int64.
        positions_T: int64; a trie's first tokens have position `num_cached_tokens`.
        slot_mapping_T: int64; where each token's key and value are written: block id times block
            size plus offset; -1 for tokens of tries.
        block_tables_SB: int32, padded with 0; block ids of each segment's sequence in order, those
            for the segment's own tokens included (tries need none).
        state_slots_S: int64; the Mamba state slot of each segment.
        logits_indices_L: int64, positions in T whose logits are wanted.
    """

    segments: tuple[Segment, ...]
    num_decodes: int
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slot_mapping_T: torch.Tensor
    block_tables_SB: torch.Tensor
    state_slots_S: torch.Tensor
    logits_indices_L: torch.Tensor
