"""A user's JSON Schema, checked before anything starts, as a definition without references.

What the grammar library would not enforce is refused by name, or checked when the answer is there
(`uniqueItems`). Objects are closed: a record has the declared properties and no others.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from llguidance import LLMatcher

from granite_ray.errors import ConfigError
from granite_ray.records import COPY_KEYWORD, Grammar
from granite_ray.tasks.copies import settle_copies
from granite_ray.tasks.keywords import (
    ADVICE,
    CONSTRAINTS,
    DROPPED_NOTES,
    MANY_SCHEMAS,
    ONE_SCHEMA,
    SHOWN_NOTES,
    Definition,
    escaped,
    refusal,
)

MAX_BYTES = 200_000
MAX_DEPTH = 16
MAX_NODES = 2_000
"""Counted after references are filled in, so that they cannot multiply without limit."""


def check_schema(schema: Mapping[str, Any]) -> Definition:
    """Return the definition of a record: references filled in, objects closed, notes dropped.

    Strings marked `x-copy` are nullable in it, or items of a list.

    Raises:
        ConfigError: Naming the place as a JSON Pointer and the way out.
    """
    _check_size(schema)
    _check_form(schema)
    definition = _Walk(schema).resolve(schema, "", 0, frozenset())
    if not isinstance(definition, dict) or definition.get("type") != "object":
        raise ConfigError('task.schema must be an object at its top: {"type": "object", …}.')
    if not definition.get("properties") or definition["additionalProperties"] is not False:
        raise ConfigError(
            "task.schema must list the record's properties at its top, and additionalProperties "
            "must be false or absent: each property is a field of the output."
        )
    _check_form(definition)  # again: a $ref may have led to what is no schema
    return settle_copies(definition)


def compile_grammar(definition: Definition) -> Grammar:
    """Return the definition as a grammar that the grammar library accepts and enforces."""
    text = json.dumps(without_keyword(definition, "uniqueItems"), ensure_ascii=False)
    is_refused, messages = LLMatcher.validate_grammar_with_warnings(
        LLMatcher.grammar_from_json_schema(text)
    )
    if is_refused or messages:
        raise ConfigError(
            f"task.schema cannot be compiled into a grammar: {' '.join(messages)}. "
            "Simplify that part of the schema."
        )
    return Grammar(text)


def without_keyword(node: Any, keyword: str) -> Any:
    """Return a definition without one keyword, at any depth."""
    if isinstance(node, list):
        return [without_keyword(below, keyword) for below in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key != keyword}
    for key in kept.keys() & (ONE_SCHEMA | MANY_SCHEMAS):
        kept[key] = without_keyword(kept[key], keyword)
    if "properties" in kept:
        below = kept["properties"].items()
        kept["properties"] = {name: without_keyword(schema, keyword) for name, schema in below}
    return kept


def _check_size(schema: Mapping[str, Any]) -> None:
    try:
        num_bytes = len(json.dumps(schema))
    except (RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"task.schema is not plain JSON data: {error}.") from error
    if num_bytes > MAX_BYTES:
        raise ConfigError(f"task.schema has {num_bytes:,} bytes; at most {MAX_BYTES:,}.")


def _check_form(schema: Mapping[str, Any]) -> None:
    try:
        # No formats: patterns are read by the grammar library, not by Python.
        jsonschema.Draft202012Validator.check_schema(schema, jsonschema.FormatChecker(()))
    except RecursionError as error:
        raise ConfigError(f"task.schema is nested deeper than {MAX_DEPTH} levels.") from error
    except jsonschema.SchemaError as error:
        place = "/".join(map(str, error.absolute_path))
        raise ConfigError(f"task.schema at /{place} is not valid: {error.message}.") from error


@dataclass(slots=True)
class _Walk:
    """One pass over a user's schema."""

    root: Mapping[str, Any]
    num_nodes: int = field(default=0)

    def resolve(
        self, node: Any, place: str, depth: int, refs: frozenset[str], *, is_open: bool = False
    ) -> Any:
        """Return `node` with its references filled in; `refs` are those being followed.

        A part of an `allOf` stays open: what one part closes, no other part could add to.
        """
        if isinstance(node, bool):
            return {} if node else False
        if not isinstance(node, Mapping):
            raise refusal(place, f"{node!r} is not a schema", "Write an object.")
        self._count(place, depth)
        if "$ref" in node:
            return self._follow(node, place, depth, refs, is_open=is_open)
        resolved = {
            key: self._resolve_keyword(key, value, f"{place}/{key}", depth, refs)
            for key, value in node.items()
            if key not in DROPPED_NOTES
        }
        if "properties" in resolved and not is_open:
            resolved.setdefault("additionalProperties", False)
        return resolved

    def _resolve_keyword(
        self, key: str, value: Any, place: str, depth: int, refs: frozenset[str]
    ) -> Any:
        if key in CONSTRAINTS or key in SHOWN_NOTES:
            return value
        if key == COPY_KEYWORD:
            if value is not True:
                raise refusal(place, f"it is {value!r}", "Write true, or leave it out.")
            return value
        if key in ONE_SCHEMA:
            if isinstance(value, bool):
                return value
            return self.resolve(value, place, depth + 1, refs)
        if key in MANY_SCHEMAS:
            return [
                self.resolve(below, f"{place}/{index}", depth + 1, refs, is_open=key == "allOf")
                for index, below in enumerate(value)
            ]
        if key == "properties":
            return {
                name: self.resolve(below, f"{place}/{escaped(name)}", depth + 1, refs)
                for name, below in value.items()
            }
        raise refusal(place, f"the keyword {key!r} is not supported", ADVICE.get(key, ""))

    def _follow(
        self,
        node: Mapping[str, Any],
        place: str,
        depth: int,
        refs: frozenset[str],
        *,
        is_open: bool,
    ) -> Any:
        ref = node["$ref"]
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise refusal(place, f"$ref {ref!r} is not local", "Copy what it means into $defs.")
        if ref in refs:
            raise refusal(place, f"$ref {ref!r} is recursive", "Write out the levels you need.")
        if len(refs) >= MAX_DEPTH:
            raise refusal(place, f"more than {MAX_DEPTH} $ref follow each other", "Shorten them.")
        found = self._lookup(ref, place)
        refs |= {ref}
        beside = {key: value for key, value in node.items() if key != "$ref"}
        if beside.keys() - SHOWN_NOTES - DROPPED_NOTES:
            target = self.resolve(found, place, depth, refs, is_open=True)
            return {"allOf": [target, self.resolve(beside, place, depth, refs, is_open=True)]}
        target = self.resolve(found, place, depth, refs, is_open=is_open)
        notes = {key: value for key, value in beside.items() if key in SHOWN_NOTES}
        return {**target, **notes} if isinstance(target, dict) else target

    def _lookup(self, ref: str, place: str) -> Any:
        found: Any = self.root
        for step in ref.split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or name not in found:
                raise refusal(place, f"$ref {ref!r} leads nowhere", "Add it to $defs.")
            found = found[name]
        return found

    def _count(self, place: str, depth: int) -> None:
        self.num_nodes += 1
        if depth > MAX_DEPTH:
            raise refusal(place, f"it is nested deeper than {MAX_DEPTH} levels", "Flatten it.")
        if self.num_nodes > MAX_NODES:
            raise refusal(place, f"it has more than {MAX_NODES:,} parts", "Make it smaller.")
