"""`x-copy` in a user's schema: what it becomes, what is refused, what the engine and model see."""

import asyncio
import json
from typing import Annotated, Any

import pyarrow as pa
import pytest
from pydantic import BaseModel, Field

from granite_ray.config import ExtractConfig, GenerateConfig
from granite_ray.errors import ConfigError
from granite_ray.tasks import TaskLimits, make_task
from granite_ray.tasks.schema import check_schema
from granite_ray.tokenizer import Tokenizer
from tests.unit.tasks.scripted import Call, ScriptedLLM, make_document

COPY = {"x-copy": True}
SPAN = {"type": "string", **COPY}
SETTLED = {"type": ["string", "null"], **COPY}
NULL = {"type": "null"}
STRING = {"type": "string"}
LIMITS = TaskLimits(max_model_len=3000)


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def settled(place: dict[str, Any]) -> Any:
    return check_schema(record(a=place))["properties"]["a"]


@pytest.mark.parametrize(
    "place",
    [
        SPAN,
        SETTLED,
        {"anyOf": [SPAN, NULL]},
        {"anyOf": [NULL, SPAN]},
        {"oneOf": [SPAN, NULL]},
        {"anyOf": [STRING, NULL], **COPY},
        {"anyOf": [SETTLED, NULL]},
    ],
    ids=str,
)
def test_a_copied_string_may_be_null_however_it_is_written(place: dict[str, Any]) -> None:
    assert settled(place) == SETTLED


@pytest.mark.parametrize("item", [SPAN, SETTLED, {"anyOf": [STRING, NULL], **COPY}], ids=str)
def test_an_item_of_a_list_is_never_null(item: dict[str, Any]) -> None:
    assert settled({"type": "array", "items": item}) == {"type": "array", "items": SPAN}


def test_it_may_stand_deep_inside_and_what_stands_beside_it_stays() -> None:
    free = {"anyOf": [STRING, {"type": "integer"}]}
    noted = {**SPAN, "description": "Who.", "maxLength": 40, "minLength": 1}
    inner = record(who=noted, free=free)
    people = {"type": ["array", "null"], "items": {"anyOf": [inner, NULL]}, "minItems": 1}
    closed = {**inner, "additionalProperties": False}
    closed["properties"] = {"who": {**noted, "type": ["string", "null"]}, "free": free}
    assert settled(people) == {**people, "items": {"anyOf": [closed, NULL]}}


def test_a_pydantic_class_can_ask_for_it() -> None:
    class Order(BaseModel):
        number: str = Field(json_schema_extra=COPY)
        buyer: str | None = Field(None, description="Who pays.", json_schema_extra=COPY)
        lines: list[Annotated[str, Field(json_schema_extra=COPY)]]

    properties = check_schema(Order.model_json_schema())["properties"]
    assert properties == {
        "number": SETTLED,
        "buyer": {**SETTLED, "description": "Who pays."},
        "lines": {"type": "array", "items": SPAN},
    }


@pytest.mark.parametrize(
    ("place", "pointer", "problem"),
    [
        ({**STRING, "x-copy": "yes"}, "/properties/a/x-copy", "'yes'"),
        ({**SPAN, "pattern": "^a"}, "/properties/a", "'pattern'"),
        ({**SPAN, "format": "date"}, "/properties/a", "'format'"),
        ({**SPAN, "enum": ["a"]}, "/properties/a", "'enum'"),
        ({**SPAN, "minLength": 2}, "/properties/a", "minLength"),
        ({**SPAN, "maxLength": 0}, "/properties/a", "maxLength"),
        (COPY, "/properties/a", "needs type string"),
        ({"type": "integer", **COPY}, "/properties/a", "needs type string"),
        ({"type": "array", "items": STRING, **COPY}, "/properties/a", "needs type string"),
        ({"type": ["string", "integer"], **COPY}, "/properties/a", "needs type string"),
        ({"type": "array", "prefixItems": [SPAN]}, "/properties/a", "'prefixItems'"),
        ({"type": "array", "items": SPAN, "enum": [[]]}, "/properties/a", "'enum'"),
        ({"allOf": [SPAN]}, "/properties/a", "no record"),
        ({"type": "object", "additionalProperties": SPAN}, "/properties/a", "no record"),
        ({"properties": {"b": SPAN}}, "/properties/a", "no record"),
        ({**record(b=SPAN), "minProperties": 1}, "/properties/a", "'minProperties'"),
        ({"anyOf": [SPAN, {"type": "integer"}]}, "/properties/a", "several alternatives"),
        ({"anyOf": [SPAN, NULL], "type": "string"}, "/properties/a", "'type'"),
        ({"anyOf": [record(b={"allOf": [SPAN]}), NULL]}, "/a/anyOf/0/properties/b", "no record"),
        ({"$ref": "#/$defs/b", **COPY}, "/properties/a", "no record"),
    ],
    ids=str,
)
def test_where_nothing_can_be_copied_it_is_refused_by_place(
    place: dict[str, Any], pointer: str, problem: str
) -> None:
    schema = {"$defs": {"b": STRING}, **record(a=place)}
    with pytest.raises(ConfigError, match=r"task\.schema at /") as refused:
        check_schema(schema)
    assert f"{pointer}: " in str(refused.value)
    assert problem in str(refused.value)


FIELDS = record(
    name=SPAN,
    tags={"type": "array", "items": SPAN, "minItems": 1},
    note=STRING,
)


def make(tokenizer: Tokenizer, **options: Any) -> Any:
    config = ExtractConfig(kind="extract", **{"schema": FIELDS, "max_tokens": 200, **options})
    return make_task(config, tokenizer, LIMITS)


def test_the_engine_is_told_the_chunk_and_the_model_sees_no_mark(tokenizer: Tokenizer) -> None:
    replies = iter(
        [
            {"name": None, "tags": ["fox"], "note": "x"},
            {"name": "dog", "tags": ["dog"], "note": None},
        ]
    )
    llm = ScriptedLLM(tokenizer, lambda _: json.dumps(next(replies)))
    document = make_document(tokenizer, "A fox, ", "a dog and a fox.")
    task = make(tokenizer)
    result = asyncio.run(task.run(document, llm))
    assert [call.grammar.source for call in llm.calls if call.grammar] == [
        "A fox, ",
        "a dog and a fox.",
    ]
    assert all("x-copy" in call.grammar.json_schema for call in llm.calls if call.grammar)
    assert not any("x-copy" in call.text for call in llm.calls)
    assert '"name":{"type":["string","null"]}' in llm.calls[0].text
    assert result.values["fields"] == {"name": "dog", "tags": ["fox", "dog"], "note": "x"}
    assert [(one["start"], one["end"]) for one in result.values["evidence"]][:1] == [(9, 12)]


def test_a_required_copy_that_no_chunk_gives_is_null_in_a_valid_row(tokenizer: Tokenizer) -> None:
    answer = {"name": None, "tags": ["fox"], "note": "x"}
    for texts in (["A fox."], ["A fox. ", "A dog."]):
        task = make(tokenizer)
        llm = ScriptedLLM(tokenizer, lambda _: json.dumps(answer))
        result = asyncio.run(task.run(make_document(tokenizer, *texts), llm))
        assert result.error is None
        table = pa.Table.from_pylist([result.values], schema=pa.schema(task.output_fields))
        assert table.to_pylist()[0]["fields"] == {**answer}


def test_generate_copies_from_the_text_that_its_template_shows(tokenizer: Tokenizer) -> None:
    def task(template: str) -> Any:
        options = {"schema": FIELDS, "template": template, "max_tokens": 50}
        return make_task(GenerateConfig(kind="generate", **options), tokenizer, LIMITS)

    seen: list[Call] = []
    answer = json.dumps({"name": None, "tags": ["fox"], "note": "x"})
    llm = ScriptedLLM(tokenizer, lambda call: seen.append(call) or answer)  # type: ignore[func-returns-value]
    asyncio.run(task("Who? {{ text }}").run(make_document(tokenizer, "A fox."), llm))
    assert seen[0].grammar is not None
    assert seen[0].grammar.source == "A fox."
    with pytest.raises(ConfigError, match=r"x-copy.*\{\{ text \}\}"):
        task("Who? {{ question }}")
