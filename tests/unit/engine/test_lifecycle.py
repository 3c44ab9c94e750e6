"""What happens to those who wait: cancellation, lack of memory, a broken loop, the end."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from granite_ray.errors import InfrastructureError
from granite_ray.records import Prompt, SamplingParams
from tests.unit.engine.conftest import load_plain
from tests.unit.engine.test_engines import gather_answers, prompts


class Watched:
    """A model that can be held, and that breaks as told when a batch has too many rows."""

    def __init__(self, model, error=None, max_rows=10**6):
        self.whole, self.error, self.max_rows = model, error, max_rows
        self.model, self.config, self.device = model.model, model.config, model.device
        self.row_counts = []
        self.is_entered, self.may_step = threading.Event(), threading.Event()
        self.may_step.set()

    def __call__(self, input_ids, **keywords):
        self.is_entered.set()
        self.may_step.wait(20)
        self.row_counts.append(len(input_ids))
        if len(input_ids) > self.max_rows:
            raise self.error
        return self.whole(input_ids=input_ids, **keywords)

    async def hold(self, engine):
        """Hold the engine in a request of its own, so that what follows waits together."""
        self.may_step.clear()
        plug = asyncio.create_task(engine.generate(Prompt((30,)), SamplingParams(1)))
        await asyncio.to_thread(self.is_entered.wait, 20)
        return plug

    async def gather(self, engine, requests):
        """Let requests run together in one batch; return their answers or errors."""
        plug = await self.hold(engine)
        calls = [asyncio.create_task(engine.generate(*request)) for request in requests]
        await asyncio.sleep(0)
        self.may_step.set()
        answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
        await asyncio.gather(plug, return_exceptions=True)
        return answers


@pytest.fixture(scope="module")
def plain(moe):
    return load_plain(moe.path)


def test_a_batch_beyond_memory_runs_again_in_halves(moe, plain, start_around):
    requests = [(prompt, SamplingParams(6)) for prompt in prompts([9, 12, 10, 11, 12])]
    expected = asyncio.run(gather_answers(start_around(plain, moe), requests))
    model = Watched(plain, torch.OutOfMemoryError("no memory"), max_rows=3)
    assert asyncio.run(model.gather(start_around(model, moe), requests)) == expected
    assert model.row_counts[:3] == [1, 5, 2]


def test_half_a_batch_beyond_memory_ends_the_engine(moe, plain, start_around):
    model = Watched(plain, torch.OutOfMemoryError("no memory"), max_rows=1)
    requests = [(prompt, SamplingParams(6)) for prompt in prompts([9] * 6)]
    failures = asyncio.run(model.gather(start_around(model, moe), requests))
    assert model.row_counts == [1, 6, 3]
    for failure in failures:
        assert isinstance(failure, InfrastructureError)
        assert "no memory" in str(failure)


def test_a_broken_loop_fails_all_who_wait_and_every_later_call_with_its_cause(
    moe, plain, start_around
):
    model = Watched(plain, RuntimeError("wires crossed"), max_rows=1)
    engine = start_around(model, moe, max_num_seqs=2)
    requests = [(prompt, SamplingParams(6)) for prompt in prompts([9] * 5)]
    failures = asyncio.run(model.gather(engine, requests))
    with pytest.raises(InfrastructureError) as later:
        asyncio.run(engine.score(Prompt((30,)), [(31,)]))
    for failure in [*failures, later.value]:
        assert isinstance(failure, InfrastructureError)
        assert "wires crossed" in str(failure)
        assert failure.__cause__ is model.error
    assert len({id(failure) for failure in failures}) == 5
    assert model.row_counts == [1, 2]


def test_a_cancelled_request_is_dropped_where_it_waits_and_where_it_runs(moe, plain, start_around):
    model = Watched(plain)
    engine = start_around(model, moe, max_num_seqs=1)

    async def run():
        plug = await model.hold(engine)
        waiting = [
            asyncio.create_task(engine.generate(prompt, SamplingParams(500)))
            for prompt in prompts([9, 9, 9])
        ]
        last = asyncio.create_task(engine.generate(prompts([9])[0], SamplingParams(3)))
        await asyncio.sleep(0)
        for task in [plug, *waiting]:
            task.cancel()
        await asyncio.gather(plug, *waiting, return_exceptions=True)
        model.may_step.set()
        return await asyncio.wait_for(last, 20)

    assert asyncio.run(run()).num_completion_tokens
    assert len(model.row_counts) <= 1 + 3, "nobody waits for 500 tokens any more"


def test_a_running_request_ends_at_the_step_where_it_is_cancelled(moe, plain, start_around):
    model = Watched(plain)
    engine = start_around(model, moe)

    async def run():
        model.may_step.clear()
        [prompt] = prompts([9])
        task = asyncio.create_task(engine.generate(prompt, SamplingParams(1500)))
        await asyncio.to_thread(model.is_entered.wait, 20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        model.may_step.set()
        await asyncio.wait_for(engine.generate(prompt, SamplingParams(1)), 20)

    asyncio.run(run())
    assert model.row_counts == [1, 1]


def test_shutdown_fails_who_waits_is_bounded_and_can_be_repeated(moe, plain, start_around):
    model = Watched(plain)
    engine = start_around(model, moe, max_num_seqs=1)

    async def run():
        tasks = [await model.hold(engine)]
        tasks += [
            asyncio.create_task(engine.generate(prompt, SamplingParams(1000)))
            for prompt in prompts([9, 9])
        ]
        await asyncio.sleep(0)
        threading.Timer(0.2, model.may_step.set).start()
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
    assert "engine" not in {thread.name for thread in threading.enumerate()}


def test_an_engine_serves_one_loop_after_another(moe, start_engine):
    engine = start_engine(moe)
    request = prompts([9])[0], SamplingParams(3)
    assert asyncio.run(engine.generate(*request)) == asyncio.run(engine.generate(*request))


def test_loops_in_several_threads_share_an_engine(checkpoint, start_engine):
    engine = start_engine(checkpoint)
    parts = [
        [(prompt, SamplingParams(8)) for prompt in prompts([9, 30, 17], seed=seed)]
        for seed in range(4)
    ]
    expected = [asyncio.run(gather_answers(engine, part)) for part in parts]
    all_ready = threading.Barrier(len(parts))

    def ask(part):
        all_ready.wait(20)
        return asyncio.run(gather_answers(engine, part))

    with ThreadPoolExecutor(len(parts)) as threads:
        assert list(threads.map(ask, parts)) == expected
    assert len({answer.text for part in expected for answer in part}) == 12


def test_a_loop_closed_while_its_request_runs_disturbs_no_other(moe, start_engine):
    engine = start_engine(moe)
    request = prompts([9])[0], SamplingParams(20)
    expected = asyncio.run(engine.generate(*request))

    async def leave():
        return asyncio.create_task(engine.generate(prompts([30])[0], SamplingParams(40)))

    loop = asyncio.new_event_loop()
    left = loop.run_until_complete(leave())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert asyncio.run(asyncio.wait_for(engine.generate(*request), 20)) == expected
    assert not left.done(), "nobody was there to be told"
