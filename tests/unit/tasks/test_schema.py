"""User schemas: what they become in Arrow, and what is refused by name."""

import datetime
import enum
import json
from typing import Any, Literal, Optional

import jsonschema
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from granite_ray.errors import ConfigError, RowFailure
from granite_ray.tasks.fields import RecordSchema
from granite_ray.tasks.schema import MAX_DEPTH
from granite_ray.tasks.shapes import arrow_value, shape_of
from tests.schemas import SCHEMAS

STRING = {"type": "string"}


def record(**properties: object) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def arrow_type_of(place: object) -> pa.DataType:
    return RecordSchema(record(a=place)).field.type.field("a").type


text, integer, number, boolean = pa.string(), pa.int64(), pa.float64(), pa.bool_()
json_text = text  # what Arrow cannot type


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (STRING, text),
        ({"type": "integer"}, integer),
        ({"type": "number"}, number),
        ({"type": "boolean"}, boolean),
        ({"type": ["string", "null"]}, text),
        ({"type": ["null", "integer"]}, integer),
        ({"type": ["integer", "number"]}, number),
        ({"type": ["integer", "string"]}, json_text),
        ({"type": "null"}, json_text),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, integer),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, number),
        ({"anyOf": [{"type": "integer"}, STRING]}, json_text),
        ({"anyOf": [{"type": "string", "maxLength": 3}, {"const": "longer"}]}, text),
        ({"oneOf": [STRING, {"type": "null"}]}, text),
        ({"allOf": [STRING, {"minLength": 3}]}, json_text),
        ({"enum": ["a", "b"]}, text),
        ({"enum": ["a", None]}, text),
        ({"enum": [1, 2]}, integer),
        ({"enum": [1, 2.5]}, number),
        ({"enum": [True, 1]}, json_text),
        ({"enum": ["a", 1]}, json_text),
        ({"const": "a"}, text),
        ({"const": 5}, integer),
        ({"const": True}, boolean),
        ({"type": "string", "format": "date"}, text),
        ({"type": "string", "format": "date-time"}, text),
        ({"type": "string", "pattern": r"^\p{L}+$"}, text),
        ({"type": "array", "items": STRING}, pa.list_(text)),
        ({"type": "array", "items": STRING, "uniqueItems": True}, pa.list_(text)),
        (
            {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            pa.list_(pa.list_(integer)),
        ),
        ({"type": "array"}, json_text),
        ({"type": "array", "prefixItems": [STRING], "items": False}, json_text),
        ({"type": "array", "items": {}}, pa.list_(json_text)),
        ({"type": "object"}, json_text),
        ({"type": "object", "additionalProperties": STRING}, json_text),
        ({"type": "object", "properties": {"x": STRING}, "additionalProperties": True}, json_text),
        (record(x={"type": "integer"}), pa.struct([("x", integer)])),
        ({"anyOf": [record(x=STRING), {"type": "null"}]}, pa.struct([("x", text)])),
        ({"anyOf": [record(x=STRING), record(y=STRING)]}, json_text),
        (
            {"type": "array", "items": record(x={"type": "number"}), "minItems": 1},
            pa.list_(pa.struct([("x", number)])),
        ),
        ({}, json_text),
        (True, json_text),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else str(value),
)
def test_each_place_has_its_arrow_type(place: object, expected: pa.DataType) -> None:
    assert arrow_type_of(place) == expected


def test_fields_keep_the_order_of_the_schema() -> None:
    schema = RecordSchema(record(zeta=STRING, alpha=STRING, mid={"type": "integer"}))
    assert [field.name for field in schema.field.type] == ["zeta", "alpha", "mid"]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Line(BaseModel):
    label: str = Field(description="As printed.")
    amount: float


class Order(BaseModel):
    number: int = Field(ge=1)
    color: Color
    state: Literal["open", "closed"] = "open"
    due: Optional[datetime.date] = None  # noqa: UP045 - the older spelling must work too
    first: Line | None = None
    lines: list[Line]
    notes: dict[str, str] = {}
    tags: set[str] = set()
    pair: tuple[int, str]


def test_a_pydantic_model_becomes_a_struct() -> None:
    line = pa.struct([("label", text), ("amount", number)])
    assert RecordSchema(Order.model_json_schema()).field.type == pa.struct(
        [
            ("number", integer),
            ("color", text),
            ("state", text),
            ("due", text),
            ("first", line),
            ("lines", pa.list_(line)),
            ("notes", json_text),
            ("tags", pa.list_(text)),
            ("pair", json_text),
        ]
    )


def test_a_description_beside_a_reference_stays_for_the_model_to_see() -> None:
    schema = {**record(a={"$ref": "#/$defs/x", "description": "Big."}), "$defs": {"x": STRING}}
    assert RecordSchema(schema).definition["properties"]["a"] == {**STRING, "description": "Big."}


def test_objects_are_closed() -> None:
    definition = RecordSchema(record(a=record(b=STRING))).definition
    assert definition["additionalProperties"] is False
    assert definition["properties"]["a"]["additionalProperties"] is False


def deep(levels: int) -> dict[str, Any]:
    place: dict[str, Any] = STRING
    for _ in range(levels):
        place = record(a=place)
    return place


def doubling(levels: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {"d0": STRING}
    for level in range(levels):
        below = {"$ref": f"#/$defs/d{level}"}
        definitions[f"d{level + 1}"] = record(a=below, b=below)
    return {**record(a={"$ref": f"#/$defs/d{levels}"}), "$defs": definitions}


def chained(length: int) -> dict[str, Any]:
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {**record(a={"$ref": "#/$defs/d0"}), "$defs": {**links, f"d{length}": STRING}}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "array", "items": STRING}, "must be an object at its top"),
        (STRING, "must be an object at its top"),
        ({"type": "object"}, "must list the record's properties"),
        ({**record(a=STRING), "additionalProperties": True}, "additionalProperties must be false"),
        (record(a={"not": STRING}), "/properties/a/not: the keyword 'not' is not supported"),
        (record(a={"if": STRING}), "'if' is not supported"),
        (record(a={"patternProperties": {"^x": STRING}}), "'patternProperties' is not supported"),
        (record(a={"propertyNames": STRING}), "'propertyNames' is not supported"),
        (record(a={"type": "array", "contains": STRING}), "'contains' is not supported"),
        (record(a={"dependentRequired": {"a": ["b"]}}), "'dependentRequired' is not supported"),
        (record(a={"unevaluatedProperties": False}), "'unevaluatedProperties' is not supported"),
        (record(a={"$dynamicRef": "#x"}), r"'\$dynamicRef' is not supported"),
        ({**record(a=STRING), "x-guidance": {"lenient": True}}, "'x-guidance' is not supported"),
        (record(a={"madeUp": 1}), "'madeUp' is not supported"),
        (record(**{"a/b": {"madeUp": 1}}), "/properties/a~1b/madeUp"),
        (record(a={"$ref": "http://169.254.169.254/x"}), "is not local"),
        (record(a={"$ref": "file:///etc/passwd"}), "is not local"),
        (record(a={"$ref": "#/$defs/none"}), "leads nowhere"),
        (record(a={"$ref": "#"}), "is recursive"),
        (record(a={"$ref": "#/required"}), "is not a schema"),
        (record(a={"type": "strin"}), "is not valid"),
        (record(a={"type": "string", "minLength": -1}), "is not valid"),
        (record(a={"type": "array", "items": [STRING]}), "is not valid"),
        (record(a={"type": "string", "format": "weird"}), "Unknown format: weird"),
        (record(a={"type": "string", "pattern": "^a(?=b)"}), "look-around"),
        (record(a={"type": "integer", "minimum": 5, "maximum": 3}), "[Uu]nsatisfiable"),
        (record(a={"enum": []}), "[Uu]nsatisfiable"),
        (record(a={"oneOf": [{"type": "string", "minLength": 2}, STRING]}), "oneOf"),
        (deep(MAX_DEPTH + 1), "nested deeper than 16 levels"),
        (deep(400), "nested deeper than 16 levels"),
        (doubling(14), "more than 2,000 parts"),
        (chained(1500), "follow each other"),
        (record(a={"description": "x" * 300_000}), "has 300,"),
        (record(a={"default": {1, 2}}), "not plain JSON"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_schema_that_cannot_be_kept_is_refused_by_name(
    schema: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=r"task\.schema") as caught:
        RecordSchema(schema)
    assert pytest.raises(ConfigError, match=problem).matches(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "properties", "items", "$ref", "anyOf", "enum", "required", "a"]
            ),
            below,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=3), json_values, max_size=3), json_values)
def test_no_malformed_schema_gets_past_as_anything_but_a_config_error(
    properties: dict[str, Any], other: object
) -> None:
    schema = {"type": "object", "properties": properties, "$defs": {"a": other}}
    try:
        RecordSchema(schema)
    except ConfigError as error:
        assert "task.schema" in str(error)  # noqa: PT017 - raised or not, both are right


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_a_schema_is_either_refused_or_equivalent_to_what_was_given(name: str) -> None:
    """`definition` may only be narrower than the user's schema: what passes it must pass that."""
    given_schema = SCHEMAS[name]
    place = {key: value for key, value in given_schema.items() if key != "$defs"}
    schema = {**record(a=place), "$defs": given_schema.get("$defs", {})}
    try:
        kept = RecordSchema(schema)
    except ConfigError as error:
        assert "recursive" in str(error) or "patternProperties" in str(error)  # noqa: PT017
        return
    samples = [
        None,
        "",
        "a",
        "EUR",
        0,
        1,
        2.5,
        True,
        [],
        ["a"],
        [1],
        [[1]],
        {},
        {"a": 1},
        {"k": "v"},
    ]
    for sample in samples:
        if jsonschema.Draft202012Validator(kept.definition).is_valid({"a": sample}):
            assert jsonschema.Draft202012Validator(schema).is_valid({"a": sample})
            value = arrow_value({"a": sample}, kept.shape)
            pa.array([value], kept.field.type)


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ({"type": "integer"}, 1.0, 1),
        ({"type": "integer"}, 2**63 - 1, 2**63 - 1),
        ({"type": "number"}, 3, 3.0),
        ({"type": "object"}, {"ü": [1]}, '{"ü": [1]}'),
        ({"type": ["integer", "string"]}, "a", '"a"'),
        ({"type": ["integer", "null"]}, None, None),
    ],
)
def test_values_take_the_form_of_their_column(
    place: dict[str, Any], value: object, expected: object
) -> None:
    converted = arrow_value(value, shape_of(place))
    assert (converted, type(converted)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ({"type": "integer"}, 2**63, "64-bit integer"),
        ({"type": "integer"}, -(2**63) - 1, "64-bit integer"),
        ({"type": "number"}, float("inf"), "64-bit number"),
        ({"type": "number"}, 10**400, "64-bit number"),
        ({"type": "string"}, "\ud800", "surrogate"),
        ({"type": "object"}, {"\ud800": 1}, "surrogate"),
    ],
)
def test_values_that_no_column_can_hold_fail_the_row(
    place: dict[str, Any], value: object, problem: str
) -> None:
    with pytest.raises(RowFailure, match=f"at /x.*{problem}"):
        arrow_value(value, shape_of(place), "/x")
