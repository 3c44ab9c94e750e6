"""JSON Schemas of varied features that a grammar must hold to, by name."""

from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Currency(Enum):
    EUR = "EUR"
    USD = "USD"


class Amount(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: float = Field(ge=0, le=1000)
    currency: Currency


class Invoice(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: str = Field(pattern=r"^[A-Z]{2}-[0-9]{4}$")
    issued: str | None = None
    total: Amount
    lines: list[Amount] = Field(default_factory=list, max_length=3)
    kind: Literal["invoice", "credit"] = "invoice"


class Person(BaseModel):
    name: str
    age: int | None
    friends: list["Person"] = Field(default_factory=list, max_length=2)


def closed(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """An object with these properties and no others; all required unless told otherwise."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


STRING = {"type": "string"}
INTEGER = {"type": "integer"}

SCHEMAS: dict[str, dict[str, Any]] = {
    "string": STRING,
    "integer": INTEGER,
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "enum_of_strings": {"enum": ["red", "green", "blue"]},
    "enum_of_kinds": {"enum": ["a", 1, 2.5, True, None, [1], {"k": "v"}]},
    "enum_with_escapes": {"enum": ['say "hi"', "back\\slash", "line\nbreak", "日本語", "🙂"]},
    "enum_sharing_beginnings": {"enum": ["a", "ab", "abc", "abcd"]},
    "const": {"const": {"fixed": ["yes", 1]}},
    "type_list": {"type": ["string", "integer", "null"]},
    "object": closed({"name": STRING, "age": INTEGER}),
    "object_with_optional": closed({"a": STRING, "b": INTEGER, "c": {"type": "null"}}, ["b"]),
    "object_all_optional": closed({"a": STRING, "b": INTEGER}, []),
    "empty_object": closed({}),
    "free_object": {"type": "object"},
    "open_object": {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
    "map": {"type": "object", "additionalProperties": INTEGER},
    "pattern_properties": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,3}$": INTEGER},
        "additionalProperties": False,
    },
    "nested": closed({"outer": closed({"inner": closed({"leaf": {"type": "boolean"}})})}),
    "array": {"type": "array", "items": INTEGER},
    "array_bounded": {"type": "array", "items": STRING, "minItems": 2, "maxItems": 4},
    "array_of_objects": {"type": "array", "items": closed({"k": STRING, "v": {"type": "number"}})},
    "array_of_arrays": {
        "type": "array",
        "items": {"type": "array", "items": INTEGER, "maxItems": 2},
        "maxItems": 3,
    },
    "tuple": {
        "type": "array",
        "prefixItems": [STRING, INTEGER, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "integer_range": {"type": "integer", "minimum": -5, "maximum": 12},
    "integer_exclusive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
    "number_range": {"type": "number", "minimum": 0.25, "maximum": 1.5},
    "multiple_of": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "string_lengths": {"type": "string", "minLength": 3, "maxLength": 8},
    "string_length_in_code_points": {"type": "string", "pattern": "^[à-ÿ🙂]+$", "maxLength": 4},
    "string_pattern": {"type": "string", "pattern": "^(foo|bar)-[0-9]{2,4}$"},
    "string_pattern_unanchored": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 20},
    "date": {"type": "string", "format": "date"},
    "date_time": {"type": "string", "format": "date-time"},
    "email": {"type": "string", "format": "email"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "nullable": closed({"maybe": {"anyOf": [STRING, {"type": "null"}]}}),
    "any_of": {"anyOf": [closed({"a": INTEGER}), closed({"b": STRING}), INTEGER]},
    "one_of_disjoint": {"oneOf": [closed({"t": {"const": "x"}}), closed({"t": {"const": "y"}})]},
    "all_of": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"b": STRING}, "required": ["b"]},
        ]
    },
    "definitions": {
        "$defs": {"point": closed({"x": INTEGER, "y": INTEGER})},
        **closed({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
    },
    "recursive": {
        "$defs": {
            "node": closed(
                {
                    "value": INTEGER,
                    "children": {
                        "type": "array",
                        "items": {"$ref": "#/$defs/node"},
                        "maxItems": 2,
                    },
                }
            )
        },
        "$ref": "#/$defs/node",
    },
    "linked_list": {
        "$defs": {
            "link": closed({"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/link"}]}})
        },
        "$ref": "#/$defs/link",
    },
    "unicode_names": closed({"größe": INTEGER, "名前": STRING, 'a "quoted" \\ name': STRING}),
    "annotations": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Thing",
        "description": "A thing.",
        **closed({"a": {"type": "string", "description": "An a.", "examples": ["x"]}}),
    },
    "pydantic_invoice": Invoice.model_json_schema(),
    "pydantic_recursive": Person.model_json_schema(),
}
"""Every one compiles; an answer that ended by itself validates against it."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "uniqueItems": ({"type": "array", "items": INTEGER, "uniqueItems": True}, "uniqueItems"),
    "not": ({"not": STRING}, "not"),
    "contains": ({"type": "array", "contains": INTEGER}, "contains"),
    "if": ({"if": STRING, "then": {"minLength": 1}}, "if"),
    "dependentRequired": (
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        "dependentRequired",
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    "unknown format": ({"type": "string", "format": "rhyme"}, "rhyme"),
    "unknown type": ({"type": "text"}, "text"),
    "look-around": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "remote reference": ({"$ref": "http://localhost/schema.json"}, "http://localhost/schema.json"),
    "overlapping oneOf": ({"oneOf": [{"type": "number"}, INTEGER]}, "oneOf"),
    "unsatisfiable": ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    "empty enum": ({"enum": []}, "anyOf is empty"),
}
"""Schemas that cannot become a grammar, and the word that the refusal must hold."""
