"""What the gateway asks of a replica, and what it gets back. Plain records, pickled on the way."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa

from granite_ray.config import TaskConfig
from granite_ray.errors import InfrastructureError
from granite_ray.records import SamplingParams

ChoiceReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """Turns to answer, or prompts to continue: exactly one of the two is given.

    `max_tokens` None asks for what the context leaves, up to `most_tokens`. `json_schema` is a
    schema as JSON text, checked already. `tool_choice` is `auto`, `required`, or a function's name.
    A prompt is text, in which control tokens mean nothing, or token ids; `suffix` is what follows
    the gap that is to be filled.
    """

    sampling: SamplingParams
    most_tokens: int
    max_tokens: int | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    suffix: str | None = None
    num_choices: int = 1
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str = "auto"
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as a caller sees it, its log-probability, and the likeliest in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer; `tool_calls` are objects with `name` and `arguments`, a JSON text."""

    index: int
    text: str
    finish_reason: ChoiceReason
    tool_calls: tuple[Mapping[str, str], ...] = ()
    logprobs: tuple[TokenText, ...] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answers to a call, in order: all choices of the first prompt, then of the next."""

    choices: tuple[Choice, ...]
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice has grown by; a stream ends with the `Reply`."""

    index: int
    text: str
    logprobs: tuple[TokenText, ...] = ()


@dataclass(frozen=True, slots=True)
class DocumentsCall:
    """Documents as read (`records.RAW_FIELDS`, then kept columns) and what is asked of them.

    Documents that `is_deadly` marks have killed their replicas: they only fail.
    """

    raw: pa.Table
    task: TaskConfig
    text_column: str = "text"
    is_deadly: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no answer: an HTTP status and words without any text of the request.

    `is_transient` says that the same call may succeed later.
    """

    status: int
    message: str
    code: str | None = None
    is_transient: bool = False


class ReplicaDiedError(InfrastructureError):
    """A replica died while it had this call: perhaps because of it."""


class Replicas(Protocol):
    """Whatever answers calls: one replica in this process, or all those of a deployment."""

    async def complete(
        self, call: CompletionCall, *, is_interactive: bool = True
    ) -> Reply | Refusal:
        """Answer at once."""
        ...

    def stream(self, call: CompletionCall) -> AsyncGenerator[Delta | Reply | Refusal]:
        """Answer as it is written; the last item is the reply, or a refusal."""
        ...

    async def answer(
        self, call: DocumentsCall, *, is_interactive: bool = True
    ) -> pa.Table | Refusal:
        """Return the rows that a job would write for these documents."""
        ...

    async def check(self) -> None:
        """Raise InfrastructureError where nothing can answer now."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the gateway knows of the model without loading it."""

    name: str
    tokenizer_path: str
    max_model_len: int
    created: int = field(default=0)
