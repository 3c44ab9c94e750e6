"""JSON Schema → which token may come next.

llguidance does the parsing; here its grammars are compiled once, written compactly (a model cannot
ramble in white space), and its errors become ours. What is copied from a text is restricted by
`copying`, on top of its masks. Torch is not needed.
"""

import json
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray

from granite_ray.engine.copying import CopySource, CopyWalk
from granite_ray.engine.places import Place, copied_places
from granite_ray.engine.spelling import CopyTokens
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import Grammar

# Given as overrides, so that nothing written inside a schema can loosen them.
COMPACT_AND_STRICT: Any = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}
MAX_COMPILED_GRAMMARS = 64


def check_schema(json_schema: str) -> None:
    """Raise ConfigError, naming the keyword, for a schema that cannot become a grammar."""
    message = LLMatcher.validate_grammar(_grammar_text(json_schema))
    if message:
        raise ConfigError(_refusal(message))


class GrammarCompiler:
    """Grammars over one vocabulary; each schema is compiled once.

    `num_threads` compute masks: few, because a forward pass may need the cores at the same time.
    """

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        num_threads: int = 1,
    ) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = LLTokenizer(tokenizer_json, vocab_size, list(eos_token_ids))
        self._executor = LLExecutor(num_threads)
        self._compiled = lru_cache(MAX_COMPILED_GRAMMARS)(self._compile)

    def matcher(self, grammar: Grammar) -> "GrammarMatcher":
        """Return a fresh matcher, standing before the first token of an answer.

        Raises:
            ConfigError: Naming what cannot be compiled.
        """
        matcher, top = self._compiled(grammar.json_schema)
        return GrammarMatcher(matcher.deep_copy(), self.vocab_size, self._copies(top, grammar))

    def compute_masks(self, matchers: Sequence["GrammarMatcher"]) -> NDArray[np.uint8]:
        """Return for each matcher which tokens may come next: a row of bits, the first one lowest.

        Rows are padded to whole 32-bit words. Python's lock is let go once for all matchers; one
        by one, a thread would wait for it again after each. A matcher that breaks meanwhile raises
        nothing here: ask it with `raise_if_broken`.
        """
        num_bytes = 4 * math.ceil(self.vocab_size / 32)
        packed = np.zeros((len(matchers), num_bytes), np.uint8)
        places = [(matcher.ll_matcher, row) for row, matcher in enumerate(matchers)]
        if matchers:  # the library refuses an empty list
            self._executor.unsafe_compute_mask_ptr(
                places, packed.ctypes.data, num_bytes, len(matchers)
            )
        for matcher, mask in zip(matchers, packed, strict=True):
            matcher.restrict(mask)
        return packed

    def _compile(self, json_schema: str) -> tuple[LLMatcher, Place | None]:
        matcher = LLMatcher(self._tokenizer, _grammar_text(json_schema), log_level=0)
        if matcher.is_error():
            raise ConfigError(_refusal(matcher.get_error()))
        return matcher, copied_places(json.loads(json_schema))

    def _copies(self, top: Place | None, grammar: Grammar) -> CopyWalk | None:
        if top is None:
            return None
        assert grammar.source is not None, "a schema with x-copy needs a text to copy from"
        return CopyWalk(top, CopySource(grammar.source, self._copy_tokens), self._copy_tokens)

    @cached_property
    def _copy_tokens(self) -> CopyTokens:
        """Made for the first schema that copies: it looks at the whole vocabulary."""
        tokenizer = self._tokenizer
        return CopyTokens(
            [
                b"" if tokenizer.is_special_token(i) else tokenizer.decode_bytes([i])
                for i in range(self.vocab_size)
            ]
        )


class GrammarMatcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, copies: CopyWalk | None = None) -> None:
        self.ll_matcher = matcher
        self._vocab_size = vocab_size
        self._copies = copies

    @property
    def is_finished(self) -> bool:
        """Whether the answer is whole and nothing can follow but the end."""
        return bool(self.ll_matcher.is_stopped())

    def allowed_tokens(self) -> NDArray[np.bool_]:
        """Return for every token id whether it may come next; the end only where all is closed."""
        num_bytes = 4 * math.ceil(self._vocab_size / 32)
        mask = np.frombuffer(self.ll_matcher.compute_bitmask(), np.uint8)[:num_bytes].copy()
        self.raise_if_broken()
        self.restrict(mask)
        return np.unpackbits(mask, count=self._vocab_size, bitorder="little").view(np.bool_)

    def restrict(self, mask: NDArray[np.uint8]) -> None:
        """Take away, in place, what the grammar allows but would be no copy of the source."""
        if self._copies is not None:
            self._copies.restrict(mask)

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next, all that are certain; they are not consumed."""
        token_ids: list[int] = self.ll_matcher.compute_ff_tokens()
        self.raise_if_broken()
        return token_ids

    def consume(self, token_id: int) -> None:
        """Step over the token that was chosen."""
        self.ll_matcher.consume_token(token_id)
        self.raise_if_broken()
        if self._copies is not None:
            self._copies.consume(token_id)

    def raise_if_broken(self) -> None:
        """Raise RowFailure where the grammar cannot follow its answer any more."""
        if self.ll_matcher.is_error():
            # The library's own message quotes the answer, and the answer quotes the document.
            raise RowFailure(
                "schema_violation",
                f"the grammar cannot follow this answer ({self.ll_matcher.stop_reason()}); "
                "a simpler task.schema may help",
            )


def _grammar_text(json_schema: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(json_schema, overrides=COMPACT_AND_STRICT)
    except ValueError as error:
        raise ConfigError(_refusal(str(error))) from error


def _refusal(message: str) -> str:
    return (
        f"task.schema cannot be turned into a grammar: {message}. "
        "Remove or rewrite that part of the schema."
    )
