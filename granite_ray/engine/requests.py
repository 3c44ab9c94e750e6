"""What callers hand to an engine, and which requests run together. Plain Python, no tensors."""

import concurrent.futures
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from granite_ray.errors import RowFailure
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams, TokenLogprobs

Answer = TypeVar("Answer")
Future = concurrent.futures.Future
OnToken = Callable[[int, TokenLogprobs | None], None]
"""Called, in the engine's own thread, with each token as it is chosen; the end of text is none.

What a stop string cuts off comes too: only the completion knows where the text ends.
"""


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """A prompt to continue. Its future is done early where the caller no longer waits."""

    prompt: Prompt
    sampling: SamplingParams
    grammar: Grammar | None = None
    is_interactive: bool = False
    on_token: OnToken | None = None
    future: Future[Completion] = field(default_factory=Future)

    @property
    def num_answer_tokens(self) -> int:
        """The most tokens of its completion."""
        return self.sampling.max_tokens


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRequest:
    """A prompt with the choices to weigh after it."""

    prompt: Prompt
    choices: Sequence[tuple[int, ...]]
    is_interactive: bool = False
    future: Future[list[float]] = field(default_factory=Future)

    @property
    def num_answer_tokens(self) -> int:
        """The tokens of its longest choice."""
        return max(map(len, self.choices), default=0)


Request = GenerateRequest | ScoreRequest


def num_positions(request: Request) -> int:
    """Return the most token positions that a request can come to fill."""
    return len(request.prompt.token_ids) + request.num_answer_tokens


def check_fits(prompt: Prompt, num_answer_tokens: int, max_model_len: int) -> None:
    """Raise RowFailure where prompt and answer need more positions than the model has."""
    num_prompt_tokens = len(prompt.token_ids)
    if num_prompt_tokens + num_answer_tokens > max_model_len:
        raise RowFailure(
            "too_long",
            f"the prompt has {num_prompt_tokens:,} tokens and the answer may have "
            f"{num_answer_tokens:,}, together more than the {max_model_len:,} of the model's "
            "context; lower chunking.max_tokens or task.max_tokens",
        )


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first of the stop strings."""
    found = [place for place in (text.find(end) for end in stop) if place >= 0]
    return text[: min(found)] if found else text


def take_batch(
    waiting: Sequence[Request], max_num_seqs: int, max_num_batched_tokens: int
) -> list[Request]:
    """Choose what runs next: the oldest request and those of its kind nearest to it in length.

    The oldest always goes, so nobody starves; the others are near in length, so padding is small.
    A request beyond the token budget goes alone.
    """
    if not waiting:
        return []
    oldest = waiting[0]
    batch, longest = [oldest], num_positions(oldest)
    others = [request for request in waiting[1:] if type(request) is type(oldest)]
    others.sort(key=lambda request: abs(num_positions(request) - num_positions(oldest)))
    for request in others:
        longest = max(longest, num_positions(request))
        if len(batch) == max_num_seqs or (len(batch) + 1) * longest > max_num_batched_tokens:
            break
        batch.append(request)
    return batch


def settle(future: Future[Answer], answer: Answer) -> None:
    """Give the caller its answer, unless it stopped waiting in this moment."""
    with suppress(concurrent.futures.InvalidStateError):
        future.set_result(answer)


def fail(future: Future[Any], error: BaseException) -> None:
    """Raise `error` where the caller waits, unless it stopped waiting in this moment."""
    with suppress(concurrent.futures.InvalidStateError):
        future.set_exception(error)
