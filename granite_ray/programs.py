"""Run the task programs of one shard's documents on one replica's engine. No Ray, no torch.

Decides what runs beside what; knows nothing of where documents come from or rows go.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Literal

from granite_ray.errors import RowFailure
from granite_ray.records import (
    LLM,
    Completion,
    Document,
    Grammar,
    Prompt,
    Result,
    RowError,
    SamplingParams,
)
from granite_ray.tasks import Task

Mode = Literal["skip", "together", "alone", "one_by_one"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """How a shard is to be tried now; `deadly` are positions of programs that have failed.

    `number` counts the attempts, this one included.
    """

    mode: Mode
    deadly: frozenset[int] = frozenset()
    number: int = 1


@dataclass(frozen=True, slots=True)
class Program:
    """What is asked of one document: its task, and the engine that answers."""

    document: Document
    task: Task
    llm: LLM


async def run_programs(
    programs: Sequence[Program], gate: "ReplicaGate", attempt: Attempt, watch: "ShardWatch"
) -> list[Result]:
    """Return one result for each program, in their order.

    Those that ask of the same document stand side by side, so that they begin together and the
    engine computes the document once. A `RowFailure` becomes a failed result. Any other exception
    cancels the shard's other programs, waits for them, and is raised.
    """

    async def answer(position: int, program: Program) -> Result:
        document = program.document
        if position in attempt.deadly:
            result = _failed(
                RowError("worker_death", "the document killed its worker twice, alone")
            )
        elif document.error is not None:
            result = _failed(document.error)
        else:
            async with gate.admit(sum(len(chunk.token_ids) for chunk in document.chunks)):
                result = await _run_one(program)
        watch.on_result(result)
        return result

    async with gate.shared() if attempt.mode == "together" else gate.alone():
        await watch.enter()
        if attempt.mode != "one_by_one":
            return await _gather([answer(*item) for item in enumerate(programs)])
        results = []
        for position, program in enumerate(programs):
            await watch.begin_document(position)
            results.append(await answer(position, program))
        await watch.begin_document(None)  # the next shard let in may kill the worker at once
        return results


@dataclass(frozen=True, slots=True)
class ShardWatch:
    """Who wants to know how a shard goes on.

    `enter` is awaited once the shard has its place in the replica, `begin_document` before a
    program runs alone, and with None after the last; `on_result` is called for each result.
    """

    enter: Callable[[], Awaitable[None]]
    begin_document: Callable[[int | None], Awaitable[None]]
    on_result: Callable[[Result], None]


async def _run_one(program: Program) -> Result:
    try:
        return await program.task.run(program.document, program.llm)
    except RowFailure as failure:  # anything else stops the job
        error = RowError(failure.error_type, failure.message)
        return _failed(error, num_chunks=len(program.document.chunks))


def _failed(error: RowError, num_chunks: int = 0) -> Result:
    return Result(values={}, num_chunks=num_chunks, error=error)


async def _gather(programs: Sequence[Awaitable[Result]]) -> list[Result]:
    """Wait for all; when one breaks, cancel the others, wait for them, and raise its exception."""
    running = [asyncio.ensure_future(program) for program in programs]
    try:
        return await asyncio.gather(*running)
    finally:
        for program in running:
            program.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class CountingLLM:
    """An engine as one shard, or a whole replica, sees it; counts calls, and those in flight."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.num_calls = 0
        self.num_in_flight = 0

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, grammar: Grammar | None = None
    ) -> Completion:
        with self._counted():
            return await self._llm.generate(prompt, sampling, grammar)

    async def score(self, prompt: Prompt, choices: Sequence[tuple[int, ...]]) -> list[float]:
        with self._counted():
            return await self._llm.score(prompt, choices)

    def count(self, text: str) -> int:
        return self._llm.count(text)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.num_calls += 1
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1


class StallWatch:
    """Knows when an engine hangs: calls are in flight, and its steps stand still for too long."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._num_steps = -1
        self._moved_at = 0.0

    def look(self, now: float, num_calls_in_flight: int, num_steps: int) -> bool:
        """Return whether the engine hangs, by what is seen now and was seen before."""
        if not num_calls_in_flight or num_steps != self._num_steps:
            self._num_steps, self._moved_at = num_steps, now
        return now - self._moved_at > self._timeout_s


class ReplicaGate:
    """Who may use a replica now: shards share it, or one has it alone; documents by their tokens.

    First come, first served: a shard that wants to be alone is not overtaken by those after it.

    Args:
        capacity: Document tokens that may be in flight.
    """

    def __init__(self, capacity: int) -> None:
        self._free_tokens = self._capacity = capacity
        self._num_sharing = 0
        self._is_alone = False
        self._shards: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._documents: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the replica beside other shards."""
        await _queue(self._shards, False, self._let_shards_in, self._leave)
        try:
            yield
        finally:
            self._leave(False)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold the replica with no other shard in it."""
        await _queue(self._shards, True, self._let_shards_in, self._leave)
        try:
            yield
        finally:
            self._leave(True)

    @asynccontextmanager
    async def admit(self, num_tokens: int) -> AsyncIterator[None]:
        """Hold room for a document; one larger than all the room is admitted by itself."""
        num_tokens = min(num_tokens, self._capacity)
        await _queue(self._documents, num_tokens, self._let_documents_in, self._give_back)
        try:
            yield
        finally:
            self._give_back(num_tokens)

    def _leave(self, alone: int) -> None:
        if alone:
            self._is_alone = False
        else:
            self._num_sharing -= 1
        self._let_shards_in()

    def _give_back(self, num_tokens: int) -> None:
        self._free_tokens += num_tokens
        self._let_documents_in()

    def _let_shards_in(self) -> None:
        while self._shards:
            alone, waiter = self._shards[0]
            if not waiter.done():
                if self._is_alone or (alone and self._num_sharing):
                    return
                self._is_alone = bool(alone)
                self._num_sharing += not alone
                waiter.set_result(None)
            self._shards.popleft()

    def _let_documents_in(self) -> None:
        while self._documents:
            num_tokens, waiter = self._documents[0]
            if not waiter.done():
                if num_tokens > self._free_tokens:
                    return
                self._free_tokens -= num_tokens
                waiter.set_result(None)
            self._documents.popleft()


async def _queue(
    queue: deque[tuple[int, asyncio.Future[None]]],
    want: int,
    let_in: Callable[[], None],
    give_back: Callable[[int], None],
) -> None:
    """Wait for what is wanted; who is cancelled meanwhile keeps nothing and holds up nobody."""
    waiter = asyncio.get_running_loop().create_future()
    queue.append((want, waiter))
    let_in()
    try:
        await waiter
    except asyncio.CancelledError:
        if waiter.cancelled():
            let_in()  # those behind may fit where this one did not
        else:
            give_back(want)  # let in and cancelled in the same moment
        raise
