"""What a schema's places look like as Arrow columns, and values made fit for them.

A place that Arrow cannot type (alternatives, free objects, tuples) holds a JSON string.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jsonschema
import pyarrow as pa

from granite_ray.errors import RowFailure
from granite_ray.tasks.keywords import Definition

Kind = Literal["object", "array", "string", "integer", "number", "boolean", "json"]

INT64 = range(-(2**63), 2**63)
ARROW_TYPES = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "json": pa.string(),
}
VALUE_KINDS: dict[type, Kind] = {str: "string", bool: "boolean", int: "integer", float: "number"}


@dataclass(frozen=True, slots=True)
class Shape:
    """One place of a record. `is_nullable` says that the schema itself accepts null there."""

    kind: Kind
    is_nullable: bool = False
    properties: Mapping[str, "Shape"] = field(default_factory=dict)
    items: "Shape | None" = None
    max_items: int | None = None
    is_unique: bool = False

    @property
    def arrow_type(self) -> pa.DataType:
        """The declared type of the place; every place may be null."""
        if self.kind == "object":
            return pa.struct([(name, below.arrow_type) for name, below in self.properties.items()])
        if self.items is not None:
            return pa.list_(self.items.arrow_type)
        return ARROW_TYPES[self.kind]


def shape_of(node: Definition | bool) -> Shape:
    """Return the shape of a checked definition."""
    if not isinstance(node, dict):
        return Shape("json", is_nullable=bool(node))
    is_nullable = jsonschema.Draft202012Validator(node).is_valid(None)
    alternatives = _alternatives(node)
    if alternatives is not None:
        return _common_shape([shape_of(below) for below in alternatives], is_nullable)
    kind = _kind(node)
    if kind == "object":
        properties = {name: shape_of(below) for name, below in node["properties"].items()}
        return Shape("object", is_nullable, properties)
    if kind == "array":
        return Shape(
            "array",
            is_nullable,
            items=shape_of(node["items"]),
            max_items=node.get("maxItems"),
            is_unique=node.get("uniqueItems", False),
        )
    return Shape(kind, is_nullable)


def arrow_value(value: Any, shape: Shape, path: str = "") -> Any:
    """Return a valid value as pyarrow takes it for the shape's type.

    Raises:
        RowFailure: The schema allows the value, but the column cannot hold it.
    """
    if value is None:
        return None
    if shape.kind == "object":
        return {
            name: arrow_value(value.get(name), below, pointer(path, name))
            for name, below in shape.properties.items()
        }
    if shape.items is not None:
        return [
            arrow_value(item, shape.items, f"{path}/{index}") for index, item in enumerate(value)
        ]
    return _scalar(value, shape.kind, path)


def pointer(path: str, name: str) -> str:
    """Return the JSON Pointer of a property below `path`."""
    return f"{path}/{name.replace('~', '~0').replace('/', '~1')}"


def declared_path(steps: Iterable[str | int], shape: Shape) -> str:
    """Return the JSON Pointer of a place in a record, as far as the schema names its properties."""
    path = ""
    for step in steps:
        if shape.items is not None:
            shape = shape.items
        elif step in shape.properties:
            shape = shape.properties[str(step)]
        else:
            break
        path = pointer(path, str(step))
    return path


def _scalar(value: Any, kind: Kind, path: str) -> Any:
    if kind == "integer":
        _require(int(value) in INT64, path, "is no 64-bit integer")
        return int(value)
    if kind == "number":
        _require(abs(value) <= sys.float_info.max, path, "is no 64-bit number")
        return float(value)
    if kind == "boolean":
        return value
    text = value if kind == "string" else json.dumps(value, ensure_ascii=False)
    _require(_is_unicode(text), path, "holds half of a surrogate pair")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require(condition: bool, path: str, problem: str) -> None:
    if not condition:
        raise RowFailure("schema_violation", f"the value at {path} {problem}")


def _alternatives(node: Definition) -> list[Any] | None:
    """Return what a node is made of if it only lists alternatives; null is not one of them."""
    for keyword in ("anyOf", "oneOf"):
        if keyword in node and not node.keys() - {keyword, "description", "examples"}:
            return [below for below in node[keyword] if not _is_null(below)]
    return None


def _is_null(node: Any) -> bool:
    return isinstance(node, dict) and (
        node.get("type") == "null" or ("const" in node and node["const"] is None)
    )


def _common_shape(shapes: list[Shape], is_nullable: bool) -> Shape:
    if not shapes:
        return Shape("json", is_nullable)
    kinds = {shape.kind for shape in shapes}
    first = shapes[0]
    if len(shapes) == 1:
        return replace(first, is_nullable=is_nullable)
    if kinds <= {"string"} or kinds <= {"boolean"} or kinds <= {"integer"}:
        return Shape(first.kind, is_nullable)
    if kinds <= {"integer", "number"}:
        return Shape("number", is_nullable)
    return Shape("json", is_nullable)


def _kind(node: Definition) -> Kind:
    if node.keys() & {"anyOf", "oneOf", "allOf"}:
        return "json"
    if "const" in node or "enum" in node:
        return _kind_of_values(node.get("enum", [node.get("const")]))
    types = node.get("type")
    names = {types} if isinstance(types, str) else set(types or ())
    match sorted(names - {"null"}):
        case ["string"]:
            return "string"
        case ["integer"]:
            return "integer"
        case ["number"] | ["integer", "number"]:
            return "number"
        case ["boolean"]:
            return "boolean"
        case ["array"] if isinstance(node.get("items"), dict) and "prefixItems" not in node:
            return "array"
        case ["object"] if node.get("properties") and node.get("additionalProperties") is False:
            return "object"
        case _:
            return "json"


def _kind_of_values(values: list[Any]) -> Kind:
    kinds: set[Kind] = {
        VALUE_KINDS.get(type(value), "json") for value in values if value is not None
    }
    if len(kinds) == 1:
        return kinds.pop()
    return "number" if kinds == {"integer", "number"} else "json"
