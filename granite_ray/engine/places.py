"""Where in a JSON answer a byte stands: inside a string that is copied, or elsewhere.

The answer is compact JSON that its grammar keeps valid, so only quotes, brackets, commas and colons
need to be looked at.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from granite_ray.records import COPY_KEYWORD

QUOTE, BACKSLASH, COMMA, COLON = b'"\\,:'
OPENING, CLOSING = b"{[", b"}]"


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A place of a record from which copied strings can be reached, or one of them."""

    is_copied: bool = False
    properties: Mapping[str, "Place"] = field(default_factory=dict)
    items: "Place | None" = None


def copied_places(node: Any) -> Place | None:
    """Return the place of a schema's top; None where nothing below it is copied."""
    if not isinstance(node, dict):
        return None
    if node.get(COPY_KEYWORD):
        return Place(is_copied=True)
    for keyword in ("anyOf", "oneOf"):  # of alternatives, one is copied and the others are null
        for below in node.get(keyword, ()):
            place = copied_places(below)
            if place is not None:
                return place
    found = {name: copied_places(below) for name, below in node.get("properties", {}).items()}
    properties = {name: place for name, place in found.items() if place is not None}
    items = copied_places(node.get("items"))
    return Place(properties=properties, items=items) if properties or items else None


class Inside(Enum):
    """What string a byte stands in, if any."""

    NOTHING = "nothing"
    KEY = "key"
    COPIED = "copied"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an answer stands after some of its bytes.

    `place` is that of the value that is being written or comes next, None where nothing below it
    is copied. `above` are the objects and arrays around it: their places, and whether each is an
    object. `key` is of interest only where a copied string can be below it.
    """

    place: Place | None
    above: tuple[tuple[Place | None, bool], ...] = ()
    inside: Inside = Inside.NOTHING
    is_escaped: bool = False
    expects_key: bool = False
    key: bytes = b""

    def after(self, byte: int) -> "Standing":
        """Return where the answer stands after one more byte."""
        if self.inside is not Inside.NOTHING:
            return self._after_in_string(byte)
        if byte == QUOTE:
            return replace(self, inside=self._opened(), key=b"")
        if byte in OPENING:
            is_object = byte == OPENING[0]
            above = (*self.above, (self.place, is_object))
            return _at_next(replace(self, above=above))
        if byte in CLOSING:
            return replace(self, place=None, above=self.above[:-1], expects_key=False)
        if byte == COMMA:
            return _at_next(self)
        if byte == COLON:
            around, _ = self.above[-1]
            name = json.loads(b'"%s"' % self.key)
            place = around.properties.get(name) if around else None
            return replace(self, place=place, expects_key=False, key=b"")
        return self

    def _after_in_string(self, byte: int) -> "Standing":
        if byte == QUOTE and not self.is_escaped:
            return replace(self, inside=Inside.NOTHING)
        is_escaped = byte == BACKSLASH and not self.is_escaped
        if self.inside is Inside.KEY and self.above[-1][0]:
            return replace(self, is_escaped=is_escaped, key=self.key + bytes([byte]))
        return self if is_escaped == self.is_escaped else replace(self, is_escaped=is_escaped)

    def _opened(self) -> Inside:
        if self.expects_key:
            return Inside.KEY
        return Inside.COPIED if self.place and self.place.is_copied else Inside.OTHER


def _at_next(standing: Standing) -> Standing:
    """Return where an answer stands before the next key or item of what is around it."""
    around, is_object = standing.above[-1]
    if is_object:
        return replace(standing, place=None, expects_key=True)
    return replace(standing, place=around.items if around else None, expects_key=False)
