"""Batches as they lie in the storage, so that a restart finds all that was accepted.

<name>/batches/<id>/batch.json     what was asked: written once
<name>/batches/<id>/state.json     how far it is: replaced by the one who runs it
<name>/batches/<id>/cancel.json    there once it was cancelled
<name>/batches/<id>/ended.json     there once it has ended, so that a listing tells
<name>/batches/<id>/pieces/…       answers so far, each put once
<name>/idempotency/<digest>.json   which batch a key of the caller's stands for
"""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from granite_ray.io.storage import Storage
from granite_ray.serving.errors import ApiError

BATCH_ID = re.compile(r"batch_[0-9a-f]{12}[0-9a-f]{20}")

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
]
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(frozen=True, slots=True)
class Batch:
    """What was asked; `name` is the caller's. Times are seconds of the epoch.

    Of requests: `input_file_id` holds one a line. Of documents: it holds them, `question` what is
    asked of each, as `routes_tasks` reads it, and `output_format` how the rows are wanted.
    """

    name: str
    batch_id: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: float
    metadata: Mapping[str, str] | None = None
    question: Mapping[str, Any] | None = None
    output_format: Literal["jsonl", "parquet"] = "jsonl"

    @property
    def folder(self) -> str:
        """Its folder below the storage's root, with a slash at its end."""
        return f"{self.name}/batches/{self.batch_id}/"


@dataclass(frozen=True, slots=True)
class BatchState:
    """How far a batch is."""

    status: Status = "validating"
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    problems: tuple[str, ...] = ()
    at: Mapping[str, int] = field(default_factory=dict)
    """When it came to each status."""

    def moved(self, status: Status, **values: Any) -> "BatchState":
        """Return the state with another status, which it has from now on."""
        return replace(self, status=status, at={status: int(time.time()), **self.at}, **values)


class BatchStore:
    """All batches of all callers. Calls block; what fails for good raises `StorageError`."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def create(self, batch: Batch, key: str | None, body: Mapping[str, Any]) -> Batch:
        """Accept a batch, or return the one that the same caller's key stands for already.

        Raises:
            ApiError: 409 where that one was asked for with another body.
        """
        if key is not None:
            path = _key_path(batch.name, key)
            self._put(path, {"body": _body_digest(body), "batch_id": batch.batch_id})
            batch = replace(batch, batch_id=self._claimed(path, body) or batch.batch_id)
        self._put(batch.folder + "batch.json", asdict(batch))
        return self.get(batch.name, batch.batch_id)

    def known(self, name: str, key: str | None, body: Mapping[str, Any]) -> Batch | None:
        """Return the batch that a caller's key stands for already; raises as `create`."""
        batch_id = self._claimed(_key_path(name, key), body) if key is not None else None
        try:
            return None if batch_id is None else self.get(name, batch_id)
        except ApiError:
            return None  # who claimed the key died before the batch was stored

    def get(self, name: str, batch_id: str) -> Batch:
        """Return what was asked.

        Raises:
            ApiError: 404 where this caller has no such batch.
        """
        if BATCH_ID.fullmatch(batch_id):
            try:
                data, _ = self.storage.read(f"{name}/batches/{batch_id}/batch.json")
                return Batch(**json.loads(data))
            except FileNotFoundError:
                pass
        raise ApiError(404, "No batch of this id.", "not_found")

    def state(self, batch: Batch) -> BatchState:
        """Return how far a batch is."""
        return self._state(batch)[0]

    def write_state(self, batch: Batch, state: BatchState) -> None:
        """Say how far a batch is; for the one who runs it."""
        _, version = self._state(batch)
        data = json.dumps(asdict(state)).encode()
        self.storage.replace(batch.folder + "state.json", data, version)
        if state.status in ENDED:
            self._put(batch.folder + "ended.json", {})

    def cancel(self, batch: Batch) -> None:
        """Ask that a batch be cancelled."""
        self._put(batch.folder + "cancel.json", {})

    def is_cancelled(self, batch: Batch) -> bool:
        """Tell whether that was asked."""
        try:
            self.storage.info(batch.folder + "cancel.json")
        except FileNotFoundError:
            return False
        return True

    def ids(self, name: str) -> list[str]:
        """Return the ids of a caller's batches, the newest first."""
        infos = self.storage.list(f"{name}/batches")
        names = [info.path.split("/") for info in infos if info.path.endswith("/batch.json")]
        return sorted((parts[2] for parts in names), reverse=True)

    def unfinished_ids(self, name: str) -> list[str]:
        """Return the ids of a caller's batches that have not ended, the oldest first."""
        infos = self.storage.list(f"{name}/batches")
        paths = {info.path for info in infos}
        begun = (path.removesuffix("batch.json") for path in paths if path.endswith("/batch.json"))
        return sorted(path.split("/")[2] for path in begun if f"{path}ended.json" not in paths)

    def unfinished(self, names: Iterable[str]) -> list[Batch]:
        """Return the batches of these callers that have not ended, the oldest first."""
        found = [self.get(name, one) for name in names for one in self.unfinished_ids(name)]
        return sorted(found, key=lambda batch: batch.batch_id)

    def put_piece(self, batch: Batch, piece: str, data: bytes) -> None:
        """Store the answers of one piece; who comes second changes nothing."""
        try:
            self.storage.put_if_absent(f"{batch.folder}pieces/{piece}", data)
        except FileExistsError:
            return

    def pieces(self, batch: Batch) -> dict[str, bytes]:
        """Return all pieces that are there, by name."""
        folder = f"{batch.folder}pieces"
        return {
            info.path.rpartition("/")[2]: self.storage.read(info.path)[0]
            for info in self.storage.list(folder)
        }

    def drop_pieces(self, batch: Batch) -> None:
        """Delete the pieces, once their output is a file."""
        for info in self.storage.list(f"{batch.folder}pieces"):
            self.storage.delete(info.path)

    def _claimed(self, path: str, body: Mapping[str, Any]) -> str | None:
        try:
            claimed = json.loads(self.storage.read(path)[0])
        except FileNotFoundError:
            return None
        if claimed["body"] != _body_digest(body):
            raise ApiError(
                409,
                "This Idempotency-Key came with another body before. Use a new key.",
                "idempotency_conflict",
            )
        return str(claimed["batch_id"])

    def _state(self, batch: Batch) -> tuple[BatchState, str | None]:
        try:
            data, version = self.storage.read(batch.folder + "state.json")
        except FileNotFoundError:
            return BatchState(), None
        return BatchState(**json.loads(data)), version

    def _put(self, path: str, values: Mapping[str, Any]) -> None:
        try:
            self.storage.put_if_absent(path, json.dumps(values).encode())
        except FileExistsError:
            return


def new_batch_id() -> str:
    """Return an id that cannot be guessed; later ones sort after earlier ones."""
    return f"batch_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def batch_to_api(batch: Batch, state: BatchState, *, is_cancelled: bool) -> dict[str, Any]:
    """Return OpenAI's batch object."""
    status = state.status
    if is_cancelled and status not in ENDED:
        status = "cancelling"
    problems = [
        {"code": "invalid_input", "message": problem, "param": None, "line": None}
        for problem in state.problems
    ]
    return {
        "id": batch.batch_id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": status,
        "output_file_id": state.output_file_id,
        "error_file_id": state.error_file_id,
        "created_at": batch.created_at,
        "expires_at": int(batch.expires_at),
        "in_progress_at": state.at.get("in_progress"),
        "finalizing_at": state.at.get("finalizing"),
        "completed_at": state.at.get("completed"),
        "failed_at": state.at.get("failed"),
        "expired_at": state.at.get("expired"),
        "cancelling_at": state.at.get("cancelling"),
        "cancelled_at": state.at.get("cancelled"),
        "request_counts": {
            "total": state.num_total,
            "completed": state.num_completed,
            "failed": state.num_failed,
        },
        "metadata": batch.metadata,
        "errors": {"object": "list", "data": problems} if problems else None,
    }


def _key_path(name: str, key: str) -> str:
    return f"{name}/idempotency/{hashlib.sha256(key.encode()).hexdigest()}.json"


def _body_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
