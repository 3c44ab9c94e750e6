"""A conversation as the model gets it: what transformers makes of it, and nothing forged."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from granite_ray.checkpoint import QUICKSTART_PATH
from granite_ray.errors import ConfigError
from granite_ray.tasks.chat import TOOL_CALL_START, chat_prompt, chat_stop
from granite_ray.tokenizer import load_tokenizer
from tests.tiny import write_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a package up, by its name.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}
ARGUMENTS = {"name": "zlib", "limits": [1, 2.5, None, True]}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": ARGUMENTS}}
TURNS = [
    {"role": "system", "content": "Answer briefly.\n"},
    {"role": "user", "content": "What is zlib? „Ein Wort“, 世界 & <b>."},
    {"role": "assistant", "content": "One moment.", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"summary": "a library"}'},
    {"role": "assistant", "content": "A library."},
    {"role": "user", "content": "And its size?"},
]


@pytest.fixture(params=["embedded", "tiny"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "embedded":
        return QUICKSTART_PATH
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("num_turns", [1, 2, 6])
@pytest.mark.parametrize("tools", [(), (TOOL,)])
def test_a_conversation_becomes_what_transformers_makes_of_it(folder, num_turns, tools):
    reference = AutoTokenizer.from_pretrained(folder)
    turns = TURNS[1:2] if num_turns == 1 else TURNS[:num_turns]
    rendered = reference.apply_chat_template(
        turns, tools=list(tools) or None, add_generation_prompt=True, tokenize=False
    )
    tokenizer = load_tokenizer(str(folder))
    prompt = chat_prompt(turns, tokenizer, tools=tools)
    # Texts are encoded by themselves, so the text is the same and tokens at its ends may differ.
    raw = reference.decode(prompt.token_ids, skip_special_tokens=False)
    assert raw == rendered
    control = tokenizer.control_token_ids
    expected = reference(rendered, add_special_tokens=False)["input_ids"]
    assert [one for one in prompt.token_ids if one in control] == [
        one for one in expected if one in control
    ]


def test_a_call_that_must_be_made_is_begun(folder):
    tokenizer = load_tokenizer(str(folder))
    free = chat_prompt(TURNS[:2], tokenizer, tools=[TOOL]).token_ids
    begun = chat_prompt(TURNS[:2], tokenizer, tools=[TOOL], must_call=True).token_ids
    start = tuple(tokenizer.encode_template(TOOL_CALL_START))
    assert begun == free + start
    assert start[0] in tokenizer.control_token_ids


def test_the_place_before_the_last_turn_is_where_conversations_part(folder):
    tokenizer = load_tokenizer(str(folder))
    first = chat_prompt(TURNS[:2], tokenizer)
    other = chat_prompt([TURNS[0], {"role": "user", "content": "Other?"}], tokenizer)
    [place] = first.junctions
    assert first.token_ids[:place] == other.token_ids[:place]
    assert first.token_ids[place:] != other.token_ids[place:]


def test_a_base_checkpoint_sees_headings_and_refuses_tools(tmp_path):
    write_tokenizer(tmp_path, chat=False)
    tokenizer = load_tokenizer(str(tmp_path))
    prompt = chat_prompt(TURNS[:2], tokenizer)
    text = tokenizer.decode(prompt.token_ids)
    assert text == f"Answer briefly.\n\n\n### Task\n{TURNS[1]['content']}\n\n### Answer\n"
    assert chat_stop(tokenizer) == ("\n### Task",)
    with pytest.raises(ConfigError, match="chat template"):
        chat_prompt(TURNS[:2], tokenizer, tools=[TOOL])
