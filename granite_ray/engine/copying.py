"""Copied strings: which tokens spell a span of a text, as JSON writes it.

A grammar keeps an answer valid for its schema; the masks here take away what is no span of the
source. Nothing is compiled for a source: its text is looked through when a string is opened.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from granite_ray.engine.places import Inside, Place, Standing
from granite_ray.engine.spelling import CopyTokens, SortedText

ESCAPE = re.compile(rb"\\(?:u....|.)", re.DOTALL)
CONTINUATION_BITS, CONTINUATION = 0xC0, 0x80


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

    @property
    def first_mask(self) -> NDArray[np.uint8]:
        """Which tokens can follow the opening quote."""
        return self._openings[0]

    @property
    def entered_parts(self) -> frozenset[bytes]:
        """What of a span can stand in the same token as the opening quote."""
        return self._openings[1]

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

    @cached_property
    def _openings(self) -> tuple[NDArray[np.uint8], frozenset[bytes]]:
        starts = np.flatnonzero(np.frombuffer(self._is_start, np.uint8))
        text = SortedText(self.text, starts)
        return self._tokens.first_mask(text), self._tokens.entered_parts(text)

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
        entries = self._tokens.entries(self._standing)
        if entries:
            known = self._source.entered_parts
            mask &= ~self._tokens.mask(i for i, parts in entries if not known.issuperset(parts))
        if self._standing.inside is not Inside.COPIED:
            return
        if self._reached is None:
            mask &= self._source.first_mask
        else:
            mask &= self._source.mask(self._reached, is_escaped=self._standing.is_escaped)

    def consume(self, token_id: int) -> None:
        """Step over an allowed token."""
        spelled = b""  # of the string that is open
        for byte in self._tokens.token_bytes[token_id]:
            before = self._standing.inside
            self._standing = self._standing.after(byte)
            if self._standing.inside is not Inside.COPIED:
                spelled = b""
            elif before is Inside.COPIED:
                spelled += bytes([byte])
            else:
                self._reached = None
        if not spelled:
            return
        if self._reached is None:
            self._reached = self._source.find(spelled)
        else:
            self._reached = self._source.follow(self._reached, spelled)
