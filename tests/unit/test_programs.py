"""Running a shard's programs on one replica: who waits, who goes first, what breaks."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.errors import InfrastructureError, RowFailure
from granite_ray.programs import (
    Attempt,
    CountingLLM,
    Program,
    ReplicaGate,
    ShardWatch,
    StallWatch,
    run_programs,
)
from granite_ray.records import LLM, Chunk, Completion, Document, Prompt, Result, RowError
from granite_ray.records import SamplingParams as Sampling

TOGETHER = Attempt("together")


def run(program: Coroutine[Any, Any, Any]) -> Any:
    """Run a program that must not take for ever."""
    return asyncio.run(asyncio.wait_for(program, 20))


async def settle() -> None:
    """Let everything that can run, run."""
    for _ in range(20):
        await asyncio.sleep(0)


class Visit:
    """A coroutine that enters a gate and stays until told to leave."""

    def __init__(self, place: AbstractAsyncContextManager[None], log: list[str], name: str) -> None:
        self.may_leave = asyncio.Event()
        self.task = asyncio.create_task(self._visit(place, log, name))

    async def _visit(
        self, place: AbstractAsyncContextManager[None], log: list[str], name: str
    ) -> None:
        async with place:
            log.append(name)
            await self.may_leave.wait()

    async def leave(self) -> None:
        self.may_leave.set()
        await self.task

    async def cancel(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def test_shards_share_a_replica_and_one_that_is_alone_waits_for_all_of_them() -> None:
    async def program() -> list[str]:
        gate, log = ReplicaGate(400), []
        first, second = Visit(gate.shared(), log, "first"), Visit(gate.shared(), log, "second")
        await settle()
        alone = Visit(gate.alone(), log, "alone")
        await settle()
        assert log == ["first", "second"]
        await first.leave()
        await settle()
        assert log == ["first", "second"]
        await second.leave()
        await settle()
        await alone.leave()
        return log

    assert run(program()) == ["first", "second", "alone"]


def test_who_wants_to_be_alone_is_not_overtaken_and_is_alone() -> None:
    async def program() -> list[str]:
        gate, log = ReplicaGate(400), []
        first = Visit(gate.shared(), log, "first")
        await settle()
        alone = Visit(gate.alone(), log, "alone")
        await settle()
        late = Visit(gate.shared(), log, "late")
        await settle()
        assert log == ["first"]
        await first.leave()
        await settle()
        assert log == ["first", "alone"]
        await alone.leave()
        await late.leave()
        return log

    assert run(program()) == ["first", "alone", "late"]


def test_documents_are_admitted_by_their_tokens_in_their_order() -> None:
    async def program() -> None:
        gate, log = ReplicaGate(100), []  # room for 100
        half, more = Visit(gate.admit(60), log, "half"), Visit(gate.admit(50), log, "more")
        small = Visit(gate.admit(10), log, "small")
        await settle()
        assert log == ["half"], "a small one must not overtake for ever"
        await half.leave()
        await settle()
        assert log == ["half", "more", "small"]
        await more.leave()
        await small.leave()

    run(program())


def test_a_document_larger_than_all_the_room_is_admitted_by_itself() -> None:
    async def program() -> None:
        gate, log = ReplicaGate(100), []
        giant, tiny = Visit(gate.admit(10**6), log, "giant"), Visit(gate.admit(1), log, "tiny")
        await settle()
        assert log == ["giant"]
        await giant.leave()
        await tiny.leave()

    run(program())


Enter = Callable[[ReplicaGate], AbstractAsyncContextManager[None]]
WAYS_IN: dict[str, tuple[Enter, Enter]] = {
    "shard that shares": (lambda gate: gate.alone(), lambda gate: gate.shared()),
    "shard alone": (lambda gate: gate.shared(), lambda gate: gate.alone()),
    "document": (lambda gate: gate.admit(100), lambda gate: gate.admit(100)),
}


@pytest.mark.parametrize("kind", WAYS_IN)
def test_one_that_is_cancelled_in_the_moment_it_is_let_in_leaks_no_room(kind: str) -> None:
    holder_enters, waiter_enters = WAYS_IN[kind]

    async def program() -> list[str]:
        gate, log = ReplicaGate(100), []
        async with holder_enters(gate):
            granted = Visit(waiter_enters(gate), log, "granted")
            following = Visit(waiter_enters(gate), log, "following")
            await settle()
        # Leaving lets the next one in, which has not run since: no turn of the loop has passed.
        await granted.cancel()
        await settle()
        await following.leave()
        for name, place in (("alone", gate.alone()), ("giant", gate.admit(100))):
            visit = Visit(place, log, name)
            await settle()
            await visit.leave()
        return log

    assert run(program()) == ["following", "alone", "giant"]


def test_one_that_stops_waiting_holds_up_nobody_behind_it() -> None:
    async def program() -> list[str]:
        gate, log = ReplicaGate(100), []
        first = Visit(gate.shared(), log, "first")
        small = Visit(gate.admit(20), log, "small")
        await settle()
        alone, large = Visit(gate.alone(), log, "alone"), Visit(gate.admit(90), log, "large")
        await settle()
        late, tiny = Visit(gate.shared(), log, "late"), Visit(gate.admit(5), log, "tiny")
        await settle()
        assert log == ["first", "small"]
        await alone.cancel()
        await large.cancel()
        await settle()
        for visit in (first, small, late, tiny):
            await visit.leave()
        return log

    assert run(program()) == ["first", "small", "late", "tiny"]


VISITS = st.lists(
    st.tuples(
        st.sampled_from(["shared", "alone", "admit"]),
        st.integers(1, 40),  # tokens
        st.integers(0, 6),  # turns before it comes
        st.integers(0, 6),  # turns it stays
        st.one_of(st.none(), st.integers(0, 8)),  # turns until it is cancelled
    ),
    max_size=12,
)


@given(VISITS)
@settings(max_examples=150, deadline=None)
def test_whatever_comes_goes_and_is_cancelled_the_rules_hold_and_no_room_is_lost(
    visits: list[tuple[str, int, int, int, int | None]],
) -> None:
    async def program() -> None:
        gate = ReplicaGate(20)  # room for 20
        inside = {"shared": 0, "alone": 0, "admit": 0}

        async def visit(way: str, size: int, before: int, stays: int) -> None:
            for _ in range(before):
                await asyncio.sleep(0)
            size = min(size, 20)
            place = gate.admit(size) if way == "admit" else getattr(gate, way)()
            async with place:
                inside[way] += size if way == "admit" else 1
                assert inside["alone"] <= 1
                assert not (inside["alone"] and inside["shared"])
                assert inside["admit"] <= 20
                try:
                    for _ in range(stays):
                        await asyncio.sleep(0)
                finally:
                    inside[way] -= size if way == "admit" else 1

        async def cancel(task: asyncio.Task[None], turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()

        tasks = [asyncio.create_task(visit(*item[:4])) for item in visits]
        for task, (*_, cancelled_after) in zip(tasks, visits, strict=True):
            if cancelled_after is not None:
                await asyncio.gather(cancel(task, cancelled_after))
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [error for error in outcomes if isinstance(error, AssertionError)]
        async with gate.alone(), gate.admit(20):
            assert inside == {"shared": 0, "alone": 0, "admit": 0}

    run(program())


# run_programs ────────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """A task whose documents do what their text says; notes what began and what was cancelled."""

    kind = "scripted"
    output_fields: tuple[pa.Field, ...] = ()
    columns: frozenset[str] = frozenset()
    max_chunk_tokens = 100

    def __init__(self) -> None:
        self.began: list[str] = []
        self.cancelled: list[str] = []
        self.num_inside = self.most_inside = 0

    async def run(self, document: Document, llm: LLM) -> Result:
        self.began.append(document.text)
        self.num_inside += 1
        self.most_inside = max(self.most_inside, self.num_inside)
        try:
            return await self._do(document, llm)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            self.cancelled.append(document.text)
            raise
        finally:
            self.num_inside -= 1

    async def _do(self, document: Document, llm: LLM) -> Result:
        what, _, name = document.text.partition(" ")
        await asyncio.sleep(0)
        if what == "refuse":
            raise RowFailure("too_long", f"{name} is too long")
        if what == "break":
            raise InfrastructureError(f"{name} broke the engine")
        if what == "hang":
            await asyncio.Event().wait()
        if what == "ask":
            await llm.score(Prompt((1,)), [(2,)])
        return Result({"answer": name}, num_chunks=len(document.chunks))


class Journaled:
    """What a journal would have been told."""

    def __init__(self) -> None:
        self.events: list[str | int | None] = []
        self.results: list[Result] = []

    @property
    def watch(self) -> ShardWatch:
        async def enter() -> None:
            self.events.append("enter")

        async def begin_document(position: int | None) -> None:
            self.events.append(position)

        return ShardWatch(enter, begin_document, self.results.append)


def documents(*texts: str) -> list[Document]:
    return [
        Document(f"d{at}", "f", at, text, "h", (Chunk(0, 0, len(text), (1, 2, 3)),))
        for at, text in enumerate(texts)
    ]


class Silent:
    """An engine that answers everything at once."""

    async def generate(self, *_: Any) -> Completion:
        return Completion("", 1, 1, "stop")

    async def score(self, *_: Any) -> list[float]:
        return [0.0]

    def count(self, text: str) -> int:
        return len(text)


def asked(shard: list[Document], task: Scripted) -> list[Program]:
    return [Program(document, task, Silent()) for document in shard]


def answers(results: list[Result]) -> list[Any]:
    return [
        result.error.error_type if result.error else result.values["answer"] for result in results
    ]


def run_shard(
    texts: list[Document], attempt: Attempt = TOGETHER
) -> tuple[list[Result], Scripted, Journaled]:
    task, told = Scripted(), Journaled()
    results = run(run_programs(asked(texts, task), ReplicaGate(400), attempt, told.watch))
    return results, task, told


@pytest.mark.parametrize("mode", ["together", "alone", "one_by_one"])
def test_results_stand_in_the_order_of_the_documents_and_a_refusal_is_a_row(mode: Any) -> None:
    shard = documents("say a", "refuse b", "say c", "say d")
    results, _, told = run_shard(shard, Attempt(mode))
    assert answers(results) == ["a", "too_long", "c", "d"]
    assert results[1].error == RowError("too_long", "b is too long")
    assert results[1].num_chunks == 1
    assert len(told.results) == 4
    assert told.events[0] == "enter"


def test_documents_of_a_shard_run_together_and_one_at_a_time_where_told() -> None:
    shard = documents("say a", "say b", "say c")
    assert run_shard(shard)[1].most_inside == 3
    assert run_shard(shard, Attempt("alone"))[1].most_inside == 3
    _, task, told = run_shard(shard, Attempt("one_by_one"))
    assert task.most_inside == 1
    assert told.events == ["enter", 0, 1, 2, None], (
        "None: what dies now is not the last one's fault"
    )


def test_a_deadly_document_and_one_found_bad_before_are_never_given_to_the_engine() -> None:
    shard = documents("say a", "say b", "say c")
    bad = Document("d3", "f", 3, "", "h", error=RowError("empty_text", "the text is empty"))
    results, task, _ = run_shard([*shard, bad], Attempt("one_by_one", frozenset({1})))
    assert answers(results) == ["a", "worker_death", "c", "empty_text"]
    assert task.began == ["say a", "say c"]


@pytest.mark.parametrize("mode", ["together", "alone"])
def test_a_broken_machine_cancels_the_others_awaits_them_and_frees_the_replica(mode: Any) -> None:
    async def program() -> tuple[Scripted, int]:
        task, gate = Scripted(), ReplicaGate(400)
        shard = documents("hang a", "break b", "hang c")
        before = asyncio.all_tasks()
        with pytest.raises(InfrastructureError, match="b broke the engine"):
            await run_programs(asked(shard, task), gate, Attempt(mode), Journaled().watch)
        left = len(asyncio.all_tasks() - before)
        async with gate.alone(), gate.admit(10**9):
            return task, left

    task, left = run(program())
    assert sorted(task.cancelled) == ["hang a", "hang c"]
    assert left == 0


def test_a_cancelled_shard_takes_its_documents_along_and_frees_the_replica() -> None:
    async def program() -> Scripted:
        task, gate = Scripted(), ReplicaGate(400)
        shard = documents("hang a", "hang b")
        running = asyncio.create_task(
            run_programs(asked(shard, task), gate, TOGETHER, Journaled().watch)
        )
        await settle()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with gate.alone(), gate.admit(10**9):
            return task

    assert sorted(run(program()).cancelled) == ["hang a", "hang b"]


def test_a_shard_tells_that_it_entered_only_when_it_has_its_place() -> None:
    async def program() -> list[str | int]:
        gate, told, log = ReplicaGate(400), Journaled(), []
        other = Visit(gate.shared(), log, "other")
        await settle()
        waiting = asyncio.create_task(
            run_programs(asked(documents("say a"), Scripted()), gate, Attempt("alone"), told.watch)
        )
        await settle()
        before = list(told.events)
        await other.leave()
        await waiting
        return [*before, "left", *told.events]

    assert run(program()) == ["left", "enter"]


def test_calls_in_flight_are_those_not_yet_answered_cancelled_or_failed() -> None:
    async def program() -> list[int]:
        asked = Asked()
        replica = CountingLLM(asked)
        shards = [CountingLLM(replica), CountingLLM(replica)]
        calls = [
            asyncio.ensure_future(shard.score(Prompt((1,)), [(2,)])) for shard in (*shards, *shards)
        ]
        await settle()
        seen = [replica.num_in_flight]
        asked.waiting[0].set_result([0.0])
        asked.waiting[1].set_exception(RowFailure("too_long", "no"))
        calls[2].cancel()
        await asyncio.gather(*calls[:3], return_exceptions=True)
        seen.append(replica.num_in_flight)
        asked.waiting[3].set_result([0.0])
        await calls[3]
        return [*seen, replica.num_in_flight, shards[0].num_calls, replica.num_calls]

    assert run(program()) == [4, 1, 0, 2, 4]


class Asked(Silent):
    """An engine whose answers the test gives."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[list[float]]] = []

    async def score(self, *_: Any) -> list[float]:
        self.waiting.append(asyncio.get_running_loop().create_future())
        return await self.waiting[-1]


def test_an_engine_hangs_when_calls_are_in_flight_and_no_step_is_made_for_too_long() -> None:
    watch = StallWatch(10)
    assert not watch.look(1000.0, num_calls_in_flight=3, num_steps=5)
    assert not watch.look(1009.0, num_calls_in_flight=1, num_steps=5)
    assert not watch.look(1010.0, num_calls_in_flight=1, num_steps=5)
    assert watch.look(1010.1, num_calls_in_flight=1, num_steps=5)


def test_an_engine_that_steps_at_times_or_has_nothing_to_do_does_not_hang() -> None:
    watch = StallWatch(10)
    for second in range(0, 200, 5):
        assert not watch.look(float(second), num_calls_in_flight=1, num_steps=second // 10)
    for second in range(200, 400, 5):
        assert not watch.look(float(second), num_calls_in_flight=0, num_steps=20)
    assert not watch.look(405.0, num_calls_in_flight=1, num_steps=20), "the call has just begun"


def test_calls_are_counted_for_each_shard_apart() -> None:
    async def program() -> tuple[int, int]:
        one, other = CountingLLM(Silent()), CountingLLM(Silent())
        await one.generate(Prompt((1,)), Sampling(1))
        await one.score(Prompt((1,)), [(2,)])
        await other.score(Prompt((1,)), [(2,)])
        one.count("does not count")
        return one.num_calls, other.num_calls

    assert run(program()) == (2, 1)
