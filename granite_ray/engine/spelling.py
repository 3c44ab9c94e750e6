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
        self._openings = _Openings(token_bytes)
        self._beyond_quotes = {count: self._going_on_after(count) for count in (1, 2)}
        self.clean_entries = lru_cache(MAX_CACHED_STANDINGS)(self._clean_entries)

    def mask_at(self, nodes: Iterable[int], *, is_escaped: bool) -> NDArray[np.uint8]:
        """Return a mask of the tokens that spell what leads to one of the nodes, and no more.

        Those that close the string there are among them, whatever they have after the quote.
        """
        tokens_at = self.tokens_at[is_escaped]
        return self._mask(token_id for node in nodes for token_id in tokens_at.get(node, ()))

    def first_mask(
        self, text: bytes, windows: NDArray[np.uint64], places: NDArray[np.int64]
    ) -> NDArray[np.uint8]:
        """Return a mask of the tokens with which a span of `text` can begin, at least a byte of it.

        Args:
            text: As it stands in a JSON string.
            windows: The `WINDOW` bytes from each place on where a span can begin, in order; the
                first byte weighs most, and what lies beyond the text is 0.
            places: Those places, in the same order.
        """
        return self._mask(self._openings.find(text, windows, places))

    def _mask(self, token_ids: Iterable[int]) -> NDArray[np.uint8]:
        """Return a mask of these tokens, as `GrammarCompiler.compute_masks` has them."""
        is_allowed = np.zeros(-(-len(self.token_bytes) // 32) * 32, np.bool_)
        is_allowed[list(token_ids)] = True
        return np.packbits(is_allowed, bitorder="little")

    def _clean_entries(self, standing: Standing) -> NDArray[np.uint8]:
        """Return a mask of all tokens but those that open a copied string and go on inside of it.

        A copied string is entered by a token that ends with its quote. So what is spelled of the
        source begins where a token begins.
        """
        # Inside of a string one quote closes it, before another opens the next.
        num_quotes = 1 if standing.inside is Inside.NOTHING else 2
        refused = self._mask(
            token_id
            for token_id in self._beyond_quotes[num_quotes]
            if _enters_and_goes_on(standing, self.token_bytes[token_id])
        )
        return ~refused

    def _going_on_after(self, num_quotes: int) -> list[int]:
        """Return the tokens that have a byte after so many quotes."""
        return [
            token_id
            for token_id, spelled in enumerate(self.token_bytes)
            if any(spelled.split(b'"', num_quotes)[num_quotes:])
        ]

    def _insert(self, token_id: int, spelled: bytes) -> None:
        path = [0]
        for byte in spelled:
            path.append(self.children.setdefault(path[-1] << 8 | byte, len(self.children) + 1))
        for is_escaped, tokens_at in enumerate(self.tokens_at):
            node = path[length_inside(spelled, is_escaped=bool(is_escaped))]
            tokens_at.setdefault(node, []).append(token_id)


class _Openings:
    """What each token spells of a string that has just been opened, in order, to be looked up."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        inside = [spelled[: length_inside(spelled, is_escaped=False)] for spelled in token_bytes]
        # No JSON string holds a NUL; in windows it stands for the end of the text.
        token_ids = [i for i, spelled in enumerate(inside) if spelled and 0 not in spelled]
        token_ids.sort(key=inside.__getitem__)
        self._token_ids = token_ids
        heads = b"".join(inside[i][:WINDOW].ljust(WINDOW, b"\0") for i in token_ids)
        self._heads = np.frombuffer(heads, ">u8").astype(np.uint64)
        sizes = np.array([min(len(inside[i]), WINDOW) for i in token_ids], np.uint64)
        self._unused_bits = 8 * (WINDOW - sizes)
        self._inside = [inside[i] for i in token_ids]

    def find(
        self, text: bytes, windows: NDArray[np.uint64], places: NDArray[np.int64]
    ) -> Iterator[int]:
        """Yield the tokens of a first mask; see there."""
        firsts = np.searchsorted(windows, self._heads)
        # The first window that is not less than a head begins with it, if any does.
        nearest = windows.take(firsts, mode="clip")
        is_found = (nearest >> self._unused_bits) == (self._heads >> self._unused_bits)
        for index in np.flatnonzero(is_found).tolist():
            spelled, first = self._inside[index], firsts[index]
            if len(spelled) <= WINDOW:
                yield self._token_ids[index]
                continue
            stop = np.searchsorted(windows, self._heads[index], side="right")
            if any(text.startswith(spelled, at) for at in places[first:stop].tolist()):
                yield self._token_ids[index]


def length_inside(spelled: bytes, *, is_escaped: bool) -> int:
    """Return how many bytes of a token come before the quote that closes the open string."""
    for place, byte in enumerate(spelled):
        if is_escaped:
            is_escaped = False
        elif byte == QUOTE:
            return place
        elif byte == BACKSLASH:
            is_escaped = True
    return len(spelled)


def _enters_and_goes_on(standing: Standing, spelled: bytes) -> bool:
    for byte in spelled[:-1]:
        before = standing.inside
        try:
            standing = standing.after(byte)
        except (IndexError, ValueError):  # no JSON: the grammar refuses it in any case
            return False
        if standing.inside is Inside.COPIED and before is not Inside.COPIED:
            return True
    return False
