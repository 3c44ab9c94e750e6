"""A batch of requests: each line of a file is one, as OpenAI's batches have them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from granite_ray.serving.batch_store import Batch
from granite_ray.serving.batch_work import (
    PIECE_SIZE,
    Output,
    Unit,
    UnusableInputError,
    check_number,
)
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
)
from granite_ray.serving.errors import ApiError
from granite_ray.serving.gateway import Gateway
from granite_ray.serving.questions import DocumentsRequest
from granite_ray.serving.shapes import ChatRequest, CompletionRequest

MAX_PROBLEMS = 20
FIRST_STEPS = ("custom_id", "method", "url", "body")


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
        check_number(self.num_units, gateway)
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
