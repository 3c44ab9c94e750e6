"""dispatch and combine: tokens to where their experts are, and what the experts say back.

A token goes once to each rank that has some of its experts; that rank sums by weight what they say
and sends one row back. Routing many experts a token costs no more than there are ranks.
"""

# T tokens of this rank, N tokens that this rank's experts get, M tokens sent to any rank,
# D hidden size, K experts per token, W ranks, B bytes of a row that is sent

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from granite_ray.parallel.groups import Group
from granite_ray.parallel.place import divide_experts

ALIGNMENT = 8
"""Bytes; a row's parts begin at multiples of it, to be seen as numbers where they lie."""


class Buffers(Protocol):
    """Memory that is used again from layer to layer; see `Workspace`."""

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        like: torch.Tensor,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Arrived:
    """Tokens where their experts are.

    Attributes:
        x_ND: Their rows, not always contiguous.
        expert_ids_NK: int64, counted from this rank's first expert; the number of its experts
            stands for one that is elsewhere.
        weights_NK: How much each expert counts, in the dtype of `x_ND`.
        num_pairs: Pairs of a token and an expert of this rank.
    """

    x_ND: torch.Tensor
    expert_ids_NK: torch.Tensor
    weights_NK: torch.Tensor
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Routing:
    """What `dispatch` remembers for `combine`.

    `rows_TW` are the rows of what comes back that make a token, one for each rank; the number of
    all rows stands for none.
    """

    rows_TW: torch.Tensor
    sent_counts: tuple[int, ...]
    arrived_counts: tuple[int, ...]


class Dispatcher(Protocol):
    """How tokens reach their experts. Chosen once, when the model is made."""

    local_experts: range
    """This rank's experts."""

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        buffers: Buffers,
    ) -> tuple[Arrived, Routing | None]:
        """Bring this rank's tokens, there may be none, to their experts, and here what came."""
        ...

    def combine(
        self, out_ND: torch.Tensor, routing: Routing | None, buffers: Buffers
    ) -> torch.Tensor:
        """Return for each token the sum of what all its experts said, [T, D].

        Args:
            out_ND: For each token that arrived, the weighted sum over this rank's experts.
            routing: What `dispatch` returned.
            buffers: Memory; what is returned may be part of it.
        """
        ...


class LocalDispatcher:
    """All experts are here."""

    def __init__(self, local_experts: range) -> None:
        self.local_experts = local_experts

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        buffers: Buffers,  # noqa: ARG002 - nothing moves
    ) -> tuple[Arrived, None]:
        """Return the tokens as they are."""
        return Arrived(x_TD, expert_ids_TK, weights_TK, expert_ids_TK.numel()), None

    def combine(
        self,
        out_ND: torch.Tensor,
        routing: Routing | None,  # noqa: ARG002 - nothing moved
        buffers: Buffers,  # noqa: ARG002
    ) -> torch.Tensor:
        """Return the sums as they are."""
        return out_ND


class GroupDispatcher:
    """The experts are divided over the ranks of a group, which all dispatch and combine at once."""

    def __init__(self, group: Group, num_experts: int, device: torch.device) -> None:
        self._group = group
        ranges = divide_experts(num_experts, group.size)
        self.local_experts = ranges[group.rank]
        sizes = [len(experts) for experts in ranges]
        ranks = [rank for rank, size in enumerate(sizes) for _ in range(size)]
        self._rank_of_expert = torch.tensor(ranks, device=device)
        self._firsts_W = torch.tensor([experts.start for experts in ranges], device=device)
        self._sizes_W = torch.tensor(sizes, device=device)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        buffers: Buffers,
    ) -> tuple[Arrived, Routing]:
        """Exchange how many rows go where, then the rows, each with its experts and weights."""
        ranks_TK = self._rank_of_expert[expert_ids_TK]
        is_wanted_TW = torch.zeros(
            (len(x_TD), self._group.size), dtype=torch.bool, device=x_TD.device
        ).scatter_(1, ranks_TK, True)
        ranks_M, tokens_M = is_wanted_TW.t().nonzero(as_tuple=True)
        sent_counts, arrived_counts, num_pairs = self._exchange_counts(is_wanted_TW, ranks_TK)
        layout = _Layout(x_TD, weights_TK)
        sent_MB = buffers.take("sent", (len(tokens_M), layout.num_bytes), x_TD, torch.uint8)
        x_MD, expert_ids_MK, weights_MK = layout.parts(sent_MB)
        torch.index_select(x_TD, 0, tokens_M, out=x_MD)
        is_there_MK = ranks_TK[tokens_M] == ranks_M[:, None]
        local_ids_MK = expert_ids_TK[tokens_M] - self._firsts_W[ranks_M][:, None]
        expert_ids_MK.copy_(local_ids_MK.where(is_there_MK, self._sizes_W[ranks_M][:, None]))
        weights_MK.copy_(weights_TK[tokens_M])
        shape = sum(arrived_counts), layout.num_bytes
        arrived_NB = buffers.take("arrived", shape, x_TD, torch.uint8)
        self._group.exchange(sent_MB, arrived_NB, sent_counts, arrived_counts)
        x_ND, expert_ids_NK, weights_NK = layout.parts(arrived_NB)
        arrived = Arrived(x_ND, expert_ids_NK.long(), weights_NK.to(x_TD.dtype), num_pairs)
        rows_TW = torch.full(
            is_wanted_TW.shape, len(tokens_M), dtype=torch.int64, device=x_TD.device
        )
        rows_TW[tokens_M, ranks_M] = torch.arange(len(tokens_M), device=x_TD.device)
        return arrived, Routing(rows_TW, sent_counts, arrived_counts)

    def combine(
        self, out_ND: torch.Tensor, routing: Routing | None, buffers: Buffers
    ) -> torch.Tensor:
        """Send the sums back and add up those of each token."""
        assert routing is not None, "it is what dispatch returned"
        num_rows = sum(routing.sent_counts)
        # One row more, of any content, stands for ranks that had no say.
        back = buffers.take("back", (num_rows + 1, out_ND.shape[1]), out_ND)
        self._group.exchange(
            out_ND.contiguous(), back[:num_rows], routing.arrived_counts, routing.sent_counts
        )
        return F.embedding_bag(routing.rows_TW, back, mode="sum", padding_idx=num_rows)

    def _exchange_counts(
        self, is_wanted_TW: torch.Tensor, ranks_TK: torch.Tensor
    ) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Return the rows sent to each rank and those that come from it, and all pairs to come."""
        size = self._group.size
        num_rows_W, ranks = is_wanted_TW.sum(0), ranks_TK.flatten()
        num_pairs_W = torch.zeros_like(num_rows_W).index_add_(0, ranks, torch.ones_like(ranks))
        sent_W2 = torch.stack((num_rows_W, num_pairs_W), dim=1)
        arrived_W2 = torch.empty_like(sent_W2)
        self._group.exchange(sent_W2, arrived_W2, [1] * size, [1] * size)
        sent, arrived = torch.stack((sent_W2, arrived_W2)).tolist()
        return (
            tuple(rows for rows, _ in sent),
            tuple(rows for rows, _ in arrived),
            sum(pairs for _, pairs in arrived),
        )


class _Layout:
    """How a token, the ids of its experts and their weights lie in the bytes of one row."""

    def __init__(self, x_TD: torch.Tensor, weights_TK: torch.Tensor) -> None:
        self._dtype, self._hidden_size = x_TD.dtype, x_TD.shape[1]
        self._num_chosen = weights_TK.shape[1]
        hidden_bytes = self._hidden_size * x_TD.itemsize
        self._first_id = -(-hidden_bytes // ALIGNMENT) * ALIGNMENT
        self.num_bytes = self._first_id + 8 * self._num_chosen

    def parts(self, rows_MB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See rows as tokens, int32 ids and float32 weights, where they lie."""
        first_weight = self._first_id + 4 * self._num_chosen
        hidden = rows_MB[:, : self._first_id].view(self._dtype)[:, : self._hidden_size]
        expert_ids = rows_MB[:, self._first_id : first_weight].view(torch.int32)
        return hidden, expert_ids, rows_MB[:, first_weight:].view(torch.float32)
