"""Strings that are copied from the text: `"x-copy": true` in a user's schema.

A copied string may always be null, because a text need not hold what is asked for. As the item of a
list it may not, because the list may be empty.
"""

from typing import Any

from granite_ray.records import COPY_KEYWORD
from granite_ray.tasks.keywords import (
    MANY_SCHEMAS,
    ONE_SCHEMA,
    SHOWN_NOTES,
    Definition,
    escaped,
    refusal,
)

BESIDE_COPY = SHOWN_NOTES | {COPY_KEYWORD, "type", "minLength", "maxLength"}
ON_THE_WAY = {
    "object": SHOWN_NOTES | {"type", "properties", "required", "additionalProperties"},
    "array": SHOWN_NOTES | {"type", "items", "minItems", "maxItems", "uniqueItems"},
}
"""What objects and lists may have that hold copied strings."""

ALLOWED_WAY = "Let only properties, items and an alternative to null lead to it."


def settle_copies(definition: Definition) -> Definition:
    """Return a checked definition in which each `x-copy` stands on a string, nullable or an item.

    Raises:
        ConfigError: Naming the place as a JSON Pointer: nothing can be copied there, or a keyword
            would not hold for what is copied.
    """
    return _settle(definition, "", is_item=False) if has_copies(definition) else definition


def has_copies(node: Any) -> bool:
    """Tell whether a definition asks for a copied string, at any depth."""
    if isinstance(node, list):
        return any(map(has_copies, node))
    if not isinstance(node, dict):
        return False
    below = [node[key] for key in node.keys() & (ONE_SCHEMA | MANY_SCHEMAS)]
    return COPY_KEYWORD in node or has_copies([*below, *node.get("properties", {}).values()])


def _settle(node: Definition, place: str, *, is_item: bool) -> Definition:
    for keyword in ("anyOf", "oneOf"):
        if keyword in node:
            return _settle_alternatives(node, keyword, place, is_item=is_item)
    kind = _kind(node)
    if COPY_KEYWORD in node:
        return _settle_string(node, kind, place, is_item=is_item)
    if kind not in ON_THE_WAY or node.get("additionalProperties", False) is not False:
        raise refusal(place, f"a part of it has {COPY_KEYWORD!r}, but it is no record", ALLOWED_WAY)
    _check_keywords(node, ON_THE_WAY[kind], "around", place)
    if kind == "array":
        return {**node, "items": _settle(node["items"], f"{place}/items", is_item=True)}
    properties = {
        name: _settle(below, f"{place}/properties/{escaped(name)}", is_item=False)
        if has_copies(below)
        else below
        for name, below in node["properties"].items()
    }
    return {**node, "properties": properties}


def _settle_string(node: Definition, kind: str, place: str, *, is_item: bool) -> Definition:
    if kind != "string":
        raise refusal(place, f"{COPY_KEYWORD!r} needs type string", "Move it to the strings.")
    _check_keywords(node, BESIDE_COPY, "beside", place)
    if node.get("minLength", 0) > 1 or node.get("maxLength", 1) < 1:
        # The end of a text can be too short to go on, once a span has begun there.
        problem = f"beside {COPY_KEYWORD!r}, minLength is at most 1 and maxLength at least 1"
        raise refusal(place, problem, "Check the length of the result.")
    return {**node, "type": "string" if is_item else ["string", "null"]}


def _settle_alternatives(
    node: Definition, keyword: str, place: str, *, is_item: bool
) -> Definition:
    """Settle the one alternative that is not null."""
    notes = {key: value for key, value in node.items() if key != keyword}
    is_copied = notes.pop(COPY_KEYWORD, False)
    _check_keywords(notes, SHOWN_NOTES, "around", place)
    nulls = [below for below in node[keyword] if _kind(below) == "null"]
    others = [(i, below) for i, below in enumerate(node[keyword]) if _kind(below) != "null"]
    if len(others) != 1:
        raise refusal(place, f"{COPY_KEYWORD!r} stands in several alternatives", ALLOWED_WAY)
    [(index, below)] = others
    if is_copied:
        below = {**below, COPY_KEYWORD: True}
    settled = _settle(below, f"{place}/{keyword}/{index}", is_item=is_item)
    if COPY_KEYWORD in settled:
        return {**settled, **notes}
    return {**notes, "anyOf": [settled, *nulls]}


def _kind(node: Any) -> str:
    """Return what type a place has besides null; nothing where that is not one."""
    types = node.get("type", ()) if isinstance(node, dict) else ()
    names = {types} if isinstance(types, str) else set(types)
    names = names - {"null"} or names
    return names.pop() if len(names) == 1 else ""


def _check_keywords(node: Definition, allowed: frozenset[str], where: str, place: str) -> None:
    for key in node:
        if key not in allowed:
            problem = f"the keyword {key!r} cannot stand {where} {COPY_KEYWORD!r}"
            raise refusal(place, problem, "Remove one of them.")
