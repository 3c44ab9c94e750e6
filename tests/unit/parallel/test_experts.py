"""dispatch and combine: whatever the routing, each token gets the plain sum over its experts."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.model.workspace import Workspace
from granite_ray.parallel.experts import Arrived, Dispatcher, GroupDispatcher, LocalDispatcher
from granite_ray.parallel.place import RankPlace, divide_experts
from tests.ranks import join, run_ranks

pytestmark = pytest.mark.ranks

CPU = torch.device("cpu")


# who has which experts ───────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 100), st.integers(1, 12))
def test_every_expert_has_one_rank_and_ranks_differ_by_one_expert_at_most(
    num_experts: int, size: int
) -> None:
    ranges = divide_experts(num_experts, size)
    assert len(ranges) == size
    assert [expert for experts in ranges for expert in experts] == list(range(num_experts))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_forty_experts_over_three_ranks() -> None:
    assert divide_experts(40, 3) == (range(14), range(14, 27), range(27, 40))


# any routing ─────────────────────────────────────────────────────────────────────────────────────


def draw_routing(
    numbers: random.Random, rank: int, num_experts: int, num_chosen: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of one rank, maybe none, and for each of them experts and weights.

    Some routings are even, in some all tokens want the same few.
    """
    num_tokens, hidden_size = numbers.choice([0, 1, 2, 17, 60]), 6
    favourites = numbers.sample(range(num_experts), num_chosen)
    is_even = numbers.random() < 0.6
    generator = torch.Generator().manual_seed(numbers.randrange(10**6) + rank)
    expert_ids = [
        numbers.sample(range(num_experts), num_chosen) if is_even else favourites
        for _ in range(num_tokens)
    ]
    return (
        torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64),
        torch.tensor(expert_ids, dtype=torch.int64).reshape(num_tokens, num_chosen),
        torch.rand(num_tokens, num_chosen, generator=generator).double(),
    )


def say(x_ND: torch.Tensor, expert: int) -> torch.Tensor:
    """An expert that differs from all others, and is no linear map."""
    return (x_ND * (expert + 1)).sin()


def ask_local_experts(arrived: Arrived, local_experts: range) -> torch.Tensor:
    """The weighted sum over the experts of one rank, pair by pair."""
    out_ND = torch.zeros_like(arrived.x_ND)
    num_pairs = 0
    for token, expert_ids in enumerate(arrived.expert_ids_NK.tolist()):
        for place, local_id in enumerate(expert_ids):
            if local_id < len(local_experts):
                said = say(arrived.x_ND[token], local_experts[local_id])
                out_ND[token] += arrived.weights_NK[token, place] * said
                num_pairs += 1
    assert num_pairs == arrived.num_pairs
    return out_ND


def plain_sum(
    x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    rows = [
        sum((w * say(x, e) for e, w in zip(ids, weights, strict=True)), torch.zeros_like(x))
        for x, ids, weights in zip(x_TD, expert_ids_TK.tolist(), weights_TK, strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)


def check_dispatcher(dispatcher: Dispatcher, rank: int, num_experts: int, seed: int) -> None:
    """A few layers in a row, each with another routing, in the same memory."""
    numbers, workspace = random.Random(seed), Workspace()
    num_chosen = numbers.randint(1, num_experts)
    for _ in range(3):
        shared = numbers.randrange(10**6)
        x_TD, expert_ids_TK, weights_TK = draw_routing(
            random.Random(shared + 1000 * rank), rank, num_experts, num_chosen
        )
        arrived, routing = dispatcher.dispatch(x_TD, expert_ids_TK, weights_TK, workspace)
        out_ND = ask_local_experts(arrived, dispatcher.local_experts)
        found = dispatcher.combine(out_ND, routing, workspace)
        expected = plain_sum(x_TD, expert_ids_TK, weights_TK)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def check_rank(place: RankPlace, seeds: range) -> int:
    """Random routings in a group; weights travel as float32, hence the tolerance."""
    group, num_bytes = join(place), 0
    for seed in seeds:
        num_experts = random.Random(seed).choice([1, 3, 8, 40])
        dispatcher = GroupDispatcher(group, num_experts, CPU)
        check_dispatcher(dispatcher, place.rank, num_experts, seed)
        num_bytes = group.num_bytes_sent
    return num_bytes


@pytest.mark.parametrize("size", [2, 3, 4])
def test_combine_after_dispatch_is_the_plain_sum(size: int) -> None:
    num_bytes = run_ranks(size, check_rank, range(100 * size, 100 * size + 12))
    assert min(num_bytes) > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_the_local_dispatcher_is_the_plain_sum(seed: int, num_experts: int) -> None:
    check_dispatcher(LocalDispatcher(range(num_experts)), 0, num_experts, seed)


# chosen routings ─────────────────────────────────────────────────────────────────────────────────


def send(place: RankPlace, expert_ids: list[list[int]], dtype: torch.dtype) -> tuple[int, int, int]:
    """Send tokens of two kinds of number to chosen experts of four; return what moved."""
    group = join(place)
    dispatcher = GroupDispatcher(group, 4, CPU)
    ids_TK = torch.tensor(expert_ids if place.rank == 0 else [], dtype=torch.int64).reshape(-1, 2)
    x_TD = torch.arange(len(ids_TK) * 5).reshape(-1, 5).to(dtype)
    weights_TK = torch.full(ids_TK.shape, 0.5, dtype=dtype)
    workspace = Workspace()
    arrived, routing = dispatcher.dispatch(x_TD, ids_TK, weights_TK, workspace)
    dispatched = group.num_bytes_sent
    found = dispatcher.combine(arrived.x_ND.clone(), routing, workspace)
    num_ranks = [len({expert // 2 for expert in ids}) for ids in ids_TK.tolist()]
    num_ranks_TK = torch.tensor(num_ranks, dtype=torch.int64)
    assert found.equal(x_TD * num_ranks_TK[:, None].to(dtype))
    return len(arrived.x_ND), dispatched, group.num_bytes_sent - dispatched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_goes_once_to_each_rank_that_it_needs_and_its_bytes_are_counted(
    dtype: torch.dtype,
) -> None:
    """Rows of 5 numbers, filled up to 8 bytes, 2 ids and 2 weights; counts are 16 bytes a rank."""
    row = {torch.float32: 24, torch.bfloat16: 16}[dtype] + 16
    both, here, there = [0, 2], [0, 1], [3, 2]
    leader, follower = run_ranks(2, send, [both, there, here, there], dtype)
    assert leader == (2, 16 + 3 * row, 0)
    assert follower == (3, 16, 3 * 5 * dtype.itemsize)


def test_a_rank_that_receives_nothing_takes_part() -> None:
    leader, follower = run_ranks(2, send, [[0, 1], [1, 0]], torch.float32)
    assert leader == (2, 16, 0)
    assert follower == (0, 16, 0)
