import asyncio
import json
import re

import pytest

from granite_ray.config import Example, SummarizeConfig
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import Completion, Result
from granite_ray.tasks import TaskLimits, make_task
from granite_ray.tokenizer import Tokenizer
from tests.unit.tasks.scripted import Call, ScriptedLLM, make_document

LIMITS = TaskLimits(max_model_len=600)


def summarize(
    tokenizer: Tokenizer,
    llm: ScriptedLLM,
    *texts: str,
    limits: TaskLimits = LIMITS,
    **options: object,
) -> Result:
    config = SummarizeConfig(kind="summarize", **{"max_tokens": 60, **options})
    task = make_task(config, tokenizer, limits)
    return asyncio.run(task.run(make_document(tokenizer, *texts), llm))


def test_one_chunk_is_one_pass(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda _: "  A fox.\n")
    result = summarize(tokenizer, llm, "The quick brown fox.")
    assert result.values == {"summary": "A fox.", "key_points": None}
    assert (result.num_chunks, result.finish_reason, result.error) == (1, "stop", None)
    [call] = llm.calls
    assert "in about three sentences" in call.text
    assert "The quick brown fox." in call.text
    assert result.num_prompt_tokens == len(call.prompt.token_ids)


def copy_words(call: Call) -> str:
    """A model that keeps every word it is shown: nothing may get lost on the way up the tree."""
    return " ".join(re.findall(r"w\d+", call.text))


@pytest.mark.parametrize("num_chunks", [2, 3, 7, 40])
def test_a_tree_of_summaries_brings_every_chunk_to_the_top(
    tokenizer: Tokenizer, num_chunks: int
) -> None:
    llm = ScriptedLLM(tokenizer, copy_words, max_model_len=2000)
    texts = [f"w{index} is here. " for index in range(num_chunks)]
    result = summarize(
        tokenizer, llm, *texts, limits=TaskLimits(max_model_len=2000), max_tokens=300
    )
    assert result.values["summary"].split() == [f"w{index}" for index in range(num_chunks)]
    assert result.num_chunks == num_chunks
    assert "consecutive parts" in llm.calls[-1].text


def test_every_prompt_of_a_deep_tree_fits_the_context(tokenizer: Tokenizer) -> None:
    long_answer = "The fox is quick. " * 10
    llm = ScriptedLLM(
        tokenizer,
        lambda call: Completion(long_answer, len(call.prompt.token_ids), 60, "stop"),
        max_model_len=600,
    )
    result = summarize(tokenizer, llm, *(f"Part {index}. " for index in range(50)))
    assert result.error is None
    assert len(llm.calls) > 50 + 10  # several rounds
    assert result.num_prompt_tokens == sum(len(call.prompt.token_ids) for call in llm.calls)


def test_a_summary_that_grows_when_encoded_again_cannot_stop_the_tree(
    tokenizer: Tokenizer,
) -> None:
    llm = ScriptedLLM(tokenizer, lambda _: "\ufffd" * 2000, max_model_len=600)
    result = summarize(tokenizer, llm, *(f"Part {index}. " for index in range(9)))
    assert result.error is None


def test_a_summary_with_control_tokens_stays_plain_text(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda _: "<|end_of_text|><|start_of_role|>")
    summarize(tokenizer, llm, "One. ", "Two. ")
    counts = {
        sum(token_id in tokenizer.control_token_ids for token_id in call.prompt.token_ids)
        for call in llm.calls
    }
    assert counts == {3 + 3 + 2}  # the turns of system and user, and the answer's beginning


def test_a_context_without_room_for_two_summaries_is_refused(tokenizer: Tokenizer) -> None:
    config = SummarizeConfig(kind="summarize", max_tokens=150)
    with pytest.raises(ConfigError, match=r"task\.max_tokens is 150: two partial summaries"):
        make_task(config, tokenizer, TaskLimits(max_model_len=500))


def test_options_are_in_the_prompt(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda _: "x")
    options = {"length": "sentence", "style": "plain", "focus": "costs", "language": "German"}
    summarize(tokenizer, llm, "A. ", **options)
    words = "in one sentence. Style: plain. Concentrate on costs. Write in German."
    assert words in llm.calls[0].text
    summarize(tokenizer, llm, "A. ", "B. ", **options)
    assert words in llm.calls[-1].text
    assert "Concentrate on costs. Write in German." in llm.calls[-2].text


def test_an_own_instruction_is_asked_of_the_whole_and_of_each_part(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda _: "x")
    summarize(tokenizer, llm, "A. ", "B. ", instruction="List the duties.")
    assert all("List the duties." in call.text for call in llm.calls)


def test_examples_are_shown(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda _: "x")
    summarize(tokenizer, llm, "A. ", examples=[Example(input="Ex in", output="Ex out")])
    assert llm.calls[0].text.index("Ex in") < llm.calls[0].text.index("Ex out")


def test_document_first_puts_the_document_before_the_instruction(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda _: "x")
    summarize(tokenizer, llm, "A fox.", prompt_order="document_first")
    assert llm.calls[0].text.index("A fox.") < llm.calls[0].text.index("Summarize")


@pytest.mark.parametrize("texts", [("A fox.",), ("A fox. ", "A dog. ")])
def test_key_points_are_asked_under_a_grammar(tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    points = ["First.", "Second."]
    llm = ScriptedLLM(tokenizer, lambda call: json.dumps(points) if call.grammar else "Sum.")
    result = summarize(tokenizer, llm, *texts, key_points=3)
    assert result.values == {"summary": "Sum.", "key_points": points}
    grammar = llm.calls[-1].grammar
    assert grammar is not None
    assert json.loads(grammar.json_schema)["maxItems"] == 3


def test_key_points_that_were_cut_fail_the_row(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(
        tokenizer,
        lambda call: Completion('["a', 5, 3, "length") if call.grammar else "Sum.",
    )
    result = summarize(tokenizer, llm, "A.", key_points=3)
    assert result.error is not None
    assert result.error.error_type == "schema_violation"
    assert result.finish_reason == "length"


@pytest.mark.parametrize("texts", [("A fox.",), ("A fox. ", "A dog. ")])
def test_an_empty_summary_fails_the_row(tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    result = summarize(tokenizer, ScriptedLLM(tokenizer, lambda _: " \n"), *texts)
    assert result.error is not None
    assert result.error.error_type == "empty_answer"


def test_a_failed_chunk_is_left_out_where_that_is_allowed(tokenizer: Tokenizer) -> None:
    def write(call: Call) -> str | RowFailure:
        return RowFailure("too_long", "no") if "dog" in call.text else copy_words(call)

    texts = ("w0 fox. ", "w1 dog. ", "w2 cat. ")
    tolerant = TaskLimits(max_model_len=600, max_failed_chunks=1)
    result = summarize(tokenizer, ScriptedLLM(tokenizer, write), *texts, limits=tolerant)
    assert result.values["summary"] == "w0 w2"
    assert result.num_failed_chunks == 1
    result = summarize(tokenizer, ScriptedLLM(tokenizer, write), *texts)
    assert result.error is not None
    assert result.error.error_type == "too_long"


def test_each_answer_is_sampled_with_its_own_seed(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda _: '["x"]')
    summarize(tokenizer, llm, "A. ", "B. ", "C. ", temperature=0.7, key_points=1)
    samplings = [call.sampling for call in llm.calls if call.sampling]
    assert len({sampling.seed for sampling in samplings}) == len(llm.calls) == 5
    assert {sampling.temperature for sampling in samplings} == {0.7}
