"""Grammars on the native engine: tokens that are forced are not decoded one by one."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace

import jsonschema
import pytest

from granite_ray.checkpoint import Checkpoint
from granite_ray.engine.front import EngineFront
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from tests.schemas import INTEGER, SCHEMAS, closed
from tests.unit.engine.test_engines import prompts
from tests.unit.engine.watched import Sizes, WatchedRunner, make_runner, start_native

LONG_NAMES = closed(
    {
        "first name of the responsible person": {
            "enum": ["Ada, who wrote the very first program", "Grace, who found the first bug"]
        },
        "department in which she works now": {
            "anyOf": [closed({"name of the department": {"const": "research"}}), {"type": "null"}]
        },
        "number of years in the company": INTEGER,
        "is still here": {"type": "boolean"},
    }
)
NO_CHOICE = closed({"the only thing that can be said": {"const": ["always", "the", "same"]}})


@pytest.fixture(params=["granite", "granitemoehybrid"])
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints[request.param]


@pytest.fixture
def watched(checkpoint: Checkpoint) -> WatchedRunner:
    return WatchedRunner(make_runner(checkpoint, Sizes())[0])


@pytest.fixture
def engine(checkpoint: Checkpoint, watched: WatchedRunner) -> Iterator[EngineFront]:
    engine, _ = start_native(checkpoint, watched, Sizes(max_num_seqs=64))
    yield engine
    engine.shutdown()


Request = tuple[Prompt, SamplingParams, Grammar | None]


def ask(engine: EngineFront, *requests: Request) -> list[Completion]:
    async def ask_all() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(*request) for request in requests))

    return asyncio.run(ask_all())


def without_jumps(request: Request) -> Request:
    """Log-probabilities need every token's own logits."""
    prompt, sampling, grammar = request
    return prompt, replace(sampling, num_logprobs=0), grammar


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_jumps_over_forced_tokens_change_nothing_but_the_number_of_steps(
    engine: EngineFront, watched: WatchedRunner, temperature: float
) -> None:
    sampling = SamplingParams(300, temperature=temperature, seed=5)
    [prompt] = prompts([20], seed=3)
    request = prompt, sampling, Grammar(json.dumps(LONG_NAMES))
    [with_jumps] = ask(engine, request)
    num_steps = len(watched.token_counts)
    [one_by_one] = ask(engine, without_jumps(request))
    assert replace(one_by_one, logprobs=None) == with_jumps
    jsonschema.validate(json.loads(with_jumps.text), LONG_NAMES)
    counts = watched.token_counts[num_steps:]
    assert counts[1:] == [1] * (with_jumps.num_completion_tokens - 1)
    assert num_steps < len(counts) / 3
    assert sum(count > 1 for count in watched.token_counts[1:num_steps]) >= 3, "runs after jumps"


def test_an_answer_without_a_choice_needs_no_step(
    engine: EngineFront, watched: WatchedRunner
) -> None:
    request = prompts([9])[0], SamplingParams(100), Grammar(json.dumps(NO_CHOICE))
    [answer] = ask(engine, request)
    assert watched.token_counts == []
    assert json.loads(answer.text) == {"the only thing that can be said": ["always", "the", "same"]}
    [one_by_one] = ask(engine, without_jumps(request))
    assert replace(one_by_one, logprobs=None) == answer


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 17])
def test_jumps_end_where_the_answer_is_cut(engine: EngineFront, max_tokens: int) -> None:
    for schema in (LONG_NAMES, NO_CHOICE):
        request = prompts([9])[0], SamplingParams(max_tokens), Grammar(json.dumps(schema))
        [answer], [one_by_one] = ask(engine, request), ask(engine, without_jumps(request))
        assert replace(one_by_one, logprobs=None) == answer
        assert answer.num_completion_tokens == max_tokens
        assert answer.finish_reason == "length"


def test_many_grammars_in_one_batch_give_what_each_gives_alone(engine: EngineFront) -> None:
    schemas = [*SCHEMAS.values(), LONG_NAMES, NO_CHOICE]
    starts = prompts([5 + index for index in range(len(schemas))], seed=7)
    requests: list[Request] = [
        (prompt, SamplingParams(60, temperature=0.7 * (index % 2), seed=index), grammar)
        for index, prompt in enumerate(starts)
        for grammar in (Grammar(json.dumps(schemas[index])),)
    ]
    requests += [(prompt, SamplingParams(20), None) for prompt in prompts([30, 31], seed=6)]
    together = ask(engine, *requests)
    assert together == [ask(engine, request)[0] for request in requests]
    one_by_one = ask(engine, *map(without_jumps, requests))
    assert [replace(answer, logprobs=None) for answer in one_by_one] == together
    num_ended = sum(answer.finish_reason == "stop" for answer in together)
    assert num_ended > len(schemas) / 2
    assert len({answer.text for answer in together}) > len(schemas) * 2 / 3
