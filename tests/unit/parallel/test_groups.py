"""Ranks find each other without fixed ports, and hear of it when one goes or does not come."""

import os
import signal
import time

import pytest
import torch

from granite_ray.errors import InfrastructureError
from granite_ray.parallel.groups import Group, open_meeting
from granite_ray.parallel.place import RankPlace
from tests.ranks import HOST, PATIENCE_S, Ranks, join, run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]

HELD: list[Group] = []


def agree_and_tell(place: RankPlace) -> tuple[int, list[float]]:
    group = join(place)
    told = torch.tensor([1.5, 2.5]) if place.rank == 0 else torch.zeros(2)
    group.tell(told)
    return group.agree(10 * (place.rank + 1)), told.tolist()


def test_ranks_agree_on_the_largest_value_and_hear_the_leader() -> None:
    assert run_ranks(3, agree_and_tell) == [(30, [1.5, 2.5])] * 3


def wait_for_another(place: RankPlace, leaves: bool) -> float:
    """Rank 1 goes no further; the others wait for it, and tell how long."""
    group = join(place)
    HELD.append(group)  # else it would be closed when this function ends
    if place.rank == 1:
        if leaves:
            group.close()
        return float(os.getpid())
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        group.agree(0)
    return time.monotonic() - started


def test_a_rank_that_is_killed_is_missed_at_once() -> None:
    with Ranks(2, wait_for_another, False, timeout_s=PATIENCE_S) as ranks:
        os.kill(int(ranks.result(1)), signal.SIGKILL)
        assert ranks.result(0) < PATIENCE_S / 4


def test_a_rank_that_leaves_is_missed_at_once() -> None:
    [waited_s, _] = run_ranks(2, wait_for_another, True)
    assert waited_s < PATIENCE_S / 4


def test_a_rank_that_does_not_come_is_given_up_in_time() -> None:
    [waited_s, _] = run_ranks(2, wait_for_another, False, timeout_s=3)
    assert 2.5 < waited_s < 3 + PATIENCE_S / 4


def test_a_rank_whose_fellows_do_not_load_says_so() -> None:
    store, port = open_meeting(HOST, 5)
    group = Group(RankPlace(0, 2, HOST, (HOST, port), patience_s=0.5, timeout_s=5))
    with pytest.raises(InfrastructureError, match=r"Rank 0 of 2 .* loaded, in vain \(0.5 s"):
        group.join(torch.device("cpu"))
    del store


def test_meetings_on_one_host_do_not_disturb_each_other() -> None:
    meetings = [open_meeting(HOST, 5) for _ in range(3)]
    assert len({port for _, port in meetings}) == 3
    for number, (store, _) in enumerate(meetings):
        store.set("number", str(number))
    assert [store.get("number") for store, _ in meetings] == [b"0", b"1", b"2"]
