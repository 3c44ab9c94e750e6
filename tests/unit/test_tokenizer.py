import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from granite_ray.errors import ConfigError
from granite_ray.tokenizer import PROMPT_DATE, Tokenizer, load_tokenizer
from tests.tiny import END_OF_TEXT, SPECIAL_TOKENS, TOOL_TOKENS, write_tokenizer

CONTROL_TOKENS = [*SPECIAL_TOKENS, *TOOL_TOKENS]

TOOL = {
    "type": "function",
    "function": {
        "name": "find_é<b>",
        "description": "It's & finds",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "What is granite?"}
CHATS = {
    "user": ([USER], {}),
    "system": ([{"role": "system", "content": "Be brief."}, USER], {}),
    "turns": ([USER, {"role": "assistant", "content": "A rock."}, USER], {}),
    "tools": ([USER], {"tools": [TOOL]}),
    "documents": ([USER], {"documents": [{"title": "A", "text": "x"}, {"text": "y 東京"}]}),
    "no generation prompt": ([USER], {"add_generation_prompt": False}),
    "null content": ([{**USER, "tool_calls": None}], {}),
}

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
HOSTILE_TEXTS = st.lists(st.one_of(TEXTS, st.sampled_from(CONTROL_TOKENS)), max_size=6).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def reference(folder: Path) -> object:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", CHATS)
def test_chats_render_and_encode_as_transformers_does(
    tokenizer: Tokenizer, reference: Any, name: str
) -> None:
    messages, options = CHATS[name]
    wanted = {"add_generation_prompt": True, **options}
    text = tokenizer.render_chat(messages, **options)
    assert text == reference.apply_chat_template(messages, tokenize=False, **wanted)
    ids = reference.apply_chat_template(messages, return_dict=False, **wanted)
    assert tokenizer.encode_template(text) == ids
    assert tokenizer.control_token_ids.intersection(ids)


@settings(deadline=None)
@given(text=TEXTS)
def test_plain_text_gets_the_same_ids_as_in_transformers(
    tokenizer: Tokenizer, reference: Any, text: str
) -> None:
    assert tokenizer.encode_text(text) == reference(text, add_special_tokens=False).input_ids
    assert tokenizer.count(text) == len(tokenizer.encode_text(text))


@settings(deadline=None)
@given(text=HOSTILE_TEXTS)
def test_no_document_encodes_a_control_token_and_none_is_altered(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode_text(text)
    assert not tokenizer.control_token_ids.intersection(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_every_control_token_counts_in_a_template_and_is_text_in_a_document(
    tokenizer: Tokenizer, token: str
) -> None:
    (control_id,) = tokenizer.encode_template(token)
    assert control_id in tokenizer.control_token_ids
    for written in (token, f" {token}", token * 3, f"x{token}\n", token[:-1] + token):
        assert control_id not in tokenizer.encode_text(written)


@pytest.mark.parametrize("old_form", [False, True])
def test_merges_cannot_arrive_at_a_control_token(tmp_path: Path, old_form: bool) -> None:
    write_tokenizer(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    model, added = definition["model"], definition["added_tokens"]
    parts = {first for first, _ in model["merges"]}
    word = next(a + b for a, b in model["merges"] if len(a + b) > 1 and a + b in parts)
    if old_form:
        model["merges"] = [" ".join(merge) for merge in model["merges"]]
    added.append({**added[0], "content": word, "id": model["vocab"][word]})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode_template(word) == [model["vocab"][word]]
    assert model["vocab"][word] not in tokenizer.encode_text(f"{word} {word}" * 3)


@settings(deadline=None)
@given(text=HOSTILE_TEXTS)
def test_offsets_say_where_in_the_text_each_token_lies(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer.encode_with_offsets(text)
    assert encoding.ids == tokenizer.encode_text(text)
    for index, (start, end) in enumerate(encoding.offsets):
        before = tokenizer.decode(encoding.ids[:index]).rstrip("\ufffd")
        assert text.startswith(before) or "\ufffd" in text
        assert start <= len(before) or "\ufffd" in text
        assert 0 <= start < end <= len(text)


def test_many_texts_encode_as_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["one", "", "two <|end_of_text|> words", "東京 😀"]
    assert tokenizer.encode_texts(texts) == [tokenizer.encode_text(text) for text in texts]


def test_decoding_leaves_out_special_tokens_and_keeps_tool_calls(
    tokenizer: Tokenizer, reference: Any
) -> None:
    ids = tokenizer.encode_template('<|start_of_role|>x<tool_call>{"a": 1}</tool_call> , é')
    ids += tokenizer.eos_token_ids
    assert tokenizer.decode(ids) == 'x<tool_call>{"a": 1}</tool_call> , é'
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_bytes_that_are_no_text_decode_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    first_of_four, *_ = tokenizer.encode_text("😀")
    assert tokenizer.decode([first_of_four]) == "\ufffd"


def test_sizes_and_ids_agree_with_transformers(tokenizer: Tokenizer, reference: Any) -> None:
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.eos_token_ids == (reference.eos_token_id,)
    assert tokenizer.control_token_ids == set(reference.added_tokens_decoder)


def test_a_pickled_tokenizer_is_small_and_encodes_the_same(tokenizer: Tokenizer) -> None:
    data = pickle.dumps(tokenizer)
    assert len(data) < 1000
    assert pickle.loads(data).encode_text("Hello world") == tokenizer.encode_text("Hello world")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [3, 4]}, "config.json": {}}, (3, 4)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 5}}, (5,)),
        ({}, (0,)),
    ],
)
def test_end_tokens_come_from_generation_config_then_config_then_tokenizer(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    write_tokenizer(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path)).eos_token_ids == expected


# chat templates ──────────────────────────────────────────────────────────────────────────────────


def with_template(folder: Path, template: object) -> Tokenizer:
    write_tokenizer(folder, chat=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps(config))
    return load_tokenizer(str(folder))


def test_a_base_checkpoint_has_no_chat_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat=False)
    assert not load_tokenizer(str(tmp_path)).has_chat_template


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    with_template(tmp_path, "config")
    assert load_tokenizer(str(tmp_path)).render_chat([]) == "config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load_tokenizer(str(tmp_path)).render_chat([]) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load_tokenizer(str(tmp_path)).render_chat([]) == "jinja"


def test_of_several_templates_tools_choose_theirs(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with tools"},
    ]
    tokenizer = with_template(tmp_path, named)
    assert tokenizer.render_chat([USER]) == "plain"
    assert tokenizer.render_chat([USER], tools=[TOOL]) == "with tools"


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}",
        "{% set ns = namespace(n=0) %}\n  {% for m in messages %}\n {% set ns.n = ns.n + 1 %}\n"
        "{% endfor %}\n{{ ns.n }}{{ eos_token }}",
        "{{ tools | tojson(indent=2, sort_keys=true) }}{{ documents is none }}{{ missing }}",
        "{{ tools is defined and tools }}{{ 'a' if documents }}{{ strftime_now('no date') }}",
    ],
)
def test_the_template_language_is_that_of_transformers(tmp_path: Path, template: str) -> None:
    tokenizer = with_template(tmp_path, template)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    messages = [USER, {"role": "assistant", "content": "<é>"}]
    for tools in ([TOOL], None):
        assert tokenizer.render_chat(messages, tools=tools) == reference.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )


def test_a_template_that_asks_for_today_gets_a_fixed_date(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ strftime_now('%Y-%m-%d') }}")
    assert tokenizer.render_chat([USER]) == PROMPT_DATE.date().isoformat()


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ raise_exception('no system') }}", "{{ messages + 1 }}"],
)
def test_what_a_template_refuses_or_must_not_do_is_a_config_error(
    tmp_path: Path, template: str
) -> None:
    with pytest.raises(ConfigError, match=r"model\.path .* chat template refuses"):
        with_template(tmp_path, template).render_chat([USER])


def test_the_error_repeats_what_the_template_says(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no system turn"):
        with_template(tmp_path, "{{ raise_exception('no system turn') }}").render_chat([USER])


def test_a_template_that_is_not_jinja_is_refused_when_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        with_template(tmp_path, "{% for %}")


def test_several_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none named default"):
        with_template(tmp_path, [{"name": "rag", "template": "x"}])


# refusals ────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*save_pretrained"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"added_tokens": [], "model": {}}'])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_checkpoint_without_end_token_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))


@settings(max_examples=20, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_end_of_text_in_a_document_never_ends_the_prompt(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(f"{text}{END_OF_TEXT}{text}")
    assert not set(tokenizer.eos_token_ids).intersection(ids)
