"""What is to be done for a batch: lines of requests or documents, in pieces that are stored whole.

A piece is a few units; a unit is one request or one document. Nothing here waits or tries again.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from granite_ray.cluster import Cluster
from granite_ray.config import JobSection, SourceConfig
from granite_ray.errors import CorruptInputError, GraniteRayError
from granite_ray.io.sources import read_shard
from granite_ray.io.storage import OpenedStorages, Storage, open_storage
from granite_ray.planning import InputPlan, plan_input
from granite_ray.serving.answering import rows_schema
from granite_ray.serving.batch_store import Batch
from granite_ray.serving.completions import (
    CHAT_PATH,
    TEXT_PATH,
    answer_chat,
    answer_text,
    received,
)
from granite_ray.serving.documents import (
    DOCUMENT_PATHS,
    KINDS,
    answer_documents,
    jsonl_bytes,
    parquet_bytes,
)
from granite_ray.serving.errors import ApiError
from granite_ray.serving.files import file_format
from granite_ray.serving.gateway import Gateway
from granite_ray.serving.questions import DocumentsRequest, Question
from granite_ray.serving.shapes import ChatRequest, CompletionRequest

PIECE_SIZE = 16
MAX_PROBLEMS = 20
FIRST_STEPS = ("custom_id", "method", "url", "body")

Unit = Callable[[bool], Awaitable[Any]]
"""Answers one request or document; True says that it has killed its replicas: it only fails."""


class UnusableInputError(Exception):
    """The input cannot be a batch; `problems` say why, without any text of it."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(problems[0])
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Output:
    """The files of a batch that has ended, where there is something in them."""

    results: bytes | None
    results_name: str
    errors: bytes | None = None


class BatchWork(Protocol):
    """One batch's work; methods but `units`' own calls block."""

    num_units: int
    pieces: list[str]
    """Names of the pieces, in their order; they mean the same after a restart."""

    async def answer_together(self, piece: str) -> Sequence[Any] | None:
        """Answer a piece by one call, where there is such a call."""
        ...

    def units(self, piece: str) -> Sequence[Unit]:
        """Return the units of a piece."""
        ...

    def encode(self, piece: str, answers: Sequence[Any]) -> bytes:
        """Return the answers of a piece's units as they are stored."""
        ...

    def count(self, data: bytes) -> tuple[int, int]:
        """Return how many units of a stored piece are completed and failed."""
        ...

    def assemble(self, stored: Mapping[str, bytes], unfinished: str | None) -> Output:
        """Join stored pieces; `unfinished` is the error of those that are missing."""
        ...


def open_work(gateway: Gateway, batch: Batch) -> BatchWork:
    """Read a batch's input; it blocks.

    Raises:
        UnusableInputError: It cannot be a batch.
        StorageError: It cannot be read now.
    """
    try:
        if batch.question is None:
            return RequestWork(gateway, batch)
        return DocumentWork(gateway, batch)
    except ApiError as error:
        raise UnusableInputError([error.message]) from error


# requests ────────────────────────────────────────────────────────────────────────────────────────


class RequestWork:
    """A batch of requests, one a line."""

    def __init__(self, gateway: Gateway, batch: Batch) -> None:
        self._gateway = gateway
        self._batch = batch
        about = gateway.files.get(batch.name, batch.input_file_id)
        if not about.filename.endswith(".jsonl"):
            raise UnusableInputError(["The file of a batch of requests must be .jsonl."])
        data = gateway.files.read(batch.name, batch.input_file_id)
        self._requests = _read_requests(data, batch.endpoint)
        self.num_units = len(self._requests)
        _check_number(self.num_units, gateway)
        starts = range(0, self.num_units, PIECE_SIZE)
        self.pieces = [f"{start:08d}.json" for start in starts]

    async def answer_together(self, piece: str) -> Sequence[Any] | None:  # noqa: ARG002
        return None

    def units(self, piece: str) -> Sequence[Unit]:
        start = int(piece.partition(".")[0])
        return [self._unit(request) for request in self._requests[start : start + PIECE_SIZE]]

    def encode(self, piece: str, answers: Sequence[Any]) -> bytes:  # noqa: ARG002 - as the other
        return json.dumps(answers).encode()

    def count(self, data: bytes) -> tuple[int, int]:
        failed = sum(_is_failed(answer) for answer in json.loads(data))
        return len(json.loads(data)) - failed, failed

    def assemble(self, stored: Mapping[str, bytes], unfinished: str | None) -> Output:
        answers = [
            answer for piece in self.pieces for answer in json.loads(stored.get(piece, "[]"))
        ]
        if unfinished is not None:
            answered = {answer["custom_id"] for answer in answers}
            answers += [
                self._line(request, None, {"code": unfinished, "message": "It was not answered."})
                for request in self._requests
                if request["custom_id"] not in answered
            ]
        good = [answer for answer in answers if not _is_failed(answer)]
        bad = [answer for answer in answers if _is_failed(answer)]
        return Output(_lines(good), f"{self._batch.batch_id}_output.jsonl", _lines(bad))

    def _unit(self, request: Mapping[str, Any]) -> Unit:
        async def answer(is_deadly: bool) -> dict[str, Any]:
            status = 200
            try:
                if is_deadly:
                    raise ApiError(500, "The request killed its replica twice.", "replica_death")
                body = await self._answer(request["body"])
            except ApiError as error:
                if error.status in (429, 503, 504):
                    raise
                status, body = error.status, error.body
            return self._line(request, {"status_code": status, "body": body}, None)

        return answer

    async def _answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if body.get("stream"):
            raise ApiError(400, "stream cannot be used in a batch.", "invalid_value")
        endpoint = self._batch.endpoint
        if endpoint == CHAT_PATH:
            return await answer_chat(self._gateway, received(ChatRequest, body), None)
        if endpoint == TEXT_PATH:
            return await answer_text(self._gateway, received(CompletionRequest, body), None)
        kind = KINDS[DOCUMENT_PATHS.index(endpoint)]
        return await answer_documents(self._gateway, kind, received(DocumentsRequest, body))

    def _line(
        self,
        request: Mapping[str, Any],
        response: dict[str, Any] | None,
        error: dict[str, Any] | None,
    ) -> dict[str, Any]:
        name = f"{self._batch.batch_id} {request['custom_id']}"
        digest = hashlib.sha256(name.encode()).hexdigest()[:24]
        if response is not None:
            response = {**response, "request_id": f"req_{digest}"}
        return {
            "id": f"batch_req_{digest}",
            "custom_id": request["custom_id"],
            "response": response,
            "error": error,
        }


def _read_requests(data: bytes, endpoint: str) -> list[dict[str, Any]]:
    requests: list[dict[str, Any]] = []
    problems: list[str] = []
    ids: set[str] = set()
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        problem, request = _read_request(line, endpoint, ids)
        if problem is not None:
            problems.append(f"Line {number}: {problem}")
        if len(problems) == MAX_PROBLEMS:
            break
        requests.append(request)
    if problems:
        raise UnusableInputError(problems)
    return requests


def _read_request(line: bytes, endpoint: str, ids: set[str]) -> tuple[str | None, dict[str, Any]]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return "it is not valid JSON.", {}
    if not isinstance(request, dict) or set(request) != set(FIRST_STEPS):
        return f"it must be an object with {', '.join(FIRST_STEPS)}.", {}
    custom_id = request["custom_id"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        return "custom_id must be a string of 1 to 512 characters.", {}
    if custom_id in ids:
        return "its custom_id stands in an earlier line too.", {}
    if (request["method"], request["url"]) != ("POST", endpoint):
        return f"method and url must be POST and {endpoint}.", {}
    if not isinstance(request["body"], dict):
        return "body must be an object.", {}
    ids.add(custom_id)
    return None, request


def _is_failed(answer: Mapping[str, Any]) -> bool:
    response = answer["response"]
    return response is None or response["status_code"] != 200


def _lines(answers: Sequence[Mapping[str, Any]]) -> bytes | None:
    if not answers:
        return None
    return b"".join(json.dumps(answer).encode() + b"\n" for answer in answers)


# documents ───────────────────────────────────────────────────────────────────────────────────────


class DocumentWork:
    """A batch of documents in a file, read as a job reads it."""

    def __init__(self, gateway: Gateway, batch: Batch) -> None:
        self._gateway = gateway
        self._batch = batch
        about = gateway.files.get(batch.name, batch.input_file_id)
        storage = gateway.files.storage
        folder = gateway.files.folder(batch.name, batch.input_file_id)
        request = DocumentsRequest.model_validate(batch.question)
        kind = KINDS[DOCUMENT_PATHS.index(batch.endpoint)]
        self._question = Question(gateway, kind, request)
        self._source = SourceConfig(
            path=(f"{storage.root}/{folder}{about.filename}",),
            format=file_format(about.filename),
            text_column=request.text_column,
            id_column=request.id_column,
            keep_columns=tuple(request.keep_columns),
            documents_per_shard=PIECE_SIZE,
        )
        self._storages = OpenedStorages(open_storage)
        self._plan = _plan(self._source, self._question, self._storages, gateway)
        self._shards = {shard.shard_id: shard for shard in self._plan.shards}
        self.num_units = self._plan.num_documents
        _check_number(self.num_units, gateway)
        self.pieces = [shard.shard_id for shard in self._plan.shards]

    async def answer_together(self, piece: str) -> Sequence[Any] | None:
        raw = await asyncio.to_thread(self._read, piece)
        return [await self._unit(raw)(False)]

    def units(self, piece: str) -> Sequence[Unit]:
        raw = self._read(piece)
        return [self._unit(raw.slice(row, 1)) for row in range(raw.num_rows)]

    def encode(self, piece: str, answers: Sequence[Any]) -> bytes:  # noqa: ARG002 - as the other
        return parquet_bytes(pa.concat_tables([self._empty(), *answers]))

    def count(self, data: bytes) -> tuple[int, int]:
        statuses = _table(data)["status"].to_pylist()
        return statuses.count("ok"), statuses.count("failed")

    def assemble(self, stored: Mapping[str, bytes], unfinished: str | None) -> Output:  # noqa: ARG002
        tables = [_table(stored[piece]) for piece in self.pieces if piece in stored]
        rows = pa.concat_tables([self._empty(), *tables])
        is_parquet = self._batch.output_format == "parquet"
        data = parquet_bytes(rows) if is_parquet else jsonl_bytes(rows)
        ending = "parquet" if is_parquet else "jsonl"
        return Output(data, f"{self._batch.batch_id}_output.{ending}")

    def _read(self, piece: str) -> pa.Table:
        storage: Storage = self._storages(self._plan.root)
        return read_shard(storage, self._shards[piece], self._plan.columns, self._source).table

    def _unit(self, raw: pa.Table) -> Unit:
        async def answer(is_deadly: bool) -> pa.Table:
            config, column = self._question.config, self._question.request.text_column
            return await self._gateway.answer(raw, config, column, is_deadly=is_deadly)

        return answer

    def _empty(self) -> pa.Table:
        keep_fields = self._plan.columns.keep_fields
        schema = rows_schema(self._question.task, keep_fields, self._gateway.model.name)
        return schema.remove_metadata().empty_table()


def _plan(
    source: SourceConfig, question: Question, storages: OpenedStorages, gateway: Gateway
) -> InputPlan:
    try:
        # A file within the limits is scanned here; Ray is never asked for it.
        cluster = Cluster(JobSection(), gateway.config.engine)
        return plan_input(source, sorted(question.columns.prompt_columns), storages, cluster)
    except CorruptInputError as error:
        raise UnusableInputError(["The file cannot be read in the format of its name."]) from error
    except GraniteRayError as error:
        if error.exit_code != 2:
            raise
        words = str(error).replace(source.path[0], "the file")
        raise UnusableInputError([words]) from error


def _table(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data)).replace_schema_metadata(None)


def _check_number(number: int, gateway: Gateway) -> None:
    most = gateway.config.serve.max_batch_requests
    if not 0 < number <= most:
        raise UnusableInputError([f"The file has {number:,} entries; 1 to {most:,} make a batch."])
