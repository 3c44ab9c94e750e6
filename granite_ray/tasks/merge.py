"""The records of a document's chunks → one record, by stated rules.

* A scalar: the value that most chunks give; of equally frequent ones the earliest. The others are
  conflicts. Null is no value.
* A list: all items in order; an item of a later chunk only if no earlier chunk gave it.
* An object: its properties, each by these rules.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from granite_ray.tasks.shapes import Shape, pointer

Found = list[tuple[int, Any]]
"""Chunk indexes, in order, and what each chunk gave for one place; no nulls."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Values that other chunks gave for a place, and where each was first given."""

    path: str
    values: tuple[str, ...]
    chunk_indexes: tuple[int, ...]


@dataclass(slots=True)
class MergedRecord:
    """One record, and for each scalar and list item (by JSON Pointer) the chunk that gave it."""

    values: dict[str, Any]
    conflicts: list[Conflict] = field(default_factory=list)
    chunk_indexes: dict[str, int] = field(default_factory=dict)

    def chunk_index(self, path: str) -> int:
        """Return the chunk that gave the value at `path`, alone or as part of a list item."""
        while path not in self.chunk_indexes:
            path = path.rpartition("/")[0]
        return self.chunk_indexes[path]


def merge_records(records: Sequence[tuple[int, dict[str, Any]]], shape: Shape) -> MergedRecord:
    """Merge the records of chunks, given with their chunk indexes in order."""
    merged = MergedRecord({})
    merged.values = _merge_objects(list(records), shape, "", merged)
    return merged


def _merge(found: Found, shape: Shape, path: str, merged: MergedRecord) -> Any:
    if shape.kind == "object":
        return _merge_objects(found, shape, path, merged)
    if shape.kind == "array":
        return _merge_lists(found, shape, path, merged)
    return _vote(found, path, merged)


def _merge_objects(found: Found, shape: Shape, path: str, merged: MergedRecord) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, below in shape.properties.items():
        given = [(index, value[name]) for index, value in found if value.get(name) is not None]
        if given:
            values[name] = _merge(given, below, pointer(path, name), merged)
        elif below.is_nullable:
            values[name] = None
        # else left out: null was allowed for a chunk only; if required, validation says so
    return values


def _merge_lists(found: Found, shape: Shape, path: str, merged: MergedRecord) -> list[Any]:
    items: list[Any] = []
    seen: set[str] = set()
    for index, values in found:
        before = seen.copy()  # what one chunk repeats, it means: only other chunks are compared
        for value in values:
            key = _key(value)
            if key not in (seen if shape.is_unique else before):
                merged.chunk_indexes[f"{path}/{len(items)}"] = index
                items.append(value)
            seen.add(key)
    return items[: shape.max_items]


def _vote(found: Found, path: str, merged: MergedRecord) -> Any:
    givers: dict[str, list[int]] = {}
    values: dict[str, Any] = {}
    for index, value in found:
        key = _key(value)
        givers.setdefault(key, []).append(index)
        values.setdefault(key, value)
    chosen = max(givers, key=lambda key: len(givers[key]))  # the first of the most frequent
    merged.chunk_indexes[path] = givers[chosen][0]
    others = [key for key in givers if key != chosen]
    if others:
        texts = tuple(_text(values[key]) for key in others)
        merged.conflicts.append(Conflict(path, texts, tuple(givers[key][0] for key in others)))
    return values[chosen]


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
