"""Uploaded files and results of batches, on any storage, below a folder for each caller's name.

`<name>/files/<id>/<filename>` and `.../about.json` beside it, which appears last: without it there
is no such file. What a caller may not see, is not there.
"""

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from granite_ray.io.storage import Storage
from granite_ray.serving.errors import ApiError

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,199}")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
ABOUT = "about.json"

Purpose = Literal["batch", "batch_output"]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file as a caller sees it; `created_at` is in seconds of the epoch."""

    file_id: str
    filename: str
    num_bytes: int
    created_at: int
    purpose: Purpose

    def to_api(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """All files of all callers. Calls block; what fails for good raises `StorageError`."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def put(
        self,
        name: str,
        filename: str,
        data: bytes,
        purpose: Purpose = "batch",
        file_id: str | None = None,
    ) -> StoredFile:
        """Store a file; one with the same id, put before, is left as it is.

        Raises:
            ApiError: 400 where its name is a path, or of no kind that can be read.
        """
        _check_filename(filename)
        about = StoredFile(file_id or new_file_id(), filename, len(data), int(time.time()), purpose)
        self._put(self.folder(name, about.file_id) + filename, data)
        self._put(self.folder(name, about.file_id) + ABOUT, json.dumps(asdict(about)).encode())
        return about

    def get(self, name: str, file_id: str) -> StoredFile:
        """Describe a file.

        Raises:
            ApiError: 404 where this caller has no such file.
        """
        try:
            found, _ = self.storage.read(self.folder(name, file_id) + ABOUT)
        except FileNotFoundError:
            raise _missing(file_id) from None
        return _stored(json.loads(found))

    def read(self, name: str, file_id: str) -> bytes:
        """Return a file's content; raises as `get`."""
        about = self.get(name, file_id)
        try:
            return self.storage.read(self.folder(name, file_id) + about.filename)[0]
        except FileNotFoundError:
            raise _missing(file_id) from None

    def list(self, name: str) -> list[StoredFile]:
        """Return all files of a caller, the newest first."""
        infos = self.storage.list(f"{name}/files")
        abouts = [info.path for info in infos if info.path.endswith(f"/{ABOUT}")]
        found = [_stored(json.loads(self.storage.read(path)[0])) for path in abouts]
        return sorted(found, key=lambda one: (-one.created_at, one.file_id))

    def delete(self, name: str, file_id: str) -> None:
        """Delete a file; raises as `get`."""
        about = self.get(name, file_id)
        self.storage.delete(self.folder(name, file_id) + ABOUT)
        self.storage.delete(self.folder(name, file_id) + about.filename)

    def folder(self, name: str, file_id: str) -> str:
        """Return the folder of a file below the storage's root, with a slash at its end.

        Raises:
            ApiError: 404 where it is no id.
        """
        if not FILE_ID.fullmatch(file_id):
            raise _missing(file_id)
        return f"{name}/files/{file_id}/"

    def _put(self, path: str, data: bytes) -> None:
        try:
            self.storage.put_if_absent(path, data)
        except FileExistsError:
            return  # written by a runner that died right after


def new_file_id() -> str:
    """Return an id that cannot be guessed."""
    return f"file-{secrets.token_hex(16)}"


def file_format(filename: str) -> Literal["parquet", "jsonl"]:
    """Return how a stored file is read."""
    return "parquet" if filename.endswith(".parquet") else "jsonl"


def _stored(values: Mapping[str, Any]) -> StoredFile:
    return StoredFile(**values)


def _check_filename(filename: str) -> None:
    if not FILENAME.fullmatch(filename) or not filename.endswith(SUFFIXES):
        raise ApiError(
            400,
            f"A file's name has letters, digits, dots, dashes and spaces, no folder, and ends with "
            f"one of {', '.join(SUFFIXES)}.",
            "invalid_filename",
            param="file",
        )


def _missing(file_id: str) -> ApiError:
    shown = file_id if FILE_ID.fullmatch(file_id) else "of this id"
    return ApiError(404, f"No file {shown}.", "not_found")
