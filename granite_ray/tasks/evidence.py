"""Where in the document a value stands, in code points of the text as it was given.

A value is looked for as it is: in its chunk, then in the whole text. Then in its chunk with case,
width, accents' encoding, white space, quotes and dashes made alike; a map leads back to the text.
"""

import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from granite_ray.records import Chunk, Document
from granite_ray.tasks.merge import MergedRecord
from granite_ray.tasks.shapes import Shape, pointer

ALIKE = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032`", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys("\u00ad\u200b\u2060\ufeff"),  # invisible: they come to nothing
    }
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where one string value stands: `text[start:end]`, or nowhere."""

    path: str
    value: str
    start: int | None
    end: int | None
    chunk_index: int


def find_evidence(merged: MergedRecord, shape: Shape, document: Document) -> list[Evidence]:
    """Locate every string of a record in its document."""
    normalized: dict[int, _NormalizedText] = {}

    def locate(value: str, chunk: Chunk) -> tuple[int, int] | None:
        found = _find_exactly(value, document.text, chunk)
        if found is None and value.strip():
            if chunk.index not in normalized:
                text = document.text[chunk.start : chunk.end]
                normalized[chunk.index] = _NormalizedText(text, chunk.start)
            found = normalized[chunk.index].find(value)
        return found

    evidence = []
    chunks = {chunk.index: chunk for chunk in document.chunks}
    for path, value in _strings(merged.values, shape, ""):
        chunk_index = merged.chunk_index(path)
        start, end = locate(value, chunks[chunk_index]) or (None, None)
        evidence.append(Evidence(path, value, start, end, chunk_index))
    return evidence


def _find_exactly(value: str, text: str, chunk: Chunk) -> tuple[int, int] | None:
    if not value:
        return None
    start = text.find(value, chunk.start, chunk.end)
    if start < 0:
        start = text.find(value)
    return (start, start + len(value)) if start >= 0 else None


class _NormalizedText:
    """A text with all that does not matter made alike, and the way back.

    It is built from clusters (a character and the marks that combine with it). A match must cover
    whole clusters: `e` is not found in an `é`.
    """

    def __init__(self, text: str, offset: int) -> None:
        parts: list[str] = []
        self._starts: list[int] = []  # of each cluster, in the normalized text …
        self._spans: list[tuple[int, int]] = []  # … and where it stands in the text
        length = 0
        for start, end in _clusters(text):
            part = _normalize(text[start:end])
            if not part or (part == " " and parts and parts[-1] == " "):
                continue
            parts.append(part)
            self._starts.append(length)
            self._spans.append((offset + start, offset + end))
            length += len(part)
        self._starts.append(length)
        self._text = "".join(parts)

    def find(self, value: str) -> tuple[int, int] | None:
        """Return the first span whose normalized text is that of `value`."""
        wanted = " ".join(_NormalizedText(value, 0)._text.split())
        at = self._text.find(wanted) if wanted else -1
        while at >= 0:
            first = bisect_left(self._starts, at)
            after = bisect_left(self._starts, at + len(wanted))
            if self._starts[first] == at and self._starts[after] == at + len(wanted):
                return self._spans[first][0], self._spans[after - 1][1]
            at = self._text.find(wanted, at + 1)
        return None


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for index in range(1, len(text)):
        # Nothing combines below U+0300: most characters need no look-up.
        if text[index] < "\u0300" or not unicodedata.combining(text[index]):
            yield start, index
            start = index
    if text:
        yield start, len(text)


@lru_cache(4096)  # texts use few different clusters, each many times
def _normalize(cluster: str) -> str:
    # Decomposed, not composed: a composition can reach over clusters (Korean syllables), a
    # decomposition cannot. Case folding can leave characters that decompose further.
    folded = unicodedata.normalize("NFKD", cluster).casefold()
    alike = unicodedata.normalize("NFKD", folded).translate(ALIKE)
    return " " if alike.isspace() else alike


def _strings(value: Any, shape: Shape, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and value of every string; what became JSON text is not looked into."""
    if value is None:
        return
    if shape.kind == "object":
        for name, below in shape.properties.items():
            yield from _strings(value.get(name), below, pointer(path, name))
    elif shape.items is not None:
        for index, item in enumerate(value):
            yield from _strings(item, shape.items, f"{path}/{index}")
    elif shape.kind == "string":
        yield path, value
