import asyncio
import json
import math
import subprocess
import sys
import time

import jsonschema
import pytest

from granite_ray.errors import ConfigError, InfrastructureError, RowFailure
from granite_ray.records import Grammar, Prompt, SamplingParams
from tests.schemas import SCHEMAS

PROMPT = Prompt(tuple(range(100, 400)))


@pytest.fixture
def backend():
    return "fake"


@pytest.fixture
def fake(moe, start_engine):
    return start_engine(moe)


def answer(engine, *args):
    return asyncio.run(engine.generate(*args))


def test_an_answer_depends_on_prompt_sampling_and_grammar(moe, fake, start_engine):
    sampling = SamplingParams(100, temperature=1.0, seed=1)
    first = answer(fake, PROMPT, sampling)
    assert answer(start_engine(moe), PROMPT, sampling) == first
    others = [
        answer(fake, Prompt((*PROMPT.token_ids, 5)), sampling),
        answer(fake, PROMPT, SamplingParams(100, temperature=1.0, seed=2)),
        answer(fake, PROMPT, sampling, Grammar('{"type": "integer"}')),
    ]
    assert len({first.text, *(other.text for other in others)}) == 4


def test_an_answer_is_the_same_in_another_process(fake, moe):
    code = f"""
import asyncio
from granite_ray.engine.fake import FakeEngine
from granite_ray.records import Prompt, SamplingParams
from granite_ray.tokenizer import load_tokenizer
engine = FakeEngine(load_tokenizer({moe.path!r}), 2048, None)
print(asyncio.run(engine.generate(Prompt(tuple(range(100, 400))), SamplingParams(100))).text)
"""
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.strip() == answer(fake, PROMPT, SamplingParams(100)).text


def test_text_counts_its_tokens(fake, tokenizer):
    found = answer(fake, PROMPT, SamplingParams(100))
    assert found.finish_reason == "stop"
    assert found.text.endswith(".")
    assert found.num_prompt_tokens == 300
    assert found.num_completion_tokens == len(tokenizer.encode_text(f" {found.text}"))


@pytest.mark.parametrize("max_tokens", [1, 3, 7])
def test_text_is_cut_at_max_tokens(fake, max_tokens):
    found = answer(fake, PROMPT, SamplingParams(max_tokens))
    assert found.num_completion_tokens == max_tokens
    assert found.finish_reason == "length"


def test_text_ends_before_a_stop_string(fake):
    whole = answer(fake, PROMPT, SamplingParams(100)).text
    texts = {answer(fake, PROMPT, SamplingParams(100, stop=(letter,))).text for letter in "aeiou"}
    assert not any(set("aeiou") <= set(text) for text in texts)
    assert whole not in texts


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_of_any_seed_validates_and_ends_in_time(fake, name):
    grammar = Grammar(json.dumps(SCHEMAS[name]))
    answers = [answer(fake, PROMPT, SamplingParams(256, seed=seed), grammar) for seed in range(25)]
    ended = [json.loads(one.text) for one in answers if one.finish_reason == "stop"]
    for value in ended:
        jsonschema.validate(value, SCHEMAS[name])
    assert len(ended) >= 24


def test_json_varies(fake):
    grammar = Grammar(json.dumps(SCHEMAS["pydantic_invoice"]))
    texts = {
        answer(fake, PROMPT, SamplingParams(256, seed=seed), grammar).text for seed in range(30)
    }
    assert len(texts) > 20


def test_json_is_cut_at_max_tokens(fake):
    grammar = Grammar(json.dumps(SCHEMAS["pydantic_invoice"]))
    found = answer(fake, PROMPT, SamplingParams(4), grammar)
    assert (found.num_completion_tokens, found.finish_reason) == (4, "length")


def test_scores_are_log_probabilities_over_the_choices(fake):
    choices = [(1,), (2, 3), (1, 2), (4,)]
    scores = asyncio.run(fake.score(PROMPT, choices))
    assert scores == asyncio.run(fake.score(PROMPT, choices))
    assert scores != asyncio.run(fake.score(Prompt((1, 2)), choices))
    assert max(scores) <= 0
    assert sum(map(math.exp, scores)) == pytest.approx(1)
    assert len(set(scores)) == 4
    assert asyncio.run(fake.score(PROMPT, [])) == []


def test_the_context_is_respected(fake):
    with pytest.raises(RowFailure, match="2,048"):
        answer(fake, PROMPT, SamplingParams(2000))
    assert fake.num_calls == 0


def test_a_schema_that_cannot_be_compiled_is_refused(fake):
    with pytest.raises(ConfigError, match="uniqueItems"):
        answer(fake, PROMPT, SamplingParams(9), Grammar('{"uniqueItems": true}'))


def test_after_shutdown_calls_are_refused(fake):
    fake.shutdown()
    fake.shutdown()
    with pytest.raises(InfrastructureError, match="shut down"):
        answer(fake, PROMPT, SamplingParams(9))


def test_steps_grow_with_each_call_and_while_a_call_takes_its_time(moe, fake, start_engine):
    answer(fake, PROMPT, SamplingParams(9))
    asyncio.run(fake.score(PROMPT, [(1,)]))
    assert fake.num_steps == 2
    slow = start_engine(moe, fake_tokens_per_s=90)

    async def seen():
        started, call = time.monotonic(), asyncio.create_task(slow.score(PROMPT, [(1,)]))
        await asyncio.sleep(1.5)
        half_way = slow.num_steps
        await call
        return half_way, slow.num_steps, time.monotonic() - started

    half_way, at_end, took_s = asyncio.run(seen())
    assert half_way >= 1
    assert at_end >= 4
    assert took_s == pytest.approx(301 / 90, abs=0.5)


@pytest.mark.parametrize("in_flight", [1, 8, 200])
def test_five_hundred_documents_a_second_come_out_as_that(moe, start_engine, in_flight):
    num_documents = 250
    sampling = SamplingParams(1)
    engine = start_engine(moe, fake_tokens_per_s=500 * 301)

    async def measure():
        gate = asyncio.Semaphore(in_flight)

        async def call():
            async with gate:
                await engine.generate(PROMPT, sampling)

        started = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(num_documents)))
        return num_documents / (time.perf_counter() - started)

    rates = [asyncio.run(measure()) for _ in range(3)]
    assert max(rates) < 520
    assert max(rates) > 475, "late timers must not add up (a busy machine may spoil a try)"


def test_a_call_costs_the_loop_little(fake):
    async def run():
        await fake.generate(PROMPT, SamplingParams(100))
        started = time.thread_time()
        for seed in range(300):
            await fake.generate(PROMPT, SamplingParams(100, seed=seed))
        return (time.thread_time() - started) / 300

    assert asyncio.run(run()) < 200e-6
