"""An engine whose answers a test writes down, and documents cut by hand."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from granite_ray.errors import RowFailure
from granite_ray.records import Chunk, Completion, Document, Grammar, Prompt, SamplingParams
from granite_ray.tokenizer import Tokenizer


@dataclass(frozen=True)
class Call:
    """One request as the engine got it, with the prompt as text."""

    text: str
    prompt: Prompt
    sampling: SamplingParams | None = None
    grammar: Grammar | None = None
    choices: tuple[tuple[int, ...], ...] = ()


Reply = str | Completion | BaseException


@dataclass
class ScriptedLLM:
    """Answers by functions of the call; remembers all calls in order."""

    tokenizer: Tokenizer
    write: Callable[[Call], Reply] = lambda call: f"answer {len(call.prompt.token_ids)}"
    rate: Callable[[Call], list[float]] = lambda call: [0.0] * len(call.choices)
    calls: list[Call] = field(default_factory=list)
    max_model_len: int = 10_000
    num_cancelled: int = 0

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, grammar: Grammar | None = None
    ) -> Completion:
        call = Call(self._show(prompt), prompt, sampling, grammar)
        self._admit(call, sampling.max_tokens)
        reply = self.write(call)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if isinstance(reply, BaseException):
            raise reply
        if isinstance(reply, Completion):
            return reply
        return Completion(reply, len(prompt.token_ids), self.count(reply), "stop")

    async def score(self, prompt: Prompt, choices: Sequence[tuple[int, ...]]) -> list[float]:
        call = Call(self._show(prompt), prompt, choices=tuple(choices))
        self._admit(call, max(map(len, choices)))
        await asyncio.sleep(0)
        return self.rate(call)

    def count(self, text: str) -> int:
        return self.tokenizer.count(text)

    def _show(self, prompt: Prompt) -> str:
        """Write a prompt as text, with a bar for each control token."""
        controls = self.tokenizer.control_token_ids
        shown = [
            "|" if is_control else self.tokenizer.decode(list(token_ids))
            for is_control, token_ids in groupby(prompt.token_ids, controls.__contains__)
        ]
        return "".join(shown)

    def _admit(self, call: Call, num_answer_tokens: int) -> None:
        if len(call.prompt.token_ids) + num_answer_tokens > self.max_model_len:
            raise RowFailure("too_long", f"{len(call.prompt.token_ids)} tokens")
        self.calls.append(call)


def make_document(tokenizer: Tokenizer, *texts: str, **columns: object) -> Document:
    """Return a document whose chunks are `texts`."""
    chunks = []
    start = 0
    for index, text in enumerate(texts):
        token_ids = tokenizer.encode_text(text)
        chunks.append(Chunk(index, start, start + len(text), token_ids))
        start += len(text)
    return Document("d", "f", 0, "".join(texts), "hash", tuple(chunks), columns)
