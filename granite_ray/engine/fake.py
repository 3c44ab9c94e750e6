"""Answers without a model, always the same ones: for trials, benchmarks and tests of the rest.

An answer depends on the prompt, the sampling and the grammar, and on nothing else. It may be held
back to a stated speed.
"""

import asyncio
import math
from array import array
from collections.abc import Sequence
from functools import cached_property, lru_cache
from hashlib import blake2b
from random import Random

from granite_ray.engine.fake_json import JsonWriter
from granite_ray.engine.requests import OnToken, check_fits, cut_at_stop
from granite_ray.errors import InfrastructureError
from granite_ray.records import Completion, FinishReason, Grammar, Prompt, SamplingParams
from granite_ray.tokenizer import Tokenizer

VOCABULARY = (
    "archive cache client code column device document driver event file font frame graph "
    "image index kernel language layer library link log map memory message module network "
    "object package page parser process queue reader record report server shell signal source "
    "stream string system table text thread tool tree window writer"
)
MIN_WORDS, MAX_WORDS = 6, 18

NUM_JSON_ANSWERS = 256
"""Different answers for one schema: walking a grammar takes milliseconds, so they are kept."""

SCORE_RANGE = 6.0
"""How far apart, as logits, two choices can be."""

CREDIT_S = 0.01
"""Lateness of timers that later answers make up for."""
STEP_S = 1.0
"""How often a call that takes its time shows that it is alive."""


class FakeEngine:
    """An engine without a model; see `LLM` for what its verbs promise."""

    def __init__(
        self, tokenizer: Tokenizer, max_model_len: int, tokens_per_s: float | None
    ) -> None:
        self.num_calls = 0
        self.num_steps = 0
        self.failure: InfrastructureError | None = None
        self.num_cached_tokens = 0
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._tokens_per_s = tokens_per_s
        self._free_at = 0.0
        self._words = [tokenizer.encode_text(f" {word}") for word in VOCABULARY.split()]
        self._period = tokenizer.encode_text(".")
        self._written = lru_cache(maxsize=16 * NUM_JSON_ANSWERS)(self._write_json)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        grammar: Grammar | None = None,
        *,
        is_interactive: bool = False,  # noqa: ARG002 - calls are answered in the order they came
        on_token: OnToken | None = None,
    ) -> Completion:
        """Make an answer up; see `Engine`. `on_token` hears of all tokens at once."""
        self._admit(prompt, sampling.max_tokens)
        schema = grammar.json_schema if grammar else ""
        random = Random(_number(prompt, f"{sampling}{schema}".encode()))
        if grammar is None:
            token_ids, reason = self._write_text(sampling.max_tokens, random)
        else:
            variant = random.randrange(NUM_JSON_ANSWERS)
            # What is copied from a text is of no use to other texts.
            write = self._written if grammar.source is None else self._write_json
            token_ids, reason = write(grammar, sampling.max_tokens, variant)
        await self._take_time(len(prompt.token_ids) + len(token_ids))
        text = self._tokenizer.decode(token_ids).strip()
        if on_token is not None:
            for token_id in self._tokenizer.encode_text(text):
                on_token(token_id, None)
        kept = text if grammar else cut_at_stop(text, sampling.stop)
        return Completion(
            text=kept,
            num_prompt_tokens=len(prompt.token_ids),
            num_completion_tokens=len(token_ids),
            finish_reason=reason if kept is text else "stop",
        )

    async def score(
        self,
        prompt: Prompt,
        choices: Sequence[tuple[int, ...]],
        *,
        is_interactive: bool = False,  # noqa: ARG002 - as above
    ) -> list[float]:
        """Make log-probabilities up, as if the choices were all there is; see `LLM`."""
        longest = max(map(len, choices), default=0)
        self._admit(prompt, longest)
        salt = _number(prompt).to_bytes(8)
        logits = [SCORE_RANGE * _fraction(salt, choice) for choice in choices]
        await self._take_time(len(prompt.token_ids) + longest)
        log_total = math.log(sum(map(math.exp, logits))) if logits else 0.0
        return [min(logit - log_total, 0.0) for logit in logits]

    def count(self, text: str) -> int:
        """Count the tokens of plain text; see `LLM`."""
        return self._tokenizer.count(text)

    def shutdown(self) -> None:
        """Refuse every later call."""
        self.failure = InfrastructureError("The engine was shut down.")

    def _admit(self, prompt: Prompt, num_answer_tokens: int) -> None:
        if self.failure is not None:
            raise InfrastructureError(str(self.failure))
        check_fits(prompt, num_answer_tokens, self._max_model_len)
        self.num_calls += 1

    def _write_text(self, max_tokens: int, random: Random) -> tuple[list[int], FinishReason]:
        words = random.choices(self._words, k=random.randint(MIN_WORDS, MAX_WORDS))
        token_ids = [token_id for word in [*words, self._period] for token_id in word]
        if len(token_ids) > max_tokens:
            return token_ids[:max_tokens], "length"
        return token_ids, "stop"

    def _write_json(
        self, grammar: Grammar, max_tokens: int, variant: int
    ) -> tuple[list[int], FinishReason]:
        return self._json_writer.write(grammar, max_tokens, Random(variant))

    @cached_property
    def _json_writer(self) -> JsonWriter:
        """Built at the first schema: it looks at the whole vocabulary."""
        return JsonWriter(self._tokenizer)

    async def _take_time(self, num_tokens: int) -> None:
        """Wait until this call's tokens are through, at one speed for all calls together.

        Calls queue on a clock of absolute deadlines, so a late timer delays nobody else. Who
        waits for long counts steps meanwhile.
        """
        clock = asyncio.get_running_loop().time
        now = ends_at = clock()
        if self._tokens_per_s is not None:
            ends_at = max(self._free_at, now - CREDIT_S) + num_tokens / self._tokens_per_s
            self._free_at = ends_at
        while True:
            await asyncio.sleep(min(ends_at - now, STEP_S))
            self.num_steps += 1
            now = clock()
            if now >= ends_at:
                return


def _number(prompt: Prompt, salt: bytes = b"") -> int:
    """Digest a prompt to a number that is the same in every process and on every machine."""
    digest = blake2b(array("I", prompt.token_ids).tobytes(), digest_size=8)
    digest.update(salt)
    return int.from_bytes(digest.digest())


def _fraction(salt: bytes, choice: tuple[int, ...]) -> float:
    """Digest a choice to a number from 0 to 1."""
    digest = blake2b(array("I", choice).tobytes(), digest_size=4, key=salt).digest()
    return int.from_bytes(digest) / 2**32
