"""Ranks as processes on loopback: a function run by all of them at once, each in its group."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from granite_ray.parallel.groups import Group, open_meeting
from granite_ray.parallel.place import RankPlace

HOST = "127.0.0.3"
PATIENCE_S = 400.0
"""Far longer than anything takes; a busy machine is no failure."""

CPU = torch.device("cpu")
# One process imports torch and is then forked for each rank, before it runs anything.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.unit.engine.test_native_fuzz", "tests.faults", "tests.ranks"]
)


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = PATIENCE_S
) -> list[Any]:
    """Call `function(place, *arguments)` in `size` processes; return what each returns.

    Fails with what any of them raised.
    """
    with Ranks(size, function, *arguments, timeout_s=timeout_s) as ranks:
        return [ranks.result(rank) for rank in range(size)]


@dataclass(frozen=True)
class Failure:
    """What a rank raised."""

    kind: str
    words: str


class Ranks:
    """Processes, a function running in each; they are gone in the end.

    Args:
        timeout_s: How long ranks wait for each other.
    """

    def __init__(
        self, size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float
    ) -> None:
        self._store, port = open_meeting(HOST, PATIENCE_S)
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            place = RankPlace(rank, size, HOST, (HOST, port), PATIENCE_S, timeout_s)
            process = CONTEXT.Process(
                target=_run, args=(theirs, place, function, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGKILL)
            process.join()

    def outcome(self, rank: int, patience_s: float = PATIENCE_S) -> Any:
        """What a rank returned, or the `Failure` of one that raised."""
        assert wait([self._pipes[rank]], patience_s), f"rank {rank} does not answer"
        return self._pipes[rank].recv()

    def result(self, rank: int) -> Any:
        """What a rank returned; fails where it raised."""
        outcome = self.outcome(rank)
        assert not isinstance(outcome, Failure), f"rank {rank}: {outcome.words}"
        return outcome


def _run(
    pipe: Connection, place: RankPlace, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(function(place, *arguments))
    except BaseException as error:  # noqa: BLE001 - the test says what it makes of it
        pipe.send(Failure(type(error).__name__, traceback.format_exc()))
    threading.Event().wait()  # a rank that ends early would end the others; the test kills it


def join(place: RankPlace) -> Group:
    """The group of a rank on the CPU."""
    group = Group(place)
    group.join(CPU)
    return group
