"""Text that streams is the completion's text, however tokens cut characters and stop strings."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.checkpoint import QUICKSTART_PATH
from granite_ray.engine.fake import FakeEngine
from granite_ray.engine.requests import cut_at_stop
from granite_ray.engine.streaming import TextStream
from granite_ray.records import SamplingParams
from granite_ray.tokenizer import load_tokenizer
from tests.unit.engine.test_engines import prompts

TOKENIZER = load_tokenizer(str(QUICKSTART_PATH))
TEXTS = st.text(alphabet="ab\n .é世🙂", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n .世", min_size=1, max_size=4), max_size=3)


def text_as_it_ends(token_ids, stop):
    """The text of a completion that ends with the first token that completes a stop string.

    A longer one that begins earlier, and would be complete later, counts for nothing then.
    """
    for number in range(1, len(token_ids) + 1):
        text = TOKENIZER.decode(token_ids[:number])
        if any(end in text for end in stop):
            return cut_at_stop(text, stop)
    return TOKENIZER.decode(token_ids)


@given(TEXTS, STOPS)
@settings(max_examples=150, deadline=None)
def test_the_pieces_joined_are_the_text_up_to_the_first_stop_string(text, stop):
    token_ids = TOKENIZER.encode_text(text)
    whole = text_as_it_ends(token_ids, stop)
    stream = TextStream(TOKENIZER, stop)
    shown = ""
    for token_id in token_ids:
        shown += stream.push(token_id)
        assert whole.startswith(shown), "what was shown would have to be taken back"
    assert shown + stream.finish(whole) == whole


def test_a_character_of_several_tokens_appears_whole_and_words_appear_at_once():
    token_ids = TOKENIZER.encode_text("a 🙂 b")
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token_id) for token_id in token_ids]
    assert "".join(pieces) == "a 🙂 b"
    assert "" in pieces, "the checkpoint's tokens do not cut this character: choose another"
    assert pieces[0] == "a"


@given(TEXTS)
@settings(max_examples=50, deadline=None)
def test_without_stop_strings_only_unfinished_characters_wait(text):
    stream = TextStream(TOKENIZER)
    shown = "".join(stream.push(token_id) for token_id in TOKENIZER.encode_text(text))
    assert shown == text


@pytest.mark.parametrize("num_logprobs", [None, 2])
def test_an_engine_tells_of_each_token_before_the_completion_is_there(
    moe, start_engine, num_logprobs
):
    engine = start_engine(moe)
    [prompt] = prompts([9])
    heard = []

    async def run():
        call = asyncio.create_task(
            engine.generate(
                prompt,
                SamplingParams(6, num_logprobs=num_logprobs),
                on_token=lambda *token: heard.append((*token, call.done())),
            )
        )
        return await call

    completion = asyncio.run(run())
    assert [token_id for token_id, _, _ in heard] == list(completion.token_ids)
    assert not any(is_done for _, _, is_done in heard)
    logprobs = tuple(logprob for _, logprob, _ in heard)
    assert logprobs == (completion.logprobs or (None,) * 6)


def test_the_fake_engine_tells_of_tokens_that_are_its_text():
    engine = FakeEngine(TOKENIZER, 4096, None)
    heard = []
    [prompt] = prompts([9])
    completion = asyncio.run(
        engine.generate(prompt, SamplingParams(64), on_token=lambda *token: heard.append(token))
    )
    assert TOKENIZER.decode([token_id for token_id, _ in heard]) == completion.text
