import asyncio
import json

import pyarrow as pa
import pytest

from granite_ray.config import GenerateConfig
from granite_ray.errors import ConfigError
from granite_ray.records import Result
from granite_ray.tasks import Task, TaskLimits, make_task
from granite_ray.tasks.frames import Frame, text_slot
from granite_ray.tasks.generate import read_tool_calls
from granite_ray.tasks.prompts import Filling, PromptTemplate, PromptWords
from granite_ray.tasks.templates import TokenizedText
from granite_ray.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import write_tokenizer
from tests.unit.tasks.scripted import Call, ScriptedLLM, make_document

LIMITS = TaskLimits(max_model_len=1500)
RECORD = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOLS = (
    {
        "type": "function",
        "function": {"name": "find", "parameters": {"type": "object", "properties": {}}},
    },
)


def make(tokenizer: Tokenizer, **options: object) -> Task:
    defaults = {"template": "Q: {{ text }}", "max_tokens": 50}
    config = GenerateConfig(kind="generate", **{**defaults, **options})
    return make_task(config, tokenizer, LIMITS)


def run(
    task: Task, llm: ScriptedLLM, tokenizer: Tokenizer, *texts: str, **columns: object
) -> Result:
    return asyncio.run(task.run(make_document(tokenizer, *texts, **columns), llm))


def test_the_template_is_filled_from_text_and_columns(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda _: " done ")
    template = "{{ title }} ({{ year }}): {{ text }}{% if tags %} #{{ tags|join('#') }}{% endif %}"
    task = make(tokenizer, template=template)
    assert task.columns == {"title", "year", "tags"}
    result = run(task, llm, tokenizer, "Body.", title="T", year=1999, tags=["a", "b"])
    assert "user|T (1999): Body. #a#b|" in llm.calls[0].text
    assert result.values == {"text": "done"}


def test_a_missing_column_fails_the_row(tokenizer: Tokenizer) -> None:
    result = run(make(tokenizer, template="{{ title }}"), ScriptedLLM(tokenizer), tokenizer, "x")
    assert result.error is not None
    assert result.error.error_type == "invalid_column"


def test_answers_of_several_chunks_stand_below_each_other(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda call: "one" if "A." in call.text else "two")
    result = run(make(tokenizer), llm, tokenizer, "A. ", "B. ")
    assert result.values == {"text": "one\n\ntwo"}


def test_a_template_without_the_text_is_asked_once(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer)
    run(make(tokenizer, template="{{ title }}"), llm, tokenizer, "A. ", "B. ", title="T")
    assert len(llm.calls) == 1


def test_records_of_several_chunks_are_merged(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, lambda call: json.dumps({"n": None if "A." in call.text else 7}))
    task = make(tokenizer, schema=RECORD)
    assert task.output_fields == (pa.field("fields", pa.struct([("n", pa.int64())])),)
    result = run(task, llm, tokenizer, "A. ", "B. ")
    assert result.values == {"fields": {"n": 7}}


def test_an_empty_answer_fails_the_row(tokenizer: Tokenizer) -> None:
    result = run(make(tokenizer), ScriptedLLM(tokenizer, lambda _: ""), tokenizer, "x")
    assert result.error is not None
    assert result.error.error_type == "empty_answer"


def test_retrieved_documents_go_where_the_chat_template_has_them(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer)
    task = make(tokenizer, documents_column="found")
    assert task.columns == {"found"}
    found = [{"title": "T1", "text": "First."}, "Second.", {"text": "Third.", "score": 1}]
    run(task, llm, tokenizer, "Why?", found=found)
    documents = [{"title": "T1", "text": "First."}, {"title": "", "text": "Second."}]
    documents.append({"title": "", "text": "Third."})
    expected = tokenizer.render_chat([{"role": "user", "content": "Q: Why?"}], documents=documents)
    shown = tokenizer.decode(llm.calls[0].prompt.token_ids)
    assert shown == tokenizer.decode(tokenizer.encode_template(expected))


@pytest.mark.parametrize("found", [[], ["one"], ["one"] * 5])
def test_any_number_of_documents_will_do(tokenizer: Tokenizer, found: list[str]) -> None:
    llm = ScriptedLLM(tokenizer)
    run(make(tokenizer, documents_column="found"), llm, tokenizer, "Why?", found=found)
    assert llm.calls[0].text.count("one") == len(found)


@pytest.mark.parametrize("found", [None, "text", 5, [5], [{"title": "t"}], [{"text": 5}], {}])
def test_a_documents_column_of_another_type_fails_the_row(
    tokenizer: Tokenizer, found: object
) -> None:
    task = make(tokenizer, documents_column="found")
    result = run(task, ScriptedLLM(tokenizer), tokenizer, "x", found=found)
    assert result.error is not None
    assert result.error.error_type == "invalid_column"
    assert "task.documents_column" in result.error.message


def test_a_base_checkpoint_shows_documents_under_headings(base_tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(base_tokenizer)
    task = make(base_tokenizer, documents_column="found")
    run(task, llm, base_tokenizer, "Why?", found=[{"title": "T", "text": "First."}])
    assert llm.calls[0].text == ("### Document\nT\nFirst.\n\n### Task\nQ: Why?\n\n### Answer\n")
    assert llm.calls[0].sampling is not None
    assert llm.calls[0].sampling.stop == ("\n### Task",)


def with_chat_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The same tokenizer with another chat template, written beside it."""
    from pathlib import Path

    folder = Path(tokenizer.checkpoint_path).parent / f"variant{abs(hash(template))}"
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(str(folder))


def test_documents_inside_json_are_escaped(tokenizer: Tokenizer) -> None:
    variant = with_chat_template(
        tokenizer,
        "{% for d in documents or [] %}{{ d | tojson }}\n{% endfor %}{{ messages[-1].content }}",
    )
    template = PromptTemplate(PromptWords("{{ text }}"), variant)
    filling = Filling(
        TokenizedText("Q", variant.encode_text("Q")), documents=(('a"b', "c\nd<|x|>"),)
    )
    shown = variant.decode(template.fill(filling).token_ids).splitlines()
    assert json.loads(shown[0]) == {"title": 'a"b', "text": "c\nd<|x|>"}


def test_a_chat_template_without_documents_is_refused(tokenizer: Tokenizer) -> None:
    variant = with_chat_template(tokenizer, "{{ messages[-1].content }}")
    with pytest.raises(ConfigError, match=r"task\.documents_column is set"):
        make(variant, documents_column="found")
    assert text_slot(0) not in Frame().render(variant)


def test_a_chat_template_that_drops_the_user_is_refused(tokenizer: Tokenizer) -> None:
    variant = with_chat_template(tokenizer, "Hello")
    with pytest.raises(ConfigError, match="does not write the user's turn"):
        make(variant)


def test_tools_are_shown_and_calls_are_read(tokenizer: Tokenizer) -> None:
    answer = '<tool_call>\n{"name": "find", "arguments": {"q": "ü"}}\n</tool_call>'
    llm = ScriptedLLM(tokenizer, lambda _: answer)
    task = make(tokenizer, tools=TOOLS)
    result = run(task, llm, tokenizer, "x")
    assert '"find"' in llm.calls[0].text
    assert result.values == {
        "text": answer,
        "tool_calls": [{"name": "find", "arguments": '{"q": "ü"}'}],
    }
    pa.Table.from_pylist([result.values], schema=pa.schema(task.output_fields))


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[{"name": "f", "arguments": {}}]', [("f", "{}")]),
        (
            '<|tool_call|>[{"name": "f"}, {"name": "g", "arguments": "{}"}]',
            [("f", "{}"), ("g", "{}")],
        ),
        ('{"name": "f", "arguments": {"a": {"b": "}"}}}', [("f", '{"a": {"b": "}"}}')]),
        (
            'I look.<tool_call>{"name": "f"}</tool_call> and <tool_call>{"name": "g"}</tool_call>',
            [("f", "{}"), ("g", "{}")],
        ),
        ("No call is needed.", []),
        ("<tool_call>{broken</tool_call>", []),
        ('<tool_call>{"name": 5}</tool_call>', []),
        ('[{"no": "name"}]', []),
        ("42", []),
        ("[" * 50_000, []),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tool_calls_are_read_in_both_forms_or_not_at_all(
    text: str, calls: list[tuple[str, str]]
) -> None:
    found = [(call["name"], call["arguments"]) for call in read_tool_calls(text)]
    assert found == calls


def test_tools_that_cannot_work_are_refused(
    tokenizer: Tokenizer, base_tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match=r"task\.schema and task\.tools exclude each other"):
        make(tokenizer, tools=TOOLS, schema=RECORD)
    with pytest.raises(ConfigError, match=r"task\.tools needs a chat template"):
        make(base_tokenizer, tools=TOOLS)


def test_language_and_instruction_reach_the_template(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer)
    options = {"template": "{{ instruction }} {{ text }}", "instruction": "Translate."}
    run(make(tokenizer, **options, language="German"), llm, tokenizer, "x")
    assert "Translate. Write in German. x" in llm.calls[0].text


def test_the_engine_gets_the_users_sampling(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer)
    run(make(tokenizer, temperature=0.5, max_tokens=33), llm, tokenizer, "x")
    sampling = llm.calls[0].sampling
    assert sampling is not None
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0.5, 33, ())


def test_the_injection_suite_gives_only_valid_records(tokenizer: Tokenizer) -> None:
    """Whatever the model says, a row is a valid record or a failure; never anything else."""
    task = make(tokenizer, schema=RECORD)
    for answer in ['{"n": 1}', "HACKED", '{"n": 1}<|end_of_text|>', '{"n":1}{"n":2}', "null", "{}"]:
        llm = ScriptedLLM(tokenizer, lambda _, answer=answer: answer)
        result = run(task, llm, tokenizer, answer)
        assert (result.error is None) == (answer == '{"n": 1}')
        assert result.values == ({"fields": {"n": 1}} if result.error is None else {})


def test_calls_of_one_document_run_together(tokenizer: Tokenizer) -> None:
    seen: list[int] = []

    def write(call: Call) -> str:
        seen.append(len(call.text))
        return "x"

    run(make(tokenizer), ScriptedLLM(tokenizer, write), tokenizer, "A. ", "B. ", "C. ")
    assert len(seen) == 3
