"""`/v1/summarize`, `/v1/classify`, `/v1/extract`, `/v1/generate`: a job's rows, now.

A few documents are answered at once; many, or a file, become a batch by themselves.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from granite_ray.serving.batches import AskedBatch, accept_batch
from granite_ray.serving.completions import check_model
from granite_ray.serving.errors import ApiError
from granite_ray.serving.gateway import Gateway
from granite_ray.serving.keys import Caller
from granite_ray.serving.questions import DocumentsRequest, Kind, Question

KINDS: tuple[Kind, ...] = get_args(Kind)
DOCUMENT_PATHS = tuple(f"/v1/{kind}" for kind in KINDS)
PARQUET_TYPE = "application/vnd.apache.parquet"
JSONL_TYPE = "application/jsonl"
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The rows, in the format that was asked for.",
        "content": {"application/json": {}, JSONL_TYPE: {}, PARQUET_TYPE: {}},
    },
    202: {
        "description": "A batch, since there are many documents.",
        "content": {"application/json": {}},
    },
}
MAX_STREAMED = 8
"""Documents of one streaming request that are asked for at once."""


def document_routes(gateway: Gateway) -> APIRouter:
    """Return a route for each kind of task."""
    router = APIRouter(prefix="/v1", tags=["documents"])

    @router.get("/tasks")
    async def tasks() -> dict[str, Any]:
        """List the tasks that a request can ask for by name."""
        named = gateway.config.tasks.items()
        data = [{"id": name, "object": "task", "kind": task.kind} for name, task in named]
        return {"object": "list", "data": data}

    for kind in KINDS:
        _add_route(router, gateway, kind)
    return router


def _add_route(router: APIRouter, gateway: Gateway, kind: Kind) -> None:
    async def route(body: DocumentsRequest, request: Request) -> Response:
        caller: Caller = request.scope["caller"]
        question = await asyncio.to_thread(_question, gateway, kind, body)
        if body.documents is None or len(body.documents) > gateway.config.serve.max_documents:
            batch = await accept_documents(gateway, kind, body, request)
            return JSONResponse(batch, 202)
        if body.format == "jsonl":
            lines = _lines(gateway, question, caller)
            return StreamingResponse(lines, media_type=JSONL_TYPE)
        raw = await asyncio.to_thread(question.raw, body.documents)
        rows = await gateway.answer(raw, question.config, body.text_column, caller)
        if body.format == "parquet":
            return Response(await asyncio.to_thread(parquet_bytes, rows), media_type=PARQUET_TYPE)
        return Response(
            await asyncio.to_thread(_body, gateway, kind, rows), media_type="application/json"
        )

    router.add_api_route(
        f"/{kind}",
        route,
        methods=["POST"],
        name=kind,
        responses=RESPONSES,
        summary=f"{kind.capitalize()} documents",
        description="Answer at once, or accept a batch (202) where there are many documents.",
    )


async def answer_documents(gateway: Gateway, kind: Kind, body: DocumentsRequest) -> dict[str, Any]:
    """Answer a request that is a line of a batch.

    Raises:
        ApiError: 400 where it could not be answered at once.
    """
    if body.documents is None or len(body.documents) > gateway.config.serve.max_documents:
        raise ApiError(
            400,
            f"documents must have 1 to {gateway.config.serve.max_documents} entries in a batch.",
            "invalid_value",
            param="documents",
        )
    question = await asyncio.to_thread(_question, gateway, kind, body)
    raw = await asyncio.to_thread(question.raw, body.documents)
    rows = await gateway.answer(raw, question.config, body.text_column)
    response: dict[str, Any] = json.loads(_body(gateway, kind, rows))
    return response


async def accept_documents(
    gateway: Gateway, kind: Kind, body: DocumentsRequest, request: Request
) -> dict[str, Any]:
    """Make a batch of a request with many documents, or with a file."""
    source = documents_file(body) if body.input_file_id is None else body.input_file_id
    asked = AskedBatch(
        f"/v1/{kind}",
        source,
        question=body.model_dump(mode="json", exclude={"documents", "input_file_id", "format"}),
        output_format="parquet" if body.format == "parquet" else "jsonl",
    )
    key = request.headers.get("idempotency-key")
    return await accept_batch(gateway, request.scope["caller"], asked, key)


def documents_file(body: DocumentsRequest) -> bytes:
    """Return a request's documents as the JSONL file that a batch reads."""
    rows = (
        {body.text_column: one} if isinstance(one, str) else one for one in body.documents or ()
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet_bytes(rows: pa.Table) -> bytes:
    """Return rows as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata(None), sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def jsonl_bytes(rows: pa.Table) -> bytes:
    """Return rows as lines of JSON, in the order of the documents."""
    lines = (json.dumps(row, ensure_ascii=False).encode() for row in rows.to_pylist())
    return b"".join(line + b"\n" for line in lines)


def _question(gateway: Gateway, kind: Kind, body: DocumentsRequest) -> Question:
    if body.model is not None:
        check_model(gateway, body.model)
    if (body.documents is None) == (body.input_file_id is None):
        raise ApiError(
            400, "Send either documents or input_file_id.", "invalid_value", param="documents"
        )
    return Question(gateway, kind, body)


async def _lines(gateway: Gateway, question: Question, caller: Caller) -> AsyncIterator[bytes]:
    """Yield each document's row as it is ready; a row that cannot be had is an error object."""
    room = asyncio.Semaphore(MAX_STREAMED)
    documents = question.request.documents or []
    raw = await asyncio.to_thread(question.raw, documents)

    async def answer(number: int) -> bytes:
        async with room:
            try:
                one = raw.slice(number, 1)
                rows = await gateway.answer(
                    one, question.config, question.request.text_column, caller
                )
            except ApiError as error:
                place = {"source_file": "documents", "source_row": number}
                return json.dumps({**place, **error.body}).encode() + b"\n"
            return jsonl_bytes(rows)

    running = [asyncio.ensure_future(answer(number)) for number in range(len(documents))]
    try:
        for ready in asyncio.as_completed(running):
            yield await ready
    finally:
        for call in running:
            call.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _body(gateway: Gateway, kind: Kind, rows: pa.Table) -> bytes:
    values = rows.to_pylist()
    prompt = sum(row["num_prompt_tokens"] for row in values)
    completion = sum(row["num_completion_tokens"] for row in values)
    body = {
        "object": "list",
        "task": kind,
        "model": gateway.model.name,
        "data": values,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }
    return json.dumps(body, ensure_ascii=False).encode()
