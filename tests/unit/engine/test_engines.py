"""Both engines that run a model against plain transformers, one request at a time."""

import asyncio
import dataclasses
import json
import random

import jsonschema
import pytest
import torch

from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from tests.schemas import SCHEMAS
from tests.unit.engine.conftest import load_plain


def prompts(lengths, seed=0, vocab_size=745):
    """Random prompts of plain tokens: the first ids are control tokens."""
    numbers = random.Random(seed)
    return [Prompt(tuple(numbers.randrange(20, vocab_size - 4) for _ in range(n))) for n in lengths]


async def gather_answers(engine, requests) -> list[Completion]:
    return await asyncio.gather(*(engine.generate(*request) for request in requests))


def test_greedy_tokens_equal_those_of_transformers_generate(checkpoint, start_engine, tokenizer):
    model = load_plain(checkpoint.path)
    requests = [
        (prompt, SamplingParams(max_tokens=number))
        for prompt, number in zip(prompts([3, 40, 17, 64, 1]), [24, 7, 30, 1, 12], strict=True)
    ]
    answers = asyncio.run(gather_answers(start_engine(checkpoint), requests))

    variety = set()
    for (prompt, sampling), answer in zip(requests, answers, strict=True):
        ids = torch.tensor([prompt.token_ids])
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=sampling.max_tokens, do_sample=False)
        expected = out[0, len(prompt.token_ids) :].tolist()
        ended = expected[-1] in tokenizer.eos_token_ids
        expected = expected[:-1] if ended else expected
        variety |= set(expected)
        assert answer.text == tokenizer.decode(expected)
        assert answer.num_completion_tokens == len(expected)
        assert answer.num_prompt_tokens == len(prompt.token_ids)
        assert answer.finish_reason == ("stop" if ended else "length")
    assert len(variety) > 20, "a model that repeats itself proves nothing"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_does_not_depend_on_its_neighbours(checkpoint, start_engine, temperature):
    requests = [
        (prompt, SamplingParams(max_tokens=12 + i % 5, temperature=temperature, seed=i))
        for i, prompt in enumerate(prompts([5, 90, 33, 12, 34, 61, 7, 48], seed=1))
    ]
    engine = start_engine(checkpoint)
    together = asyncio.run(gather_answers(engine, requests))
    alone = [asyncio.run(engine.generate(*request)) for request in requests]
    assert together == alone
    assert len({answer.text for answer in alone}) == len(alone)


def test_sampling_follows_its_seed(moe, start_engine):
    [prompt] = prompts([20])
    engine = start_engine(moe)

    def answer(seed):
        return asyncio.run(engine.generate(prompt, SamplingParams(16, temperature=1.0, seed=seed)))

    assert answer(1) == answer(1)
    assert len({answer(seed).text for seed in range(6)}) == 6


def test_sampled_tokens_follow_the_softmax_of_the_logits(moe, start_engine, tokenizer):
    [prompt] = prompts([6])
    with torch.inference_mode():
        logits = load_plain(moe.path)(torch.tensor([prompt.token_ids])).logits[0, -1].float()
    expected = torch.softmax(logits / 0.8, dim=-1)
    requests = [(prompt, SamplingParams(1, temperature=0.8, seed=seed)) for seed in range(400)]
    answers = asyncio.run(gather_answers(start_engine(moe), requests))
    likeliest = int(expected.argmax())
    share = sum(answer.text == tokenizer.decode([likeliest]) for answer in answers) / len(answers)
    probability = float(expected[likeliest])
    assert 0.1 < probability < 0.95
    assert abs(share - probability) < 4 * (probability * (1 - probability) / 400) ** 0.5 + 1e-3


def test_an_answer_ends_before_its_stop_string(moe, start_engine):
    [prompt] = prompts([20], seed=4)
    engine = start_engine(moe)
    whole = asyncio.run(engine.generate(prompt, SamplingParams(30)))
    stop = whole.text[len(whole.text) // 2 :][:3]
    cut = asyncio.run(engine.generate(prompt, SamplingParams(30, stop=("never there", stop))))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.num_completion_tokens < whole.num_completion_tokens


def test_a_request_beyond_the_context_fails_alone_and_names_both_lengths(moe, start_engine):
    moe = dataclasses.replace(moe, max_model_len=64)
    engine = start_engine(moe)
    [fits, too_long] = prompts([56, 57])

    async def both():
        return await asyncio.gather(
            engine.generate(fits, SamplingParams(8)),
            engine.generate(too_long, SamplingParams(8)),
            engine.score(too_long, [(30,) * 8]),
            return_exceptions=True,
        )

    answer, failure, other = asyncio.run(both())
    assert isinstance(answer, Completion)
    for found in (failure, other):
        assert isinstance(found, RowFailure)
        assert found.error_type == "too_long"
        assert "57" in found.message
        assert "64" in found.message
    assert engine.num_calls == 1


def test_calls_that_reach_the_model_are_counted(moe, start_engine):
    engine = start_engine(moe)
    [prompt] = prompts([9])
    asyncio.run(engine.generate(prompt, SamplingParams(2)))
    asyncio.run(engine.score(prompt, [(30,), (31, 32)]))
    assert engine.num_calls == 2


def test_every_layer_of_every_forward_pass_is_a_step(checkpoint, start_engine):
    engine = start_engine(checkpoint)
    num_layers = load_plain(checkpoint.path).config.num_hidden_layers
    [prompt] = prompts([9])
    before = engine.num_steps
    asyncio.run(engine.score(prompt, [(30,), (31,)]))
    assert engine.num_steps - before == num_layers, "one prefill"
    answer = asyncio.run(engine.generate(prompt, SamplingParams(5)))
    num_passes = answer.num_completion_tokens + (answer.finish_reason == "stop")
    assert engine.num_steps - before == num_layers * (1 + num_passes)


def test_plain_text_is_counted_with_control_tokens_off(moe, start_engine, tokenizer):
    text = "a quick <|start_of_role|> fox"
    assert start_engine(moe).count(text) == len(tokenizer.encode_text(text))


@pytest.mark.parametrize("kind", ["granite", "granitemoehybrid"])
def test_answers_under_a_grammar_validate(checkpoints, start_engine, kind):
    engine = start_engine(checkpoints[kind], max_num_seqs=len(SCHEMAS))
    [prompt] = prompts([15], seed=2)
    requests = [
        (prompt, SamplingParams(200, temperature=0.7, seed=3), Grammar(json.dumps(schema)))
        for schema in SCHEMAS.values()
    ]
    answers = asyncio.run(gather_answers(engine, requests))
    num_ended = 0
    for schema, answer in zip(SCHEMAS.values(), answers, strict=True):
        if answer.finish_reason == "stop":
            num_ended += 1
            jsonschema.validate(json.loads(answer.text), schema)
    assert num_ended > len(SCHEMAS) * 2 / 3


def test_stop_strings_do_not_cut_json(moe, start_engine):
    grammar = Grammar(json.dumps(SCHEMAS["pydantic_invoice"]))
    sampling = SamplingParams(300, temperature=0.7, stop=(":", '"'))
    answer = asyncio.run(start_engine(moe).generate(prompts([8])[0], sampling, grammar))
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), SCHEMAS["pydantic_invoice"])


def test_a_schema_that_cannot_be_compiled_is_refused_and_the_engine_lives(moe, start_engine):
    engine = start_engine(moe)
    [prompt] = prompts([5])
    with pytest.raises(ConfigError, match="uniqueItems"):
        asyncio.run(engine.generate(prompt, SamplingParams(4), Grammar('{"uniqueItems": true}')))
    assert asyncio.run(engine.generate(prompt, SamplingParams(4))).num_completion_tokens


def test_a_request_beyond_the_token_budget_runs_alone(moe, start_engine):
    requests = [(prompt, SamplingParams(4)) for prompt in prompts([100, 3, 90, 2])]
    tight = start_engine(moe, max_num_batched_tokens=16)
    roomy = start_engine(moe)
    assert asyncio.run(gather_answers(tight, requests)) == asyncio.run(
        gather_answers(roomy, requests)
    )
