"""A document's text → chunks of at most so many tokens, cut where the text itself pauses.

Decides where to cut and knows nothing of tokenizers: it is given a function that encodes.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

from granite_ray.records import Chunk

Boundary = Literal["heading", "paragraph", "sentence", "token"]

MIN_CHUNK_TOKENS = 4
"""One code point has up to 4 bytes, and each may be a token of its own."""

# Each pattern is bounded or greedy without anything after its repetition, so that no text, not even
# a megabyte of dots, is scanned twice. Escapes stand for signs that look like others: full stops
# and question marks of Arabic, Urdu, Hindi, Chinese and Japanese, and closing quotes.
HEADING = re.compile(r"^(?=#{1,6}[ \t]|<h[1-6][ >])", re.MULTILINE | re.IGNORECASE)
PARAGRAPH = re.compile(r"(?:\n[ \t\r]*){2,}")
SENTENCE = re.compile(
    "(?<=[.!?\u2026\u061f\u06d4\u0964])[\"'\u201d\u2019\u00bb)\\]]{0,3}\\s+"
    "|(?<=[\u3002\uff01\uff1f\uff61])[\u300d\u300f\u201d\u2019\uff09]{0,3}\\s*"
)
LINE = re.compile(r"\n")
WORD = re.compile(r"(?<=\S)(?=\s)")  # before the space, which most tokenizers join to the next word

PATTERNS: dict[Boundary, tuple[re.Pattern[str], ...]] = {
    "heading": (HEADING,),
    "paragraph": (PARAGRAPH,),
    "sentence": (SENTENCE, LINE),
    "token": (WORD,),
}
"""From the coarsest boundary to the finest."""

WORD_START = re.compile(r"(?<=\s)(?=\S)")
LOOK_AHEAD = 8
"""Characters that a pattern may look at beyond the place of the cut."""

FIRST_CHARS_PER_TOKEN = 5
"""Prose has about 4; the ratio of each chunk is the guess for the next one."""


class Encoding(Protocol):
    """Token ids of a text, and where in it each token starts and ends, in code points."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def offsets(self) -> list[tuple[int, int]]: ...


def chunk_text(
    text: str,
    encode: Callable[[str], Encoding],
    *,
    max_tokens: int,
    overlap_tokens: int = 0,
    boundary: Boundary = "paragraph",
) -> Iterator[Chunk]:
    """Cut a text into chunks that together cover every character of it, lazily.

    A chunk's token ids are those of its own text alone, never more than `max_tokens`. It ends at
    the last `boundary` in the latter half of what fits, else at the next finer one. It begins where
    the one before ended, or up to `overlap_tokens` earlier.

    Args:
        text: What is cut.
        encode: Encodes any piece of the text; `offsets` is asked for only where something is cut.
        max_tokens: At least `MIN_CHUNK_TOKENS`.
        overlap_tokens: Tokens that a chunk repeats of the one before, at most.
        boundary: Where to cut for preference.
    """
    assert max_tokens >= MIN_CHUNK_TOKENS, max_tokens
    cutter = _Cutter(text, encode, max_tokens, boundary)
    start = reached = index = 0
    while reached < len(text):
        cut = cutter.cut(start, reached)
        if cut is None:  # nothing new fits behind the overlap
            start = reached
            cut = cutter.cut(start, reached)
        assert cut is not None, "a code point took more tokens than MIN_CHUNK_TOKENS"
        end, encoding = cut
        yield Chunk(index, start, end, encoding.ids)
        index += 1
        reached = end
        start = cutter.overlap_start(start, end, encoding, overlap_tokens)


class _Cutter:
    """Finds the ends and the starts of one text's chunks.

    It encodes a window a little longer than a chunk, cuts there, and encodes what it cut: alone, a
    piece can have other tokens than inside its text. So each character is encoded two or three
    times, however long the text is.
    """

    def __init__(
        self, text: str, encode: Callable[[str], Encoding], max_tokens: int, boundary: Boundary
    ) -> None:
        self._text = text
        self._encode = encode
        self._max_tokens = max_tokens
        levels = list(PATTERNS)
        finer = levels[levels.index(boundary) :]
        self._patterns = [pattern for level in finer for pattern in PATTERNS[level]]
        self._window_chars = max_tokens * FIRST_CHARS_PER_TOKEN

    def cut(self, start: int, reached: int) -> tuple[int, Encoding] | None:
        """Return where the chunk from `start` ends, beyond `reached`, and its tokens."""
        text = self._text
        end = min(start + self._window_chars, len(text))
        is_chosen = False
        while True:
            encoding = self._encode(text[start:end])
            num_tokens = len(encoding.ids)
            if num_tokens > self._max_tokens:
                limit = start + encoding.offsets[self._max_tokens][0]
                if limit <= reached:
                    return None
                end = self._choose_end(reached, limit)
                is_chosen = True
            elif is_chosen or end == len(text):
                # A tenth more than was needed now, so that the next window is seldom too short.
                self._window_chars = 1 + (end - start) * self._max_tokens * 11 // (num_tokens * 10)
                return end, encoding
            else:
                end = min(start + 2 * (end - start), len(text))

    def overlap_start(self, start: int, end: int, encoding: Encoding, overlap_tokens: int) -> int:
        """Return where the chunk after `text[start:end]` begins."""
        if overlap_tokens == 0 or len(encoding.ids) <= overlap_tokens:
            return end
        begin = start + encoding.offsets[-overlap_tokens][0]
        while begin < end:
            word = WORD_START.search(self._text, begin, begin + (end - begin) // 2)
            begin = word.start() if word else begin
            own = self._encode(self._text[begin:end])
            num_over = len(own.ids) - overlap_tokens
            if num_over <= 0:
                return begin
            begin += max(1, own.offsets[num_over][0])
        return end

    def _choose_end(self, reached: int, limit: int) -> int:
        floor = limit - (limit - reached) // 2
        for pattern in self._patterns:
            end = _last_boundary(pattern, self._text, floor, limit)
            if end is not None:
                return end
        return _whole_character_end(self._text, floor, limit)


def _last_boundary(pattern: re.Pattern[str], text: str, floor: int, limit: int) -> int | None:
    """Return the last place in `floor..limit` where `pattern` ends, cut off at `limit`."""
    last = None
    for match in pattern.finditer(text, floor, limit + LOOK_AHEAD):
        if match.start() >= limit and match.end() > limit:
            break
        last = match.end()
    return None if last is None else min(last, limit)


def _whole_character_end(text: str, floor: int, limit: int) -> int:
    """Return the last place in `floor..limit` that divides no accented letter or joined emoji."""
    for end in range(limit, floor - 1, -1):
        if not _joins(text[end - 1], text[end]):
            return end
    return limit


def _joins(before: str, after: str) -> bool:
    is_mark = unicodedata.category(after) in ("Mn", "Mc", "Me")  # accents, variation selectors
    is_skin_tone = "\U0001f3fb" <= after <= "\U0001f3ff"
    return is_mark or is_skin_tone or "\u200d" in (before, after) or before + after == "\r\n"
