"""What happens to those who wait for the native engine: see also `test_lifecycle`."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from granite_ray.checkpoint import Checkpoint
from granite_ray.engine.front import EngineFront
from granite_ray.engine.scheduler import MAX_OVERTAKES, Scheduler
from granite_ray.errors import InfrastructureError
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from tests.unit.engine.test_engines import prompts
from tests.unit.engine.watched import Sizes, WatchedRunner, make_runner, start_native

Started = tuple[EngineFront, WatchedRunner, Scheduler]
Start = Callable[..., Started]

CHOICES = [(40, 41, 42), (40, 41, 43, 44), (50,), (60, 61)]
MANY_CHOICES = [prompt.token_ids for prompt in prompts([7] * 40, seed=4)]
"""Their branches are a step of 240 tokens."""
OBJECT = Grammar('{"type": "object", "properties": {"title": {"enum": ["a", "b"]}}}')


class Panic(BaseException):
    """What a library in another language raises when it gives up."""


@pytest.fixture
def start() -> Iterator[Start]:
    """Start engines around watched runners; keywords are those of `WatchedRunner`."""
    started: list[Started] = []

    def start_one(checkpoint: Checkpoint, sizes: Sizes | None = None, **how: Any) -> Started:
        sizes = sizes or Sizes()
        watched = WatchedRunner(make_runner(checkpoint, sizes)[0], **how)
        engine, scheduler = start_native(checkpoint, watched, sizes)
        started.append((engine, watched, scheduler))
        return started[-1]

    yield start_one
    for engine, watched, _ in started:
        watched.may_step.set()
        engine.shutdown()


def engine_threads() -> set[str]:
    return {one.name for one in threading.enumerate() if one.name.startswith(("engine", "masks"))}


# a broken loop ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [RuntimeError("wires crossed"), Panic("wires crossed")])
def test_a_broken_loop_fails_all_who_wait_and_every_later_call_with_its_cause(
    moe: Checkpoint, start: Start, error: BaseException
) -> None:
    engine, watched, _ = start(moe, Sizes(max_num_seqs=2), error=error, breaks=lambda n: n > 1)
    calls = [engine.generate(prompt, SamplingParams(6)) for prompt in prompts([9] * 3)]
    calls += [engine.score(prompt, CHOICES) for prompt in prompts([9] * 2)]
    failures = asyncio.run(watched.gather(engine, calls))
    with pytest.raises(InfrastructureError) as later:
        asyncio.run(engine.score(Prompt((30,)), [(31,)]))
    for failure in [*failures, later.value]:
        assert isinstance(failure, InfrastructureError)
        assert "wires crossed" in str(failure)
        assert failure.__cause__ is error
    assert len({id(failure) for failure in failures}) == 5
    assert watched.token_counts == [1, 18]
    engine.shutdown()
    assert not engine_threads()


# cancellation ────────────────────────────────────────────────────────────────────────────────────


def test_a_cancelled_request_is_dropped_where_it_waits_and_where_it_runs(
    checkpoint: Checkpoint, start: Start
) -> None:
    engine, watched, scheduler = start(checkpoint, Sizes(max_num_seqs=1))

    async def run() -> Completion:
        watched.may_step.clear()
        running = asyncio.create_task(engine.generate(prompts([9])[0], SamplingParams(500)))
        await asyncio.to_thread(watched.is_entered.wait, 20)
        waiting = [
            asyncio.create_task(engine.generate(prompt, SamplingParams(500)))
            for prompt in prompts([9, 9, 9], seed=1)
        ]
        waiting += [asyncio.create_task(engine.score(prompts([9], seed=2)[0], CHOICES))]
        last = asyncio.create_task(engine.generate(prompts([9], seed=3)[0], SamplingParams(3)))
        await asyncio.sleep(0)
        for task in [running, *waiting]:
            task.cancel()
        await asyncio.gather(running, *waiting, return_exceptions=True)
        watched.may_step.set()
        return await asyncio.wait_for(last, 20)

    answer = asyncio.run(run())
    num_passes = answer.num_completion_tokens + (answer.finish_reason == "stop")
    assert watched.token_counts == [9, 9, *[1] * (num_passes - 1)]
    assert {ids for ids in watched.seq_ids if ids != (0,)} == {(5,)}, "nobody else took a step"
    engine.shutdown()
    assert not scheduler.has_work


# the end ─────────────────────────────────────────────────────────────────────────────────────────


def test_shutdown_fails_who_waits_is_bounded_and_can_be_repeated(
    moe: Checkpoint, start: Start
) -> None:
    engine, watched, _ = start(moe, Sizes(max_num_seqs=1))

    async def run() -> tuple[float, list[Any]]:
        tasks = [await watched.hold(engine)]
        tasks += [
            asyncio.create_task(engine.generate(prompt, SamplingParams(1000)))
            for prompt in prompts([9, 9])
        ]
        tasks += [asyncio.create_task(engine.score(Prompt((30,)), CHOICES))]
        await asyncio.sleep(0)
        threading.Timer(0.2, watched.may_step.set).start()
        started = time.monotonic()
        engine.shutdown()
        engine.shutdown()
        took = time.monotonic() - started
        return took, await asyncio.gather(*tasks, return_exceptions=True)

    took, failures = asyncio.run(run())
    assert took < 5
    for failure in failures:
        assert isinstance(failure, InfrastructureError)
        assert "shut down" in str(failure)
    with pytest.raises(InfrastructureError, match="shut down"):
        asyncio.run(engine.score(Prompt((30,)), [(31,)]))
    assert watched.token_counts == [1], "the step that ran is the last"


def test_shutdown_leaves_no_thread_behind(moe: Checkpoint, start: Start) -> None:
    engine, _, _ = start(moe)
    asyncio.run(engine.generate(prompts([9])[0], SamplingParams(20), OBJECT))
    assert {"engine", "masks_0"} <= engine_threads()
    engine.shutdown()
    assert not engine_threads()


@pytest.mark.slow
def test_shutdown_does_not_wait_for_ever_for_a_step_that_hangs(
    moe: Checkpoint, start: Start
) -> None:
    engine, watched, _ = start(moe)

    async def run() -> float:
        plug = await watched.hold(engine)
        started = time.monotonic()
        engine.shutdown()
        with pytest.raises(InfrastructureError, match="shut down"):
            await plug
        return time.monotonic() - started

    assert 9 < asyncio.run(run()) < 15
    watched.may_step.set()
    deadline = time.monotonic() + 10
    while engine_threads():
        assert time.monotonic() < deadline, "the step came to its end, and so must the threads"
        time.sleep(0.01)


# lack of memory ──────────────────────────────────────────────────────────────────────────────────


def mixed_calls(engine: EngineFront) -> list[Any]:
    """Answers of several kinds, beginning alike, so that junctions are shared."""
    begin = prompts([70], seed=8)[0].token_ids
    tails = prompts([60, 90, 33, 8], seed=9)
    shared = [Prompt(begin + tail.token_ids, junctions=(40, 70)) for tail in tails]
    return [
        *(engine.generate(prompt, SamplingParams(12)) for prompt in shared),
        engine.generate(shared[0], SamplingParams(12, temperature=0.8, seed=3)),
        engine.generate(shared[1], SamplingParams(30), OBJECT),
        *(engine.score(prompt, CHOICES) for prompt in shared[2:]),
        engine.score(shared[1], MANY_CHOICES),
    ]


@pytest.mark.parametrize("late", [False, True])
def test_steps_beyond_memory_are_halved_until_they_fit_and_change_no_answer(
    checkpoint: Checkpoint, start: Start, late: bool
) -> None:
    sizes = Sizes(max_num_batched_tokens=1024)
    engine, watched, _ = start(checkpoint, sizes)
    expected = asyncio.run(watched.gather(engine, mixed_calls(engine)))
    error = torch.OutOfMemoryError("no memory")
    engine, watched, scheduler = start(
        checkpoint, sizes, error=error, breaks=lambda n: n > 100, late=late
    )
    answers = asyncio.run(watched.gather(engine, mixed_calls(engine)))
    assert_same_answers(answers, expected)
    failed = [count for count in watched.token_counts if count > 100]
    assert len(failed) == 4, "1024 → 512 → 256 → 128 → 64"
    assert max(watched.token_counts[-20:]) <= 64
    engine.shutdown()
    assert not scheduler.has_work


def assert_same_answers(answers: list[Any], expected: list[Any]) -> None:
    """Equal texts; equal scores but for rounding, as steps have other shapes."""
    for found, wanted in zip(answers, expected, strict=True):
        assert not isinstance(found, BaseException), found
        if isinstance(wanted, Completion):
            assert found == wanted
        else:
            assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("late", [False, True])
def test_a_prompt_that_is_computed_again_for_its_branches_is_weighed_once(
    checkpoint: Checkpoint, start: Start, late: bool
) -> None:
    [prompt] = prompts([20])
    expected = asyncio.run(start(checkpoint)[0].score(prompt, MANY_CHOICES))
    error = torch.OutOfMemoryError("no memory")
    limits = Sizes(max_num_branch_tokens=300)
    engine, watched, _ = start(checkpoint, limits, error=error, breaks=lambda n: n > 100, late=late)
    scores = asyncio.run(engine.score(prompt, MANY_CHOICES))
    assert scores == pytest.approx(expected, abs=1e-4)
    branch_counts = [count for count in watched.token_counts if count > 20]
    assert branch_counts == [240, 150, 72, 72, 72, 24], "300 → 150 → 75, in branches of 6"


def test_memory_that_fails_in_the_middle_of_answers_moves_no_state_twice(
    checkpoint: Checkpoint, start: Start
) -> None:
    """Steps fail after they ran: decodes whose state moved on, and those beside a long prompt."""
    requests = [(prompt, SamplingParams(40)) for prompt in prompts([80, 9, 30])]
    latecomer = prompts([200], seed=5)[0], SamplingParams(2)
    engine, watched, _ = start(checkpoint)
    calls = [engine.generate(*request) for request in [*requests, latecomer]]
    expected = asyncio.run(watched.gather(engine, calls))
    error = torch.OutOfMemoryError("no memory")
    engine, watched, _ = start(checkpoint, error=error, late=True, pause_at=8)

    async def run() -> list[Any]:
        tasks = [asyncio.create_task(engine.generate(*request)) for request in requests]
        while watched.may_step.is_set():
            await asyncio.sleep(0.001)
        watched.breaks = lambda num_tokens: num_tokens >= 64
        tasks.append(asyncio.create_task(engine.generate(*latecomer)))
        await asyncio.sleep(0)
        watched.may_step.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), 60)

    assert asyncio.run(run()) == expected
    assert all(count == 3 for count in watched.token_counts[1:9]), "plain decodes"
    num_failed = sum(count >= 64 for count in watched.token_counts[9:])
    assert num_failed == 7, "4096 is halved until 32"


def test_a_tiny_step_beyond_memory_ends_the_engine(moe: Checkpoint, start: Start) -> None:
    error = torch.OutOfMemoryError("no memory")
    engine, watched, _ = start(moe, error=error, breaks=lambda n: n > 1)
    calls = [engine.generate(prompt, SamplingParams(6)) for prompt in prompts([300, 9])]
    failures = asyncio.run(watched.gather(engine, calls))
    for failure in failures:
        assert isinstance(failure, InfrastructureError)
        assert "no memory" in str(failure)
        assert failure.__cause__ is error
    assert watched.token_counts[0] == 1
    assert all(count >= 64 for count in watched.token_counts[1:-1])
    assert watched.token_counts[-1] < 64


# interactive requests ────────────────────────────────────────────────────────────────────────────


def steps_of_each(watched: WatchedRunner) -> dict[int, list[int]]:
    """Sequence ids, in the order of arrival → the steps in which they took part."""
    steps: dict[int, list[int]] = {}
    for index, seq_ids in enumerate(watched.seq_ids):
        for seq_id in seq_ids:
            steps.setdefault(seq_id, []).append(index)
    return steps


def test_an_interactive_request_overtakes_those_that_wait(moe: Checkpoint, start: Start) -> None:
    engine, watched, _ = start(moe, Sizes(max_num_seqs=2))
    sampling = SamplingParams(20)
    calls = [engine.generate(prompt, sampling) for prompt in prompts([9] * 6, seed=1)]
    calls.append(engine.generate(prompts([9], seed=2)[0], sampling, is_interactive=True))
    answers = asyncio.run(watched.gather(engine, calls))
    steps = steps_of_each(watched)
    interactive = steps.pop(7)
    answer = answers[-1]
    num_passes = answer.num_completion_tokens + (answer.finish_reason == "stop")
    assert interactive == list(range(1, 1 + num_passes)), "at once, and never held up"
    assert {seq_id for seq_id in steps if steps[seq_id][0] <= 1} == {0, 1}, "the last has waited"
    assert steps.keys() == set(range(7)), "all had their turn"


def test_batch_requests_have_their_turn_before_all_interactive_ones_are_done(
    checkpoint: Checkpoint, start: Start
) -> None:
    batch = [(prompt, SamplingParams(5)) for prompt in prompts([20, 50, 9], seed=1)]
    engine, watched, _ = start(checkpoint, Sizes(max_num_seqs=2))
    calls = [engine.generate(*request) for request in batch]
    calls += [
        engine.generate(prompt, SamplingParams(2), is_interactive=True)
        for prompt in prompts([5] * 60, seed=2)
    ]
    answers = asyncio.run(watched.gather(engine, calls))
    steps = steps_of_each(watched)
    for seq_id in (1, 2, 3):
        num_before = sum(steps[other][0] < steps[seq_id][0] for other in range(4, 64))
        assert (seq_id - 1) * MAX_OVERTAKES < num_before <= 2 * seq_id * MAX_OVERTAKES
    alone, _, _ = start(checkpoint)
    for request, answer in zip(batch, answers, strict=False):
        assert answer == asyncio.run(alone.generate(*request))
