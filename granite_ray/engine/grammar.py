"""JSON Schema → which token may come next.

llguidance does the parsing; here its grammars are compiled once, written compactly (a model cannot
ramble in white space), and its errors become ours. Torch is not needed.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

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
    """Grammars over one vocabulary; each schema is compiled once."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = LLTokenizer(tokenizer_json, vocab_size, list(eos_token_ids))
        self._compiled = lru_cache(MAX_COMPILED_GRAMMARS)(self._compile)

    def matcher(self, grammar: Grammar) -> "GrammarMatcher":
        """Return a fresh matcher, standing before the first token of an answer.

        Raises:
            ConfigError: Naming what cannot be compiled.
        """
        return GrammarMatcher(self._compiled(grammar.json_schema).deep_copy(), self.vocab_size)

    def _compile(self, json_schema: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, _grammar_text(json_schema), log_level=0)
        if matcher.is_error():
            raise ConfigError(_refusal(matcher.get_error()))
        return matcher


class GrammarMatcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def is_finished(self) -> bool:
        """Whether the answer is whole and nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def allowed_tokens(self) -> NDArray[np.bool_]:
        """Return for every token id whether it may come next; the end only where all is closed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._raise_if_broken()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def consume(self, token_id: int) -> None:
        """Step over the token that was chosen."""
        self._matcher.consume_token(token_id)
        self._raise_if_broken()

    def _raise_if_broken(self) -> None:
        if self._matcher.is_error():
            # The library's own message quotes the answer, and the answer quotes the document.
            raise RowFailure(
                "schema_violation",
                f"the grammar cannot follow this answer ({self._matcher.stop_reason()}); "
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
