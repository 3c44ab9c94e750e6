"""Random JSON for a schema: a walk through its grammar that likes to come to an end."""

from random import Random

import numpy as np
from numpy.typing import NDArray

from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.records import FinishReason, Grammar
from granite_ray.tokenizer import Tokenizer

END_PROBABILITY = 0.4
"""How readily a value ends at each token where it may."""


class JsonWriter:
    """Walks grammars over one vocabulary, choosing at random among the allowed tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self._compiler = GrammarCompiler(
            tokenizer.tokenizer_json, tokenizer.vocab_size, tokenizer.eos_token_ids
        )
        texts = [tokenizer.decode([token_id]) for token_id in range(tokenizer.vocab_size)]
        is_null = np.array([bool(text) and "null".startswith(text) for text in texts])
        is_opening = np.array([text[:1] in {"{", "["} for text in texts])
        is_quote = np.array([text == '"' for text in texts])
        # What brings an answer nearer to its end, the strongest first. Brackets come after what
        # ends a string or the first half of an address, inside of which they are text.
        ending_kinds = [
            np.isin(range(tokenizer.vocab_size), tokenizer.eos_token_ids),
            is_quote,
            np.array([text == "@" for text in texts]),
            np.array([bool(text) and set(text) <= {"]", "}"} for text in texts]),
            np.array([text[:1] in {",", ":"} for text in texts]),
        ]
        # Null says nothing, so it comes late; but nothing else ends a record that holds itself.
        value_kinds = [np.array([_is_plain(text) for text in texts]) & ~is_null, is_quote]
        self._going_on = [*value_kinds, is_opening]
        self._coming_to_an_end = [*ending_kinds, *value_kinds, is_null]

    def write(
        self, grammar: Grammar, max_tokens: int, random: Random
    ) -> tuple[list[int], FinishReason]:
        """Return the tokens of one answer, whole unless `max_tokens` cut it.

        Raises:
            ConfigError: The schema cannot be compiled.
        """
        matcher = self._compiler.matcher(grammar)
        token_ids: list[int] = []
        while len(token_ids) < max_tokens:
            wants_end = len(token_ids) > max_tokens // 2 or random.random() < END_PROBABILITY
            token_id = self._choose(matcher.allowed_tokens(), wants_end, random)
            if token_id in self._eos_token_ids:
                return token_ids, "stop"
            matcher.consume(token_id)
            token_ids.append(token_id)
            if matcher.is_finished:
                return token_ids, "stop"
        return token_ids, "length"

    def _choose(self, allowed: NDArray[np.bool_], wants_end: bool, random: Random) -> int:
        """Choose from the first kind of token that has any allowed one."""
        for kind in self._coming_to_an_end if wants_end else self._going_on:
            candidates = np.flatnonzero(allowed & kind)
            if len(candidates):
                return int(random.choice(candidates))
        return int(random.choice(np.flatnonzero(allowed)))


def _is_plain(text: str) -> bool:
    """Tell whether a token can stand in readable text and in numbers of ordinary size."""
    is_exponent = text in {"e", "E"}
    return bool(text) and not is_exponent and all(c.isalnum() or c in " .-" for c in text)
