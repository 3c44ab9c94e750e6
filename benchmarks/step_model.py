"""How long a step takes on a group of ranks: what each computes, and what they exchange.

Plain arithmetic. `expert_parallel.py` holds it against measured steps, and asks it about machines
that it does not have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Any

BYTES_PER_NUMBER = 2
BYTES_PER_CHOICE = 8
"""Of the id and the weight of each expert of a token that is sent."""
EXCHANGES_PER_LAYER = 3
"""Counts, tokens, and what the experts say of them."""


@dataclass(frozen=True)
class Shape:
    """What of a model's shape counts here: all from its `config.json`."""

    hidden_size: int
    num_layers: int
    num_experts: int
    num_chosen: int
    expert_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_local_experts"],
            config["num_experts_per_tok"],
            config["intermediate_size"],
        )

    @property
    def expert_weights(self) -> int:
        """Numbers in one expert of one layer."""
        return 3 * self.hidden_size * self.expert_size


@dataclass(frozen=True)
class Link:
    """What joins the ranks: what one of them sends in a second, and how long an exchange takes."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Device:
    """What one rank computes with: rates that it keeps, not those of its data sheet."""

    flops_per_s: float
    memory_bytes_per_s: float


def share_of_tokens(shape: Shape, num_ranks: int) -> float:
    """Return how likely a token needs a given rank, where all experts are equally likely."""
    num_elsewhere = shape.num_experts - shape.num_experts // num_ranks
    return 1 - comb(num_elsewhere, shape.num_chosen) / comb(shape.num_experts, shape.num_chosen)


def bytes_sent(shape: Shape, num_ranks: int, num_tokens: int) -> float:
    """Return the bytes that a rank with `num_tokens` tokens sends to others in one layer."""
    rows = num_tokens * (num_ranks - 1) * share_of_tokens(shape, num_ranks)
    row_bytes = BYTES_PER_NUMBER * shape.hidden_size
    return rows * (2 * row_bytes + BYTES_PER_CHOICE * shape.num_chosen)


def exchange_s(shape: Shape, num_ranks: int, num_tokens: int, link: Link) -> float:
    """Return how long all layers' exchanges of a step take, one after the other."""
    if num_ranks == 1:
        return 0.0
    per_layer = bytes_sent(shape, num_ranks, num_tokens) / link.bytes_per_s
    return shape.num_layers * (per_layer + EXCHANGES_PER_LAYER * link.latency_s)


def experts_s(shape: Shape, num_ranks: int, num_tokens: int, device: Device) -> float:
    """Return how long a rank's experts take: products, or reading their weights, whichever more.

    All ranks have `num_tokens` tokens each, and all experts are equally likely.
    """
    num_pairs = num_tokens * shape.num_chosen
    flops = 2 * num_pairs * shape.expert_weights
    num_local = shape.num_experts / num_ranks
    is_unmet = (1 - shape.num_chosen / shape.num_experts) ** (num_ranks * num_tokens)
    read = num_local * (1 - is_unmet) * shape.expert_weights * BYTES_PER_NUMBER
    return shape.num_layers * max(flops / device.flops_per_s, read / device.memory_bytes_per_s)


def shared_s(shared_weights: float, num_tokens: int, device: Device) -> float:
    """Return how long all else takes: it is on every rank, and so are its weights."""
    flops, read = 2 * num_tokens * shared_weights, BYTES_PER_NUMBER * shared_weights
    return max(flops / device.flops_per_s, read / device.memory_bytes_per_s)
