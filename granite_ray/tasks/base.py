"""What every task program shares: its contract, its room in the context, waiting on many chunks.

A task program is an ordinary coroutine for one document. It knows an engine only as `LLM`.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from granite_ray.config import TaskSection
from granite_ray.errors import ConfigError, InfrastructureError, RowFailure
from granite_ray.records import (
    LLM,
    Completion,
    Document,
    FinishReason,
    Grammar,
    Prompt,
    Result,
    RowError,
    SamplingParams,
)

MIN_CHUNK_TOKENS = 16
"""Fewer document tokens than this in a prompt say nothing."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class TaskLimits:
    """What the rest of the config says to a task.

    `max_chunk_tokens` is `chunking.max_tokens`; `text_column` is how templates may call the text.
    """

    max_model_len: int
    max_failed_chunks: int = 0
    max_chunk_tokens: int | None = None
    text_column: str = "text"


class Task(Protocol):
    """What the model is asked of each document.

    `output_fields` are the declared task columns, `columns` the source columns besides the text
    that its prompts read, `max_chunk_tokens` the document tokens that fit into one prompt.
    """

    kind: str
    output_fields: tuple[pa.Field, ...]
    columns: frozenset[str]
    max_chunk_tokens: int

    async def run(self, document: Document, llm: LLM) -> Result:
        """Answer for one document that has chunks; what is wrong with it is in `Result.error`."""
        ...


# running one document ────────────────────────────────────────────────────────────────────────────


class MeteredLLM:
    """An engine as one document sees it: it counts what the document costs."""

    def __init__(self, llm: LLM) -> None:
        self.unmetered = llm
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        self.num_failed_chunks = 0
        self.finish_reason: FinishReason | None = None

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, grammar: Grammar | None = None
    ) -> Completion:
        """Continue `prompt`; one answer that was cut marks the whole document as cut."""
        completion = await self.unmetered.generate(prompt, sampling, grammar)
        self.num_prompt_tokens += completion.num_prompt_tokens
        self.num_completion_tokens += completion.num_completion_tokens
        if self.finish_reason != "length":
            self.finish_reason = completion.finish_reason
        return completion

    async def score(self, prompt: Prompt, choices: Sequence[tuple[int, ...]]) -> list[float]:
        """Score `choices`; nothing is written, so only the prompt counts."""
        scores = await self.unmetered.score(prompt, choices)
        self.num_prompt_tokens += len(prompt.token_ids)
        return scores

    def count(self, text: str) -> int:
        """Count the tokens of plain text."""
        return self.unmetered.count(text)


async def run_metered(
    document: Document,
    llm: LLM,
    answer: Callable[[Document, MeteredLLM], Awaitable[Mapping[str, Any]]],
) -> Result:
    """Run `answer` and return its columns with the document's counts, also where it fails."""
    metered = MeteredLLM(llm)
    values: Mapping[str, Any] = {}
    error: RowError | None = None
    try:
        values = await answer(document, metered)
    except RowFailure as failure:
        error = RowError(failure.error_type, failure.message)
    return Result(
        values=values,
        num_chunks=len(document.chunks),
        num_failed_chunks=metered.num_failed_chunks,
        num_prompt_tokens=metered.num_prompt_tokens,
        num_completion_tokens=metered.num_completion_tokens,
        finish_reason=metered.finish_reason,
        error=error,
    )


# waiting on many chunks ──────────────────────────────────────────────────────────────────────────


async def gather_chunks(
    calls: Sequence[Coroutine[Any, Any, Answer]], llm: MeteredLLM, max_failed: int
) -> list[Answer | None]:
    """Return the answer for each chunk, None where one failed.

    A document may lose `max_failed` chunks in all. One `RowFailure` more, or one for each chunk, is
    raised itself; any other exception is raised at once. No call is left running.
    """
    allowed = max_failed - llm.num_failed_chunks
    answers = await _gather(calls, allowed)
    failures = [answer for answer in answers if isinstance(answer, RowFailure)]
    llm.num_failed_chunks += len(failures)
    if len(failures) > allowed or len(failures) == len(calls):
        raise failures[0]
    return [None if isinstance(answer, RowFailure) else answer for answer in answers]


async def gather_all(calls: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """Return all answers, or raise the first failure with no call left running."""
    answers: list[Answer] = []
    for answer in await _gather(calls, max_failed=0):
        if isinstance(answer, RowFailure):
            raise answer
        answers.append(answer)
    return answers


async def _gather(
    calls: Sequence[Coroutine[Any, Any, Answer]], max_failed: int
) -> list[Answer | RowFailure]:
    """Wait for all calls, or for one failure more than `max_failed`; the cut ones are left out."""
    running = [asyncio.ensure_future(call) for call in calls]
    waiting = set(running)
    try:
        while waiting:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            answers = [_failure(call) or call.result() for call in running if call.done()]
            if sum(isinstance(answer, RowFailure) for answer in answers) > max_failed:
                break
        return answers
    finally:
        for call in running:
            call.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _failure(call: asyncio.Future[Any]) -> RowFailure | None:
    """Return what a finished call says of its chunk; raise what it says of the machine."""
    if call.cancelled():
        # Nobody here cancelled it. Passed on, it would look as if the document's own coroutine
        # had been cancelled, and the caller would stop without a reason.
        raise InfrastructureError("The engine dropped a request. Run the job again to resume.")
    error = call.exception()
    if error is None or isinstance(error, RowFailure):
        return error
    raise error


# room and randomness ─────────────────────────────────────────────────────────────────────────────


def free_tokens(limits: TaskLimits, num_template_tokens: int, num_answer_tokens: int) -> int:
    """Return the tokens that the context leaves beside a prompt's own text and its answer."""
    free = limits.max_model_len - num_template_tokens - num_answer_tokens
    if free < MIN_CHUNK_TOKENS:
        raise ConfigError(
            f"model.max_model_len is {limits.max_model_len}; the prompt's own text takes "
            f"{num_template_tokens} tokens and the longest answer {num_answer_tokens}, which "
            f"leaves {max(free, 0)} for the document where {MIN_CHUNK_TOKENS} are needed. Lower "
            "task.max_tokens, shorten the instruction or examples, or raise model.max_model_len."
        )
    return free


def chunk_tokens(limits: TaskLimits, num_free_tokens: int) -> int:
    """Return the longest chunk: what is free, or less where `chunking.max_tokens` says so."""
    return min(num_free_tokens, limits.max_chunk_tokens or num_free_tokens)


def sampling_params(
    config: TaskSection,
    document: Document,
    purpose: str,
    index: int = 0,
    stop: tuple[str, ...] = (),
) -> SamplingParams:
    """Return how one answer is sampled; its seed belongs to this document, purpose and index."""
    name = f"{config.seed}\n{document.content_hash}\n{purpose}\n{index}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=int.from_bytes(digest, "big") >> 1,  # 63 bits: engines want a signed integer
        stop=stop,
    )
