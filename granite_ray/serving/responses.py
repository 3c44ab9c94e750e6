"""Replies → OpenAI's response objects, whole or in chunks."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from granite_ray.serving.calls import Choice, Delta, Refusal, Reply, TokenText
from granite_ray.serving.errors import refused
from granite_ray.serving.shapes import ChatRequest, CompletionRequest

MIN_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot be: JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What all chunks of one response share."""

    response_id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> "Heading":
        """Return the heading of a response that begins now."""
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model)

    def __call__(self, kind: str, **values: Any) -> dict[str, Any]:
        """Return an object of this response."""
        own = {"id": self.response_id, "object": kind, "created": self.created}
        return {**own, "model": self.model, **values}


def chat_response(reply: Reply, heading: Heading) -> dict[str, Any]:
    """Return the object of a whole chat completion."""
    choices = [
        {
            "index": choice.index,
            "message": {
                "role": "assistant",
                "content": choice.text if choice.text or not choice.tool_calls else None,
                "refusal": None,
                **({"tool_calls": _tool_calls(choice)} if choice.tool_calls else {}),
            },
            "logprobs": _chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        for choice in reply.choices
    ]
    return heading("chat.completion", choices=choices, usage=usage(reply))


def text_response(
    reply: Reply, heading: Heading, request: CompletionRequest, texts: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the object of a whole completion; `texts` stand before the answers under `echo`."""
    choices = [
        {
            "index": choice.index,
            "text": (texts[choice.index // request.n] if texts else "") + choice.text,
            "logprobs": _text_logprobs(choice.logprobs, 0),
            "finish_reason": choice.finish_reason,
        }
        for choice in reply.choices
    ]
    return heading("text_completion", choices=choices, usage=usage(reply))


async def chat_chunks(
    items: AsyncGenerator[Delta | Reply | Refusal], heading: Heading, request: ChatRequest
) -> AsyncGenerator[bytes]:
    """Yield the server-sent events of a chat completion."""
    kind = "chat.completion.chunk"
    for index in range(request.n):
        yield _event(heading(kind, choices=[_chat_delta(index, {"role": "assistant"})]))
    async for item in items:
        if isinstance(item, Delta):
            delta = {"content": item.text}
            chosen = _chat_delta(item.index, delta, _chat_logprobs(item.logprobs or None))
            yield _event(heading(kind, choices=[chosen]))
        elif isinstance(item, Refusal):
            yield _event(refused(item).body)
        else:
            for choice in item.choices:
                yield _event(heading(kind, choices=[_last_chat_delta(choice)]))
            if request.stream_options is not None and request.stream_options.include_usage:
                yield _event(heading(kind, choices=[], usage=usage(item)))
    yield b"data: [DONE]\n\n"


async def text_chunks(
    items: AsyncGenerator[Delta | Reply | Refusal], heading: Heading, request: CompletionRequest
) -> AsyncGenerator[bytes]:
    """Yield the server-sent events of a completion."""
    lengths: dict[int, int] = {}
    if request.echo:
        for at, prompt in enumerate(request.prompts()):
            for index in range(at * request.n, (at + 1) * request.n):
                yield _event(heading("text_completion", choices=[_text_delta(index, str(prompt))]))
    async for item in items:
        if isinstance(item, Delta):
            start = lengths.get(item.index, 0)
            lengths[item.index] = start + len(item.text)
            logprobs = _text_logprobs(item.logprobs or None, start)
            chosen = _text_delta(item.index, item.text, logprobs)
            yield _event(heading("text_completion", choices=[chosen]))
        elif isinstance(item, Refusal):
            yield _event(refused(item).body)
        else:
            for choice in item.choices:
                last = _text_delta(choice.index, "") | {"finish_reason": choice.finish_reason}
                yield _event(heading("text_completion", choices=[last]))
            if request.stream_options is not None and request.stream_options.include_usage:
                yield _event(heading("text_completion", choices=[], usage=usage(item)))
    yield b"data: [DONE]\n\n"


def usage(reply: Reply) -> dict[str, Any]:
    """Return what a reply has cost, in tokens."""
    return {
        "prompt_tokens": reply.num_prompt_tokens,
        "completion_tokens": reply.num_completion_tokens,
        "total_tokens": reply.num_prompt_tokens + reply.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.num_cached_tokens},
    }


def _event(values: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(values, separators=(',', ':'))}\n\n".encode()


def _chat_delta(
    index: int, delta: Mapping[str, Any], logprobs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _last_chat_delta(choice: Choice) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if choice.tool_calls:
        calls = _tool_calls(choice)
        delta = {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]}
    return _chat_delta(choice.index, delta) | {"finish_reason": choice.finish_reason}


def _text_delta(index: int, text: str, logprobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}


def _tool_calls(choice: Choice) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": dict(call)}
        for call in choice.tool_calls
    ]


def _chat_logprobs(tokens: Iterable[TokenText] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {
        "content": [
            {
                **_one(token.text, token.logprob),
                "top_logprobs": [_one(text, logprob) for text, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _one(text: str, logprob: float) -> dict[str, Any]:
    # Half of a character has bytes that the text does not tell.
    encoded = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": encoded}


def _text_logprobs(tokens: Sequence[TokenText] | None, start: int) -> dict[str, Any] | None:
    if tokens is None:
        return None
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [max(token.logprob, MIN_LOGPROB) for token in tokens],
        "top_logprobs": [
            {text: max(logprob, MIN_LOGPROB) for text, logprob in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }
