"""Where texts end, and that forced tokens taken at once are the ones that masks would leave."""

import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.engine.continuation import Continuation
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.engine.requests import GenerateRequest
from granite_ray.engine.sampling import choose_tokens, compute_masks
from granite_ray.errors import RowFailure
from granite_ray.records import Grammar, Prompt, SamplingParams, TokenLogprobs
from tests.schemas import SCHEMAS, closed

VOCAB_SIZE = 750
PROMPT = Prompt((30, 31, 32))

NAMES = st.sampled_from(["name", "größe", "名前", "a b", 'say "hi"', "x"])
VALUES = st.one_of(NAMES, st.integers(-99, 99), st.booleans(), st.none())
LEAVES = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean")]),
    st.just({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    st.just({"type": "string", "format": "date"}),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3), max_leaves=5).map(
        lambda value: {"const": value}
    ),
)


def larger(inner):
    return st.one_of(
        st.dictionaries(NAMES, inner, min_size=1, max_size=4).map(closed),
        st.dictionaries(NAMES, inner, max_size=3).map(lambda properties: closed(properties, [])),
        st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas}),
        st.builds(
            lambda items, low, more: {
                "type": "array",
                "items": items,
                "minItems": low,
                "maxItems": low + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
    )


RANDOM_SCHEMAS = st.recursive(LEAVES, larger, max_leaves=8)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return GrammarCompiler(tokenizer.tokenizer_json, VOCAB_SIZE, tokenizer.eos_token_ids)


@pytest.fixture(scope="module")
def start(tokenizer, grammars):
    def start_one(sampling, schema=None):
        grammar = None if schema is None else Grammar(json.dumps(schema))
        matcher = None if grammar is None else grammars.matcher(grammar)
        return Continuation(GenerateRequest(PROMPT, sampling, grammar), tokenizer, matcher)

    return start_one


def feed(continuation, token_ids):
    """Append tokens until it ends; return the completion, or None where it goes on."""
    for token_id in token_ids:
        continuation.append(token_id)
    return continuation.request.future.result() if continuation.is_finished else None


def run(continuation, grammars, seed, has_jumps):
    """Run a model of noise, whose logits depend on the place only; count its forward passes."""
    num_passes = num_forced = 0
    while True:
        if has_jumps:
            num_forced += len(continuation.take_forced_tokens())
        if continuation.is_finished:
            return continuation.request.future.result(), num_passes, num_forced
        generator = torch.Generator().manual_seed(10_000 * seed + len(continuation.token_ids))
        logits = 2 * torch.randn(1, VOCAB_SIZE, generator=generator)
        [token_id] = choose_tokens(logits, [continuation], compute_masks([continuation], grammars))
        continuation.append(token_id)
        num_passes += 1


def assert_jumps_change_nothing(start, grammars, schema, sampling):
    slow, num_steps, none = run(start(sampling, schema), grammars, sampling.seed, has_jumps=False)
    quick, num_passes, num_forced = run(start(sampling, schema), grammars, sampling.seed, True)
    assert quick == slow
    assert none == 0
    assert num_passes + num_forced == num_steps
    return num_forced, num_steps


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_tokens_taken_at_once_change_no_answer(start, grammars, temperature):
    counts = [
        assert_jumps_change_nothing(
            start, grammars, schema, SamplingParams(60, temperature=temperature, seed=seed)
        )
        for schema in SCHEMAS.values()
        for seed in range(2)
    ]
    assert sum(num_forced for num_forced, _ in counts) > 300


@settings(max_examples=100, deadline=None)
@given(RANDOM_SCHEMAS, st.integers(1, 60), st.sampled_from([0.0, 1.0]), st.integers(0, 999))
def test_forced_tokens_change_no_answer_under_any_schema(
    start, grammars, schema, max_tokens, temperature, seed
):
    sampling = SamplingParams(max_tokens, temperature=temperature, seed=seed)
    assert_jumps_change_nothing(start, grammars, schema, sampling)


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_no_forced_token_goes_beyond_max_tokens(start, tokenizer, max_tokens):
    continuation = start(SamplingParams(max_tokens), {"const": "abcdef"})
    whole = tokenizer.encode_text('"abcdef"')
    forced = continuation.take_forced_tokens()
    assert forced == continuation.token_ids == whole[:max_tokens]
    completion = continuation.request.future.result(timeout=0)
    assert completion.finish_reason == ("stop" if max_tokens >= len(whole) else "length")
    assert completion.token_ids == tuple(whole[:max_tokens])
    assert continuation.take_forced_tokens() == []


def test_where_logprobs_are_asked_for_no_token_comes_without_them(start):
    schema = {"const": "abcdef"}
    assert start(SamplingParams(20), schema).take_forced_tokens()
    for num_logprobs in (0, 3):
        sampling = SamplingParams(20, num_logprobs=num_logprobs)
        assert start(sampling, schema).take_forced_tokens() == []


def test_nothing_is_forced_without_a_grammar_or_after_the_end(start):
    assert start(SamplingParams(20)).take_forced_tokens() == []
    cancelled = start(SamplingParams(20), {"const": "abcdef"})
    cancelled.request.future.cancel()
    assert cancelled.take_forced_tokens() == []


def test_a_broken_grammar_that_is_asked_for_forced_tokens_fails_the_row(start, tokenizer):
    continuation = start(SamplingParams(20), {"type": "integer"})
    with pytest.raises(RowFailure):
        continuation.matcher.consume(tokenizer.encode_text(" documentation")[0])
    assert continuation.take_forced_tokens() == []
    assert isinstance(continuation.request.future.exception(timeout=0), RowFailure)


def test_a_token_against_the_grammar_fails_the_row(start, tokenizer):
    continuation = start(SamplingParams(20), {"type": "integer"})
    continuation.append(tokenizer.encode_text(" documentation")[0])
    failure = continuation.request.future.exception(timeout=0)
    assert isinstance(failure, RowFailure)
    assert failure.error_type == "schema_violation"


def test_the_end_of_text_ends_a_text_and_is_no_part_of_it(start, tokenizer):
    token_ids = tokenizer.encode_text("The quick brown fox")
    completion = feed(start(SamplingParams(99)), [*token_ids, *tokenizer.eos_token_ids, 40])
    assert completion.text == "The quick brown fox"
    assert completion.finish_reason == "stop"
    assert completion.token_ids == tuple(token_ids)
    assert completion.num_completion_tokens == len(token_ids)
    assert completion.num_prompt_tokens == 3
    assert completion.logprobs is None


def test_a_stop_token_ends_a_text_and_is_no_part_of_it(start, tokenizer):
    token_ids = tokenizer.encode_text("The quick brown fox")
    sampling = SamplingParams(99, stop_token_ids=(741, token_ids[-1]))
    completion = feed(start(sampling), token_ids)
    assert completion.text == tokenizer.decode(token_ids[:-1])
    assert completion.finish_reason == "stop"
    assert completion.token_ids == tuple(token_ids[:-1])


def test_stop_tokens_and_stop_strings_do_not_cut_json(start, tokenizer):
    token_ids = tokenizer.encode_text('"abc"')
    sampling = SamplingParams(99, stop=("b",), stop_token_ids=tuple(token_ids))
    completion = feed(start(sampling, {"const": "abc"}), token_ids)
    assert completion.text == '"abc"'
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one two three four", (" three",), "one two"),
        ("one two three four", ("wo t", "two"), "one "),
        ("Tokio 東京は日本の首都です。", ("本の首",), "Tokio 東京は日"),
        ("so 🙂🙃 there", ("🙃",), "so 🙂"),
        ("so 🙂🙃 there", ("never", "e"), "so 🙂🙃 th"),
        ("one\n\ntwo", ("\n\n",), "one"),
    ],
)
def test_a_text_ends_before_its_stop_string_at_once(start, tokenizer, text, stop, kept):
    token_ids = tokenizer.encode_text(text)
    completion = feed(start(SamplingParams(999, stop=stop)), token_ids)
    assert completion.text == kept
    assert completion.finish_reason == "stop"
    ended = completion.num_completion_tokens
    before = tokenizer.decode(token_ids[: ended - 1])
    assert not any(end in before for end in stop), "it could have ended earlier"


def test_a_text_is_cut_at_max_tokens(start, tokenizer):
    token_ids = tokenizer.encode_text("The quick brown fox")
    completion = feed(start(SamplingParams(3)), token_ids)
    assert completion.token_ids == tuple(token_ids[:3])
    assert completion.finish_reason == "length"


def test_logprobs_and_cached_tokens_reach_the_completion(start, tokenizer):
    continuation = start(SamplingParams(9, num_logprobs=1))
    continuation.num_cached_tokens = 2
    entries = [TokenLogprobs(token_id, -0.5, ((token_id, -0.5),)) for token_id in (40, 41)]
    [end] = tokenizer.eos_token_ids
    for entry in [*entries, TokenLogprobs(end, -0.1, ())]:
        continuation.append(entry.token_id, entry)
    completion = continuation.request.future.result(timeout=0)
    assert completion.logprobs == tuple(entries)
    assert completion.num_cached_tokens == 2


def test_a_caller_that_stopped_waiting_ends_the_text(start):
    continuation = start(SamplingParams(9))
    continuation.append(40)
    continuation.request.future.cancel()
    continuation.append(41)
    assert continuation.is_finished
    assert continuation.token_ids == [40]


@pytest.mark.parametrize("stop", [(), ("\n\nEND", "never there")])
def test_a_token_costs_the_same_however_long_the_text(start, stop):
    continuation = start(SamplingParams(10**6, stop=stop))
    started = time.thread_time()
    feed(continuation, [40 + place % 600 for place in range(30_000)])
    assert (time.thread_time() - started) / 30_000 < 100e-6, "decoding it all takes milliseconds"
