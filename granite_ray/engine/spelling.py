"""A vocabulary as bytes: which of its tokens spell what stands in a JSON string.

Made once for a vocabulary; what differs from text to text is in `copying`.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from granite_ray.engine.places import BACKSLASH, QUOTE, Inside, Standing

WINDOW = 8
"""Bytes of a text that are compared at once, as one number."""
MAX_CACHED_STANDINGS = 512
"""A mask of 100,000 tokens takes 12 KB."""


class CopyTokens:
    """The tokens of one vocabulary as a trie of bytes.

    Args:
        token_bytes: By token id; empty for control tokens and padding, which spell nothing.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.token_bytes = token_bytes
        self.longest = max(map(len, token_bytes), default=0)
        self.children: dict[int, int] = {}
        """A node's number times 256 plus a byte → the node that the byte leads to."""
        self.tokens_at: tuple[dict[int, list[int]], dict[int, list[int]]] = {}, {}
        """Node → the tokens of which it is all that they spell of an open string; the second where
        a backslash stands before them."""
        for token_id, spelled in enumerate(token_bytes):
            if spelled:
                self._insert(token_id, spelled)
        self._beyond_quotes = {count: self._going_on_after(count) for count in (1, 2)}
        self._starts = _Lookup([spelled[: length_inside(spelled)] for spelled in token_bytes])
        parts = {part for i in self._beyond_quotes[1] for part in self._parts(i)}
        self._entered = _Lookup(list(parts))
        self.entries = lru_cache(MAX_CACHED_STANDINGS)(self._entries)

    def mask_at(self, nodes: Iterable[int], *, is_escaped: bool) -> NDArray[np.uint8]:
        """Return a mask of the tokens that spell what leads to one of the nodes, and no more.

        Those that close the string there are among them, whatever they have after the quote.
        """
        tokens_at = self.tokens_at[is_escaped]
        return self.mask(token_id for node in nodes for token_id in tokens_at.get(node, ()))

    def mask(self, token_ids: Iterable[int]) -> NDArray[np.uint8]:
        """Return a mask of these tokens, as `GrammarCompiler.compute_masks` has them."""
        is_allowed = np.zeros(-(-len(self.token_bytes) // 32) * 32, np.bool_)
        is_allowed[list(token_ids)] = True
        return np.packbits(is_allowed, bitorder="little")

    def first_mask(self, text: "SortedText") -> NDArray[np.uint8]:
        """Return a mask of the tokens with which a span of `text` can begin, at least a byte."""
        return self.mask(self._starts.find(text))

    def entered_parts(self, text: "SortedText") -> frozenset[bytes]:
        """Return with what a span of `text` can begin in the token that opens its string."""
        return frozenset(self._entered.spelled[index] for index in self._entered.find(text))

    def _entries(self, standing: Standing) -> list[tuple[int, list[bytes]]]:
        """Return the tokens that open copied strings, and what they spell of each.

        That of a string which ends the token with its opening quote is left out.
        """
        # Inside of a string one quote closes it, before another opens the next.
        beyond = self._beyond_quotes[1 if standing.inside is Inside.NOTHING else 2]
        found = [(token_id, entered(standing, self.token_bytes[token_id])) for token_id in beyond]
        return [(token_id, parts) for token_id, parts in found if parts]

    def _going_on_after(self, num_quotes: int) -> list[int]:
        """Return the tokens that have a byte after so many quotes."""
        return [
            token_id
            for token_id, spelled in enumerate(self.token_bytes)
            if any(spelled.split(b'"', num_quotes)[num_quotes:])
        ]

    def _parts(self, token_id: int) -> Iterator[bytes]:
        """Yield what a token can spell of strings that it opens."""
        pieces = self.token_bytes[token_id].split(b'"')
        for number in range(1, len(pieces)):
            part = b'"'.join(pieces[number:])
            yield part[: length_inside(part)]

    def _insert(self, token_id: int, spelled: bytes) -> None:
        path = [0]
        for byte in spelled:
            path.append(self.children.setdefault(path[-1] << 8 | byte, len(self.children) + 1))
        for is_escaped, tokens_at in enumerate(self.tokens_at):
            node = path[length_inside(spelled, is_escaped=bool(is_escaped))]
            tokens_at.setdefault(node, []).append(token_id)


class SortedText:
    """A text in which it can be looked up whether something stands at certain places.

    Args:
        text: Bytes without a NUL.
        places: Where in it.
    """

    def __init__(self, text: bytes, places: NDArray[np.int64]) -> None:
        padded = np.frombuffer(text + bytes(WINDOW - 1), np.uint8)
        read = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[places]
        windows = read.view(">u8")[:, 0].astype(np.uint64)  # in which the first byte weighs most
        order = windows.argsort()
        self.text = text
        self.windows = windows[order]
        self.places = places[order]


class _Lookup:
    """Byte strings, in order, to be looked up in texts."""

    def __init__(self, spelled: Sequence[bytes]) -> None:
        self.spelled = spelled
        # Nothing that holds a NUL is found: in windows it stands for the end of the text.
        order = [i for i, one in enumerate(spelled) if one and 0 not in one]
        order.sort(key=spelled.__getitem__)
        self._order = order
        heads = b"".join(spelled[i][:WINDOW].ljust(WINDOW, b"\0") for i in order)
        self._heads = np.frombuffer(heads, ">u8").astype(np.uint64)
        sizes = np.array([min(len(spelled[i]), WINDOW) for i in order], np.uint64)
        self._unused_bits = 8 * (WINDOW - sizes)

    def find(self, text: SortedText) -> Iterator[int]:
        """Yield the indexes of those that stand at a place of the text; empty ones do nowhere."""
        firsts = np.searchsorted(text.windows, self._heads)
        # The first window that is not less than a head begins with it, if any does.
        nearest = text.windows.take(firsts, mode="clip")
        is_found = (nearest >> self._unused_bits) == (self._heads >> self._unused_bits)
        for row in np.flatnonzero(is_found).tolist():
            spelled = self.spelled[self._order[row]]
            if len(spelled) > WINDOW:
                last = np.searchsorted(text.windows, self._heads[row], side="right")
                places = text.places[firsts[row] : last].tolist()
                if not any(text.text.startswith(spelled, place) for place in places):
                    continue
            yield self._order[row]


def length_inside(spelled: bytes, *, is_escaped: bool = False) -> int:
    """Return how many bytes come before the quote that closes the open string."""
    for place, byte in enumerate(spelled):
        if is_escaped:
            is_escaped = False
        elif byte == QUOTE:
            return place
        elif byte == BACKSLASH:
            is_escaped = True
    return len(spelled)


def entered(standing: Standing, spelled: bytes) -> list[bytes]:
    """Return what a token spells of copied strings that it opens, one that is left empty included.

    A string that the token ends with is no such one: what it holds will be seen.
    """
    parts: list[bytes] = []
    was_open = standing.inside is Inside.COPIED
    for place, byte in enumerate(spelled):
        try:
            standing = standing.after(byte)
        except (IndexError, ValueError):  # no JSON: the grammar refuses it in any case
            return []
        is_open = standing.inside is Inside.COPIED
        rest = spelled[place + 1 :]
        if is_open and not was_open and rest:
            parts.append(rest[: length_inside(rest)])
        was_open = is_open
    return parts
