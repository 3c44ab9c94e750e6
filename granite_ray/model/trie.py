"""Tokens of a trie that continue one sequence in all directions: which of them each can see.

A trie is told by the parent of each node, -1 where the sequence itself comes before it; parents
stand before their children.
"""

# N nodes, W inputs that a convolution remembers, K = W + 1 its width

from functools import lru_cache

import torch

MAX_CACHED_TRIES = 256
"""A job asks for the same few again and again."""


@lru_cache(MAX_CACHED_TRIES)
def visible_nodes(parents: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return for each node which nodes it sees, its ancestors and itself: bool, [N, N]."""
    is_seen_NN = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            is_seen_NN[node] |= is_seen_NN[parent]
    return is_seen_NN.to(device)


@lru_cache(MAX_CACHED_TRIES)
def convolution_windows(parents: tuple[int, ...], width: int, device: torch.device) -> torch.Tensor:
    """Return the rows that each node's convolution takes in, oldest first: int64, [N, K].

    Rows 0 to W - 1 are what the sequence remembers; node `n` is row W + n.
    """
    num_remembered = width - 1
    before = list(range(-1, num_remembered))
    windows: list[list[int]] = []
    for node, parent in enumerate(parents):
        above = before if parent < 0 else windows[parent]
        windows.append([*above[1:], num_remembered + node])
    return torch.tensor(windows, device=device)
