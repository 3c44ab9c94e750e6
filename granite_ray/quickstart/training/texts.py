"""Pieces of texts, as chunking makes them of documents."""

import random

from granite_ray.tokenizer import Tokenizer

MAX_DESCRIPTION_TOKENS = 256
MAX_CHANGELOG_TOKENS = 512
MIN_PIECE_TOKENS = 64


def crop(text: list[int], lot: random.Random) -> list[int]:
    """Return a description's tokens, or a run of them, often from the beginning."""
    longest = MAX_DESCRIPTION_TOKENS
    if len(text) <= MIN_PIECE_TOKENS or (len(text) <= longest and lot.random() < 0.9):
        return text
    size = lot.randint(MIN_PIECE_TOKENS, min(len(text), longest))
    start = 0 if lot.random() < 0.6 else lot.randrange(len(text) - size + 1)
    return text[start : start + size]


def tear(text: str, lot: random.Random) -> str:
    """Return a run of a text's lines, often from its beginning."""
    lines = text.split("\n")
    start = 0 if lot.random() < 0.6 else lot.randrange(len(lines))
    stop = len(lines) if lot.random() < 0.5 else lot.randint(start + 1, len(lines))
    return "\n".join(lines[start:stop]).strip("\n") or text


def shorten(text: str, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Return as many whole lines as a chunk of a changelog holds, and their tokens."""
    token_ids = tokenizer.encode_text(text)
    if len(token_ids) > MAX_CHANGELOG_TOKENS:
        text = tokenizer.decode(token_ids[:MAX_CHANGELOG_TOKENS])
        text = text.rpartition("\n")[0] or text
        token_ids = tokenizer.encode_text(text)
    return text, token_ids
