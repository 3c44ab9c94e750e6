"""One replica: who goes first, whose work stops, and what health says; counted in engine steps."""

import asyncio

import pytest

from granite_ray.engine.factory import make_engine
from granite_ray.errors import InfrastructureError
from granite_ray.records import SamplingParams
from granite_ray.serving.answerer import Answerer
from granite_ray.serving.calls import CompletionCall
from granite_ray.serving.keys import LOCAL_CALLER
from tests.unit.serving.conftest import NATIVE, server_config


def call(number, max_tokens=12):
    # At this temperature the model seldom comes to an end by itself.
    sampling = SamplingParams(max_tokens, temperature=2.0, seed=number)
    return CompletionCall(sampling, 4000, max_tokens, prompts=(f"Package {number}: ",))


@pytest.fixture
def narrow(checkpoint):
    """A replica that runs one sequence at a time."""
    config = server_config({"engine": {**NATIVE, "max_num_seqs": 1}})
    answerer = Answerer(checkpoint, config, make_engine(checkpoint, config.model, config.engine, 1))
    yield answerer
    answerer.shutdown()


def test_an_interactive_call_goes_before_those_of_batches_that_came_earlier(narrow):
    order = []

    async def ask(number, is_interactive):
        await narrow.complete(call(number), is_interactive=is_interactive)
        order.append("interactive" if is_interactive else "batch")

    async def run():
        batch = [asyncio.create_task(ask(number, False)) for number in range(6)]
        await asyncio.sleep(0.01)
        await asyncio.gather(*batch, ask(9, True))

    asyncio.run(run())
    assert order.index("interactive") <= 1, "at most the one that ran already is before it"


def test_who_stops_listening_stops_the_work(serve):
    """As a caller that disconnects: its generator is closed, or its task cancelled."""
    server = serve(engine={**NATIVE, "max_num_seqs": 4})
    answerer = server.gateway.replicas

    async def steps_after(leave):
        before = answerer.num_steps
        await leave()
        after = answerer.num_steps
        await asyncio.sleep(0.5)
        assert after > before, "it had begun"
        return answerer.num_steps - after

    async def close_stream():
        items = server.gateway.stream(call(1, 1500), LOCAL_CALLER)
        await anext(items)
        await items.aclose()
        await asyncio.sleep(0.3)

    async def cancel_call():
        task = asyncio.create_task(server.gateway.complete(call(2, 1500), LOCAL_CALLER))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.3)

    for leave in (close_stream, cancel_call):
        assert asyncio.run(steps_after(leave)) == 0
    assert server.gateway.limits.num_in_flight == 0


def test_a_call_that_takes_too_long_is_ended_and_so_is_its_work(serve):
    server = serve(engine={**NATIVE, "max_num_seqs": 4}, serve={"timeout_s": 0.5})
    answerer = server.gateway.replicas

    async def run():
        async with server.http() as client:
            body = {"model": "quickstart", "prompt": "a", "max_tokens": 1500, "temperature": 2.0}
            whole = await client.post("/v1/completions", json=body)
            stream = await client.post("/v1/completions", json={**body, "stream": True})
            await asyncio.sleep(0.3)
            steps = answerer.num_steps
            await asyncio.sleep(0.5)
            return whole, stream, answerer.num_steps - steps

    whole, stream, num_steps = asyncio.run(run())
    assert stream.status_code in (200, 504), "it had begun, or not"
    assert (whole.status_code, whole.json()["error"]["type"]) == (504, "timeout_error")
    assert '"timeout_error"' in stream.text
    assert num_steps == 0


def test_a_broken_engine_is_unhealthy_and_callers_may_try_again(checkpoint, serve):
    config = server_config({"engine": NATIVE})
    answerer = Answerer(checkpoint, config, make_engine(checkpoint, config.model, config.engine, 1))
    server = serve(answerer)
    asyncio.run(answerer.check())
    answerer.shutdown()

    async def run():
        async with server.http() as client:
            body = {"model": "quickstart", "prompt": "a"}
            return await client.post("/v1/completions", json=body), await client.get("/readyz")

    response, ready = asyncio.run(run())
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "shut down" not in response.text
    assert ready.status_code == 503
    with pytest.raises(InfrastructureError):
        asyncio.run(answerer.check())


def test_an_engine_that_makes_no_step_is_unhealthy(checkpoint):
    engine = {"backend": "fake", "fake_tokens_per_s": 1.0}
    config = server_config({"engine": engine, "job": {"scheduling_timeout_s": 0.05}})
    answerer = Answerer(checkpoint, config, make_engine(checkpoint, config.model, config.engine, 1))

    async def run():
        # This engine counts a step a second while it takes its time.
        task = asyncio.create_task(answerer.complete(call(1)))
        await asyncio.sleep(0.01)
        await answerer.check()
        await asyncio.sleep(0.2)
        try:
            with pytest.raises(InfrastructureError, match="no step"):
                await answerer.check()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
