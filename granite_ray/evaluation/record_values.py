"""A record as the values of its fields, in a form in which equal values are equal texts."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from granite_ray.tasks.shapes import Shape, pointer


class MisfitError(Exception):
    """A true value is of another kind than its place in the schema."""

    def __init__(self, path: str, wanted: str) -> None:
        super().__init__(path, wanted)
        self.path = path or "/"
        self.wanted = wanted


def field_paths(shape: Shape, path: str = "") -> Iterator[str]:
    """Yield the JSON Pointer of every field: scalars at any depth, and whole lists."""
    if shape.kind != "object":
        yield path
        return
    for name, below in shape.properties.items():
        yield from field_paths(below, pointer(path, name))


def named_fields(record: Mapping[str, Any], shape: Shape, path: str = "") -> Iterator[str]:
    """Yield the fields that a record names; an object that is null names all of its own."""
    if shape.kind != "object":
        yield path
        return
    for name, below in shape.properties.items():
        if name in record:
            value, place = record[name], pointer(path, name)
            if isinstance(value, Mapping):
                yield from named_fields(value, below, place)
            else:
                yield from field_paths(below, place)


def field_values(value: Any, shape: Shape, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each value with its field's path; of a list, each item.

    Raises:
        MisfitError: An object or list is wanted, and it is none.
    """
    if value is None:
        return
    if shape.kind == "object":
        if not isinstance(value, Mapping):
            raise MisfitError(path, "object")
        for name, below in shape.properties.items():
            yield from field_values(value.get(name), below, pointer(path, name))
    elif shape.items is not None:
        if not isinstance(value, list):
            raise MisfitError(path, "list")
        for item in value:
            yield path, _text(item, shape.items)
    else:
        yield path, _text(value, shape)


def _text(value: Any, shape: Shape) -> str:
    if shape.kind == "string" and isinstance(value, str):
        return value
    if shape.kind == "json" and isinstance(value, str):
        with suppress(ValueError):  # the truth may hold the text itself, not JSON
            value = json.loads(value)
    plain = _plain(value)
    if shape.kind == "string" and isinstance(plain, str):
        return plain
    return json.dumps(plain, ensure_ascii=False, sort_keys=True)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, with one form for each number and no nulls in objects."""
    match value:
        case Mapping():
            return {name: _plain(below) for name, below in value.items() if below is not None}
        case list():
            return [_plain(item) for item in value]
        case date() | datetime() | time():
            return value.isoformat()
        case Decimal():
            return _plain(float(value))
        case float() if value.is_integer():
            return int(value)
        case _:
            return value
