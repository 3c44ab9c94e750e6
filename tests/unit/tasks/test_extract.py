import asyncio
import json
from collections.abc import Callable

import jsonschema
import pyarrow as pa
import pytest

from granite_ray.config import Example, ExtractConfig
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import Completion, Result
from granite_ray.tasks import Task, TaskLimits, make_task
from granite_ray.tokenizer import Tokenizer
from tests.unit.tasks.scripted import Call, Reply, ScriptedLLM, make_document

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "year": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "place": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "zip": {"type": ["string", "null"]}},
            "required": ["city"],
        },
        "mixed": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
    },
    "required": ["name", "tags"],
}
LIMITS = TaskLimits(max_model_len=3000)


def make(tokenizer: Tokenizer, limits: TaskLimits = LIMITS, **options: object) -> Task:
    config = ExtractConfig(kind="extract", **{"schema": SCHEMA, "max_tokens": 200, **options})
    return make_task(config, tokenizer, limits)


def extract(
    tokenizer: Tokenizer,
    write: Callable[[Call], Reply],
    *texts: str,
    max_failed_chunks: int = 0,
) -> Result:
    task = make(tokenizer, TaskLimits(3000, max_failed_chunks))
    document = make_document(tokenizer, *texts)
    return asyncio.run(task.run(document, ScriptedLLM(tokenizer, write)))


def in_turn(*answers: object) -> Callable[[Call], Reply]:
    """Answer each chunk with its own record."""
    replies = iter(answers)

    def write(_: Call) -> Reply:
        reply = next(replies)
        return json.dumps(reply) if isinstance(reply, dict | list) else reply  # type: ignore[return-value]

    return write


def test_one_chunk_gives_the_record_and_where_it_stands(tokenizer: Tokenizer) -> None:
    record = {"name": "Ada", "year": 1843, "tags": ["math"], "mixed": ["a"]}
    result = extract(tokenizer, in_turn(record), "In 1843 Ada loved MATH.")
    place = {"fields": {**record, "place": None, "mixed": '["a"]'}}
    assert result.values == {
        **place,
        "evidence": [
            {"path": "/name", "value": "Ada", "start": 8, "end": 11, "chunk_index": 0},
            {"path": "/tags/0", "value": "math", "start": 18, "end": 22, "chunk_index": 0},
        ],
        "conflicts": [],
    }


def test_results_fit_the_declared_columns(tokenizer: Tokenizer) -> None:
    first = {"name": "Ada", "year": 1, "tags": ["x"], "place": {"city": "Wien"}, "mixed": 3}
    second = {"name": "Bob", "tags": []}
    result = extract(tokenizer, in_turn(first, second), "Ada in Wien. ", "Bob.")
    schema = pa.schema(make(tokenizer).output_fields)
    table = pa.Table.from_pylist([result.values], schema=schema)
    assert table.to_pylist()[0]["fields"]["place"] == {"city": "Wien", "zip": None}
    assert table.to_pylist()[0]["conflicts"] == [
        {"path": "/name", "values": ["Bob"], "chunk_indexes": [1]}
    ]


def test_one_chunk_is_asked_for_the_record_and_several_for_what_they_know(
    tokenizer: Tokenizer,
) -> None:
    unknown = {"name": None, "tags": []}
    known = {"name": "A", "tags": ["x"]}
    grammars = []

    def write(call: Call) -> str:
        assert call.grammar is not None
        grammars.append(json.loads(call.grammar.json_schema))
        return json.dumps(known)

    extract(tokenizer, write, "one")
    extract(tokenizer, write, "one ", "two")
    strict, relaxed = (jsonschema.Draft202012Validator(grammars[index]) for index in (0, 1))
    assert strict.is_valid(known)
    assert not strict.is_valid(unknown)
    assert relaxed.is_valid(known)
    assert relaxed.is_valid(unknown)
    assert relaxed.is_valid({**unknown, "place": {"city": None}, "mixed": None})
    assert not relaxed.is_valid({**unknown, "mixed": [1]})
    assert not relaxed.is_valid({**unknown, "other": 1})


def test_what_one_chunk_does_not_know_another_fills_in(tokenizer: Tokenizer) -> None:
    answers = in_turn({"name": None, "tags": ["a"]}, {"name": "Ada", "tags": ["b", "a"]})
    result = extract(tokenizer, answers, "First part. ", "Then Ada.")
    assert result.values["fields"]["name"] == "Ada"
    assert result.values["fields"]["tags"] == ["a", "b"]
    assert [one["chunk_index"] for one in result.values["evidence"]] == [1, 0, 1]


def failure(result: Result) -> tuple[str, str]:
    assert result.error is not None
    return result.error.error_type, result.error.message


def test_a_merged_record_that_breaks_the_schema_fails_without_showing_the_value(
    tokenizer: Tokenizer,
) -> None:
    answers = in_turn({"name": None, "tags": []}, {"name": None, "tags": ["secret"]})
    error_type, message = failure(extract(tokenizer, answers, "One. ", "Two."))
    assert error_type == "schema_violation"
    assert message == "no chunk gives the required /name"


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ({"name": "secret", "tags": [5]}, "/tags/0 breaks 'type'"),
        ({"name": "", "tags": ["secret"]}, "/name breaks 'minLength'"),
        ({"name": "x", "tags": ["x"], "secret": 1}, "/ breaks 'additionalProperties'"),
        ({"name": "x", "tags": ["x"], "year": 2**63}, "/year is no 64-bit integer"),
        ({"name": "\ud800", "tags": ["x"]}, "/name holds half"),
        (["secret"], "/ breaks 'type'"),
        ("secret", "is not valid JSON"),
        ("NaN", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("9" * 10_000, "is not valid JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_answer_that_breaks_the_schema_fails_without_showing_the_value(
    tokenizer: Tokenizer, answer: object, place: str
) -> None:
    error_type, message = failure(extract(tokenizer, in_turn(answer), "x"))
    assert error_type == "schema_violation"
    assert place in message
    assert "secret" not in message


def test_a_cut_answer_fails_with_its_finish_reason(tokenizer: Tokenizer) -> None:
    cut = Completion('{"name": "A', 10, 5, "length")
    result = extract(tokenizer, in_turn(cut), "x")
    assert failure(result) == (
        "schema_violation",
        "the answer was cut at task.max_tokens before its end",
    )
    assert (result.finish_reason, result.num_completion_tokens) == ("length", 5)


def test_a_failed_chunk_is_left_out_where_that_is_allowed(tokenizer: Tokenizer) -> None:
    known = {"name": "A", "tags": ["x"]}
    answers = (RowFailure("too_long", "no"), known)
    result = extract(tokenizer, in_turn(*answers), "One. ", "Two.", max_failed_chunks=1)
    assert result.values["fields"]["name"] == "A"
    assert (result.num_chunks, result.num_failed_chunks) == (2, 1)
    assert failure(extract(tokenizer, in_turn(*answers), "One. ", "Two."))[0] == "too_long"


def test_the_model_sees_the_schema_and_the_examples(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, in_turn({"name": "A", "tags": ["x"]}))
    example = Example(input="Ex in", output={"name": "Ex", "tags": ["y"]})
    task = make(tokenizer, examples=[example], language="German")
    asyncio.run(task.run(make_document(tokenizer, "x"), llm))
    text = llm.calls[0].text
    assert '"minLength":1' in text
    assert text.index("Ex in") < text.index('{"name":"Ex","tags":["y"]}')
    assert "Write in German." in text


@pytest.mark.parametrize("output", ["no json", '{"name": "x"}', {"name": 5, "tags": []}])
def test_an_example_that_is_no_record_is_refused(tokenizer: Tokenizer, output: object) -> None:
    with pytest.raises(ConfigError, match=r"task\.examples\[0\]\.output is no record"):
        make(tokenizer, examples=[Example(input="x", output=output)])  # type: ignore[arg-type]
