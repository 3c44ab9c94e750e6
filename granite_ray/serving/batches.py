"""`/v1/files` and `/v1/batches`: what is accepted here is answered in the background, once."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import Field, StringConstraints
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from granite_ray.serving.batch_store import (
    ENDED,
    Batch,
    batch_to_api,
    new_batch_id,
)
from granite_ray.serving.conversation import Shape
from granite_ray.serving.errors import ApiError
from granite_ray.serving.gateway import Gateway
from granite_ray.serving.keys import Caller

HOUR_S = 3600
MAX_KEY_LENGTH = 200
PIECE_BYTES = 1024**2
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The content.", "content": {"application/octet-stream": {}}}
}
Endpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/summarize",
    "/v1/classify",
    "/v1/extract",
    "/v1/generate",
]
MetadataText = Annotated[str, StringConstraints(max_length=512)]
FILE_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}


class BatchRequest(Shape):
    """A file of requests, one a line, to one route."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: dict[MetadataText, MetadataText] | None = Field(default=None, max_length=16)


def file_routes(gateway: Gateway) -> APIRouter:
    """Return the routes of files."""
    router = APIRouter(prefix="/v1/files", tags=["files"])
    files = gateway.files

    @router.post("", openapi_extra=FILE_FORM)
    async def upload(request: Request) -> dict[str, Any]:
        """Store a JSONL or Parquet file."""
        filename, data = await _read_form(request, gateway.config.serve.max_file_mib)
        name = request.scope["caller"].name
        return (await asyncio.to_thread(files.put, name, filename, data)).to_api()

    @router.get("")
    async def listing(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: str | None = None,
        purpose: Literal["batch", "batch_output"] | None = None,
    ) -> dict[str, Any]:
        """List this key's files, the newest first."""
        found = await asyncio.to_thread(files.list, request.scope["caller"].name)
        chosen = [one.to_api() for one in found if purpose in (None, one.purpose)]
        return _page(chosen, after, limit)

    @router.get("/{file_id}")
    async def describe(file_id: str, request: Request) -> dict[str, Any]:
        """Describe a file."""
        name = request.scope["caller"].name
        return (await asyncio.to_thread(files.get, name, file_id)).to_api()

    @router.get("/{file_id}/content", response_class=StreamingResponse, responses=CONTENT)
    async def content(file_id: str, request: Request) -> StreamingResponse:
        """Return a file's content."""
        data = await asyncio.to_thread(files.read, request.scope["caller"].name, file_id)
        return StreamingResponse(
            _pieces(data),
            media_type="application/octet-stream",
            headers={"Content-Length": str(len(data))},
        )

    @router.delete("/{file_id}")
    async def delete(file_id: str, request: Request) -> dict[str, Any]:
        """Delete a file."""
        await asyncio.to_thread(files.delete, request.scope["caller"].name, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


def batch_routes(gateway: Gateway) -> APIRouter:
    """Return the routes of batches."""
    router = APIRouter(prefix="/v1/batches", tags=["batches"])
    store = gateway.batches

    @router.post("")
    async def create(body: BatchRequest, request: Request) -> dict[str, Any]:
        """Accept a batch; the same Idempotency-Key with the same body gives the same batch."""
        asked = AskedBatch(body.endpoint, body.input_file_id, metadata=body.metadata)
        key = request.headers.get("idempotency-key")
        return await accept_batch(gateway, request.scope["caller"], asked, key)

    @router.get("")
    async def listing(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> dict[str, Any]:
        """List this key's batches, the newest first."""
        name = request.scope["caller"].name
        ids = await asyncio.to_thread(store.ids, name)
        page = _page([{"id": one} for one in ids], after, limit)
        page["data"] = [
            await asyncio.to_thread(_describe, gateway, store.get(name, one["id"]))
            for one in page["data"]
        ]
        return page

    @router.get("/{batch_id}")
    async def describe(batch_id: str, request: Request) -> dict[str, Any]:
        """Say how far a batch is."""
        batch = await asyncio.to_thread(store.get, request.scope["caller"].name, batch_id)
        return await asyncio.to_thread(_describe, gateway, batch)

    @router.post("/{batch_id}/cancel")
    async def cancel(batch_id: str, request: Request) -> dict[str, Any]:
        """Cancel a batch; what is answered already is kept."""
        batch = await asyncio.to_thread(store.get, request.scope["caller"].name, batch_id)
        if (await asyncio.to_thread(store.state, batch)).status not in ENDED:
            await asyncio.to_thread(store.cancel, batch)
            gateway.has_new_batch.set()
        return await asyncio.to_thread(_describe, gateway, batch)

    return router


@dataclass(frozen=True, slots=True)
class AskedBatch:
    """What a caller wants as a batch; `source` is a file's id, or the JSONL file itself.

    The other fields are those of `Batch`.
    """

    endpoint: str
    source: str | bytes
    question: Mapping[str, Any] | None = None
    output_format: Literal["jsonl", "parquet"] = "jsonl"
    metadata: Mapping[str, str] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """All that makes it another batch."""
        source = self.source
        spelled = source if isinstance(source, str) else hashlib.sha256(source).hexdigest()
        return {**asdict(self), "source": spelled}


async def accept_batch(
    gateway: Gateway, caller: Caller, asked: AskedBatch, idempotency_key: str | None
) -> dict[str, Any]:
    """Store a batch, wake the runner, and return the batch object.

    Raises:
        ApiError: 404 without the file, 409 with another body, 429 with too many batches.
    """
    if idempotency_key is not None and not 0 < len(idempotency_key) <= MAX_KEY_LENGTH:
        words = f"Idempotency-Key has 1 to {MAX_KEY_LENGTH} characters."
        raise ApiError(400, words, "invalid_value")
    batch = await asyncio.to_thread(_accept, gateway, caller, asked, idempotency_key)
    gateway.has_new_batch.set()
    return await asyncio.to_thread(_describe, gateway, batch)


def _accept(gateway: Gateway, caller: Caller, asked: AskedBatch, key: str | None) -> Batch:
    """Store a batch; one that the key stands for already takes no place."""
    store, now = gateway.batches, time.time()
    known = store.known(caller.name, key, asked.body)
    if known is not None:
        return known
    waiting = len(store.unfinished_ids(caller.name))
    if waiting >= caller.max_batches:
        raise ApiError(
            429,
            f"{waiting} batches of this key are not done; at most {caller.max_batches}.",
            "too_many_batches",
            retry_after_s=60,
        )
    if isinstance(asked.source, bytes):
        stored = gateway.files.put(caller.name, "documents.jsonl", asked.source)
    else:
        stored = gateway.files.get(caller.name, asked.source)
    batch = Batch(
        name=caller.name,
        batch_id=new_batch_id(),
        endpoint=asked.endpoint,
        input_file_id=stored.file_id,
        created_at=int(now),
        expires_at=now + HOUR_S * gateway.config.serve.batch_hours,
        metadata=asked.metadata,
        question=asked.question,
        output_format=asked.output_format,
    )
    return store.create(batch, key, asked.body)


def _describe(gateway: Gateway, batch: Batch) -> dict[str, Any]:
    store = gateway.batches
    return batch_to_api(batch, store.state(batch), is_cancelled=store.is_cancelled(batch))


async def _read_form(request: Request, max_mib: float) -> tuple[str, bytes]:
    """Return name and content of the file in a form."""
    try:
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile) or purpose != "batch":
                raise ApiError(
                    400, "Send a form with file, and purpose=batch.", "invalid_value", param="file"
                )
            if (file.size or 0) > max_mib * 1024**2:
                raise ApiError(413, f"The file has more than {max_mib:g} MiB.", "too_large")
            return file.filename or "", await file.read()
    except (MultiPartException, KeyError, AssertionError) as error:
        raise ApiError(400, "The form cannot be read.", "invalid_value", param="file") from error


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def _page(items: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """Return one page of a listing, as OpenAI's clients walk through it."""
    ids = [item["id"] for item in items]
    start = 0
    if after is not None:
        if after not in ids:
            raise ApiError(404, "after names nothing in this list.", "not_found", param="after")
        start = ids.index(after) + 1
    data = list(items[start : start + limit])
    return {
        "object": "list",
        "data": data,
        "has_more": start + limit < len(items),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
