"""`/v1/models`, `/v1/chat/completions`, `/v1/completions`: OpenAI's routes over the engine."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError

from granite_ray.serving.calls import CompletionCall, Delta, Refusal, Reply
from granite_ray.serving.errors import ApiError, refused
from granite_ray.serving.gateway import Gateway, new_seed
from granite_ray.serving.keys import Caller
from granite_ray.serving.responses import (
    Heading,
    chat_chunks,
    chat_response,
    text_chunks,
    text_response,
)
from granite_ray.serving.shapes import ChatRequest, CompletionRequest

CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream, as server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}

Received = TypeVar("Received", bound=BaseModel)


def completion_routes(gateway: Gateway) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [_model(gateway)]}

    @router.get("/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """Describe the model."""
        check_model(gateway, model)
        return _model(gateway)

    @router.post("/chat/completions", responses=STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Write the next turn of a conversation."""
        call = _chat_call(gateway, body)
        if not body.stream:
            return JSONResponse(await answer_chat(gateway, body, request.scope["caller"], call))
        items = await _begun(gateway.stream(call, request.scope["caller"]))
        return _events(chat_chunks(items, Heading.new("chatcmpl", body.model), body))

    @router.post("/completions", responses=STREAMED)
    async def completion(body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        call = _text_call(gateway, body)
        if not body.stream:
            return JSONResponse(await answer_text(gateway, body, request.scope["caller"], call))
        items = await _begun(gateway.stream(call, request.scope["caller"]))
        return _events(text_chunks(items, Heading.new("cmpl", body.model), body))

    return router


async def answer_chat(
    gateway: Gateway,
    body: ChatRequest,
    caller: Caller | None,
    call: CompletionCall | None = None,
) -> dict[str, Any]:
    """Return the response to a chat request, for a caller or for a batch."""
    reply = await gateway.complete(call or _chat_call(gateway, body), caller)
    return chat_response(reply, Heading.new("chatcmpl", body.model))


async def answer_text(
    gateway: Gateway,
    body: CompletionRequest,
    caller: Caller | None,
    call: CompletionCall | None = None,
) -> dict[str, Any]:
    """Return the response to a completion request, for a caller or for a batch."""
    reply = await gateway.complete(call or _text_call(gateway, body), caller)
    texts = tuple(str(prompt) for prompt in body.prompts()) if body.echo else ()
    return text_response(reply, Heading.new("cmpl", body.model), body, texts)


def received(kind: type[Received], values: Mapping[str, Any]) -> Received:
    """Return a request's body that did not come through a route.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from None


def invalid(problems: Any) -> ApiError:
    """Return the error of a body that has not the right shape; it repeats nothing of the body."""
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        place, message = "body", "There is a field that this route does not know."
        known = [str(part) for part in first["loc"] if part != "body"]
        if known and all(part.replace("_", "").isalnum() for part in known):
            place = ".".join(known)[:100]
    return ApiError(400, f"{place}: {message}.", "invalid_value", param=place)


def check_model(gateway: Gateway, model: str) -> None:
    """Refuse a model that is not served."""
    if model != gateway.model.name:
        raise ApiError(
            404,
            f"The model is not served here; {gateway.model.name} is.",
            "model_not_found",
            param="model",
        )


def _chat_call(gateway: Gateway, body: ChatRequest) -> CompletionCall:
    check_model(gateway, body.model)
    return body.to_call(new_seed(), gateway.config.serve.max_tokens)


def _text_call(gateway: Gateway, body: CompletionRequest) -> CompletionCall:
    check_model(gateway, body.model)
    return body.to_call(new_seed(), gateway.config.serve.max_tokens)


async def _begun(
    items: AsyncGenerator[Delta | Reply | Refusal],
) -> AsyncGenerator[Delta | Reply | Refusal]:
    """Wait for the first item: what is refused before it is refused by status."""
    first = await anext(items)
    if isinstance(first, Refusal):
        raise refused(first)

    async def begun() -> AsyncGenerator[Delta | Reply | Refusal]:
        async with aclosing(items):
            yield first
            async for item in items:
                yield item

    return begun()


def _events(chunks: Any) -> StreamingResponse:
    return StreamingResponse(chunks, media_type="text/event-stream")


def _model(gateway: Gateway) -> dict[str, Any]:
    return {
        "id": gateway.model.name,
        "object": "model",
        "created": gateway.model.created,
        "owned_by": "granite-ray",
        "max_model_len": gateway.model.max_model_len,
    }
