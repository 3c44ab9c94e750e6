"""The words of a user's schema: which are known, which are refused, and with what advice."""

from typing import Any

from granite_ray.errors import ConfigError

ONE_SCHEMA = frozenset({"items", "additionalProperties"})
MANY_SCHEMAS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
CONSTRAINTS = (
    frozenset({"type", "enum", "const", "required", "minProperties", "maxProperties"})
    | {"minItems", "maxItems", "uniqueItems", "minLength", "maxLength", "pattern", "format"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)
SHOWN_NOTES = frozenset({"description", "examples"})
"""Annotations that stay, because the model sees them."""

DROPPED_NOTES = frozenset(
    {"title", "default", "deprecated", "readOnly", "writeOnly", "discriminator"}
) | {"contentEncoding", "contentMediaType", "$comment", "$schema", "$id", "$defs", "definitions"}
ADVICE = {
    "not": "State what the value is instead.",
    "if": "Use anyOf.",
    "then": "Use anyOf.",
    "else": "Use anyOf.",
    "patternProperties": "Use additionalProperties.",
    "propertyNames": "Name the properties.",
    "contains": "Constrain items instead.",
    "additionalItems": "Use prefixItems and items.",
    "dependentRequired": "Use anyOf.",
    "dependentSchemas": "Use anyOf.",
    "$dynamicRef": "Use $ref.",
    "x-guidance": "It would change the grammar itself.",
}

Definition = dict[str, Any]


def escaped(name: str) -> str:
    """Return a property's name as a JSON Pointer has it."""
    return name.replace("~", "~0").replace("/", "~1")


def refusal(place: str, problem: str, way_out: str) -> ConfigError:
    """Say what is wrong at a place of the user's schema."""
    return ConfigError(f"task.schema at {place or '/'}: {problem}. {way_out}".strip())
