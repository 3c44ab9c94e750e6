"""Copied strings: which tokens spell a span of a text, as JSON writes it.

A grammar keeps an answer valid for its schema; the masks here take away what is no span of the
source. Nothing is compiled for a source: its text is looked through when a string is opened.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from granite_ray.engine.places import BACKSLASH, QUOTE, Inside, Place, Standing

ESCAPE = re.compile(rb"\\(?:u....|.)", re.DOTALL)
CONTINUATION_BITS, CONTINUATION = 0xC0, 0x80
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
        self.clean_entries = lru_cache(MAX_CACHED_STANDINGS)(self._clean_entries)

    def mask_at(self, nodes: Iterable[int], *, is_escaped: bool) -> NDArray[np.uint8]:
        """Return a mask of the tokens that spell what leads to one of the nodes, and no more.

        Those that close the string there are among them, whatever they have after the quote.
        """
        tokens_at = self.tokens_at[is_escaped]
        return self._mask(token_id for node in nodes for token_id in tokens_at.get(node, ()))

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


class CopySource:
    """One text, as it stands in a JSON string, and which tokens spell spans of it."""

    def __init__(self, text: str, tokens: CopyTokens) -> None:
        self._source = text
        self._tokens = tokens

    @cached_property
    def text(self) -> bytes:
        """The text with JSON's escapes, without the quotes around it."""
        written = json.dumps(self._source, ensure_ascii=False)[1:-1]
        # The grammar takes no bare DEL, though JSON allows it.
        return written.replace("\x7f", "\\u007f").encode()

    @cached_property
    def first_mask(self) -> NDArray[np.uint8]:
        """Which tokens can follow the opening quote."""
        starts = np.flatnonzero(np.frombuffer(self._is_start, np.uint8)).tolist()
        nodes = self._reach(starts) - {0}  # what spells nothing would make an empty string
        return self._tokens.mask_at(nodes, is_escaped=False)

    def mask(self, reached: Sequence[int], *, is_escaped: bool) -> NDArray[np.uint8]:
        """Which tokens can follow a span that may end at any of these places of `text`.

        Between the bytes of a character some would close the string: the grammar refuses that.
        """
        return self._tokens.mask_at(self._reach(reached), is_escaped=is_escaped)

    def find(self, spelled: bytes) -> list[int]:
        """Return where a span that begins with these bytes has got to, wherever it may begin."""
        reached = []
        place = self.text.find(spelled)
        while place >= 0:
            if self._is_start[place]:
                reached.append(place + len(spelled))
            place = self.text.find(spelled, place + 1)
        return reached

    def follow(self, reached: Sequence[int], spelled: bytes) -> list[int]:
        """Return where spans have got to after these bytes; those that they do not spell end."""
        return [place + len(spelled) for place in reached if self.text.startswith(spelled, place)]

    @cached_property
    def _is_start(self) -> bytes:
        """For each place in `text`: 1 where a character begins, 0 inside of one."""
        read = np.frombuffer(self.text, np.uint8)
        is_start = (read & CONTINUATION_BITS) != CONTINUATION
        for escape in ESCAPE.finditer(self.text):
            is_start[escape.start() + 1 : escape.end()] = False
        return bytes(is_start)

    def _reach(self, places: Sequence[int]) -> set[int]:
        """Return the nodes that the text leads to from these places, that of no byte included."""
        children, longest = self._tokens.children, self._tokens.longest
        nodes = {0}
        # Places that read the same as far as any token goes are looked at once.
        for ahead in {self.text[place : place + longest] for place in places}:
            node = 0
            for byte in ahead:
                below = children.get(node << 8 | byte)
                if below is None:
                    break
                node = below
                nodes.add(node)
        return nodes


class CopyWalk:
    """Where one answer stands, and which spans of its source the open string may become."""

    def __init__(self, top: Place, source: CopySource, tokens: CopyTokens) -> None:
        self._standing = Standing(top)
        self._source = source
        self._tokens = tokens
        self._reached: list[int] | None = None  # None: nothing of a string is spelled yet

    def restrict(self, mask: NDArray[np.uint8]) -> None:
        """Take away, in place, the tokens that would spell what is no span."""
        mask &= self._tokens.clean_entries(self._standing)
        if self._standing.inside is not Inside.COPIED:
            return
        if self._reached is None:
            mask &= self._source.first_mask
        else:
            mask &= self._source.mask(self._reached, is_escaped=self._standing.is_escaped)

    def consume(self, token_id: int) -> None:
        """Step over an allowed token."""
        spelled = self._tokens.token_bytes[token_id]
        if self._standing.inside is Inside.COPIED:
            length = length_inside(spelled, is_escaped=self._standing.is_escaped)
            self._spell(spelled[:length])
            if length < len(spelled):
                self._reached = None
        for byte in spelled:
            self._standing = self._standing.after(byte)

    def _spell(self, spelled: bytes) -> None:
        if not spelled:
            return
        if self._reached is None:
            self._reached = self._source.find(spelled)
        else:
            self._reached = self._source.follow(self._reached, spelled)


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
