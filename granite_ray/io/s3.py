"""The storage on S3: conditional requests, explicit time-outs, bounded and counted retries.

s3fs brings the session and the event loop; the requests are the client's own, so that each error
is seen as the server sent it. Endpoint, region and credentials come from the usual AWS places.
"""

import asyncio
import io
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import s3fs
from aiohttp import ClientError as ConnectionBrokenError
from botocore.exceptions import (  # type: ignore[import-untyped]  # it ships none
    BotoCoreError,
    ClientError,
    HTTPClientError,
    ResponseStreamingError,
)
from botocore.exceptions import ConnectionError as NotConnectedError
from fsspec.asyn import sync

from granite_ray.errors import InputChangedError, StorageDeniedError, StorageError
from granite_ray.io.files import FileInfo, is_hidden

READ_BUFFER_BYTES = 2 * 1024**2
"""One request of a file read in small steps: large beside the latency, small beside a row group."""

MAX_CONNECTIONS = 32
"""Requests of one process that the server sees at once, at most."""

UNKNOWN_SIZE_BYTES = 16 * 1024**2
"""What a call whose size is not known in advance gets the time for."""
MIN_BYTES_PER_S = 250_000
"""The slowest connection worth waiting for."""

DENIED_STATUS = (401, 403)
DENIED_CODES = ("NoSuchBucket", "ExpiredToken", "InvalidToken", "InvalidAccessKeyId")
RETRIED_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
RETRIED_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest")
BROKEN_CONNECTION = (
    HTTPClientError,
    NotConnectedError,
    ResponseStreamingError,
    ConnectionBrokenError,
    TimeoutError,
    ConnectionError,
)

Request = Callable[[Any], Awaitable[Any]]
"""What to ask of a client of aiobotocore."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a call may take, and how often it is repeated.

    The waits are random below a bound that doubles from `first_wait_s` to `max_wait_s`. By default
    a server that refuses every call is given up after at most 32 s, a silent one after 5 min.
    """

    max_attempts: int = 8
    first_wait_s: float = 0.25
    max_wait_s: float = 8.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 25.0

    def attempt_s(self, num_bytes: int) -> float:
        """Return the seconds that one attempt may take in all.

        The client's own time-outs do not cover every wait: one for the answer to a body that the
        server has asked for (100-continue) was seen to last for ever.
        """
        return self.connect_timeout_s + self.read_timeout_s + num_bytes / MIN_BYTES_PER_S

    def wait_s(self, attempt: int) -> float:
        """Draw the seconds to wait after an attempt; the first is number 1."""
        bound_s = min(self.first_wait_s * 2 ** (attempt - 1), self.max_wait_s)
        return random.uniform(bound_s / 4, bound_s)


class S3Storage:
    """A bucket, or a folder of one."""

    def __init__(self, path: str, policy: RetryPolicy = RetryPolicy()) -> None:
        self._policy = policy
        self._bucket, _, folder = path.removeprefix("s3://").partition("/")
        self._prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        self.root = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self.num_retries = 0

    def __reduce__(self) -> tuple[type["S3Storage"], tuple[str, RetryPolicy]]:
        return S3Storage, (self.root, self._policy)

    def list(self, folder: str = "", *, recursive: bool = True) -> list[FileInfo]:
        prefix = self._prefix + (f"{folder.strip('/')}/" if folder else "")
        request = {"Bucket": self._bucket, "Prefix": prefix}
        if not recursive:
            request["Delimiter"] = "/"
        found: list[FileInfo] = []
        while True:
            page = self._call(prefix, lambda client: client.list_objects_v2(**request))
            found += [self._listed(entry) for entry in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                break
            request["ContinuationToken"] = page["NextContinuationToken"]
        skip = len(prefix) - len(self._prefix)
        return sorted(
            (info for info in found if _is_visible_file(info.path[skip:])),
            key=lambda info: info.path,
        )

    def info(self, path: str) -> FileInfo:
        head = self._call(path, lambda client: client.head_object(**self._object(path)))
        return FileInfo(path, head["ContentLength"], head["ETag"].strip('"'))

    def open(self, path: str) -> BinaryIO:
        return io.BufferedReader(_RangeReader(self, self.info(path)), READ_BUFFER_BYTES)

    def read(self, path: str) -> tuple[bytes, str]:
        async def request(client: Any) -> tuple[bytes, str]:
            answer = await client.get_object(**self._object(path))
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"].strip('"')

        content, version = self._call(path, request, num_bytes=UNKNOWN_SIZE_BYTES)
        return content, version

    def read_range(self, info: FileInfo, start: int, stop: int) -> bytes:
        """Return bytes of one version of a file; another version raises InputChangedError."""

        async def request(client: Any) -> bytes:
            answer = await client.get_object(
                **self._object(info.path), Range=f"bytes={start}-{stop - 1}", IfMatch=info.version
            )
            async with answer["Body"] as body:
                return bytes(await body.read())

        try:
            return bytes(self._call(info.path, request, num_bytes=stop - start))
        except FileExistsError as error:
            raise InputChangedError(f"{self.root}/{info.path} was replaced while read.") from error

    def put_if_absent(self, path: str, data: bytes | memoryview) -> None:
        self._put(path, bytes(data), IfNoneMatch="*")

    def replace(self, path: str, data: bytes, expected_version: str | None) -> str:
        condition = {"IfMatch": expected_version} if expected_version else {"IfNoneMatch": "*"}
        try:
            return self._put(path, data, **condition)
        except FileNotFoundError as error:
            raise FileExistsError(f"{self.root}/{path} is no longer there") from error
        except FileExistsError:
            # It may be this very call that put it, and was repeated when its answer was lost.
            with suppress(FileNotFoundError):
                found, version = self.read(path)
                if found == data:
                    return version
            raise

    def delete(self, path: str) -> None:
        self._call(path, lambda client: client.delete_object(**self._object(path)))

    def sweep(self, folder: str = "") -> None:
        """Do nothing: a broken-off PUT leaves no object."""

    def _put(self, path: str, data: bytes, **condition: str) -> str:
        answer = self._call(
            path,
            lambda client: client.put_object(**self._object(path), Body=data, **condition),
            num_bytes=len(data),
        )
        return str(answer["ETag"].strip('"'))

    def _object(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + path}

    def _listed(self, entry: dict[str, Any]) -> FileInfo:
        path = entry["Key"].removeprefix(self._prefix)
        return FileInfo(path, entry["Size"], entry["ETag"].strip('"'))

    def _call(self, path: str, request: Request, num_bytes: int = 0) -> Any:
        filesystem = _connect(self._policy, os.getpid())
        place, limit_s = f"{self.root}/{path}", self._policy.attempt_s(num_bytes)
        return sync(filesystem.loop, self._ask, filesystem, place, request, limit_s)

    async def _ask(self, filesystem: Any, place: str, request: Request, limit_s: float) -> Any:
        """Send one request until it is answered; runs on the one thread of s3fs's event loop."""
        for attempt in range(1, self._policy.max_attempts + 1):
            try:
                async with asyncio.timeout(limit_s):
                    return await request(await filesystem.set_session())
            except (ClientError, BotoCoreError, *BROKEN_CONNECTION) as error:
                refusal = _refusal(error, place)
                if refusal:
                    raise refusal from error
                last_error = error
            if attempt < self._policy.max_attempts:
                self.num_retries += 1
                await asyncio.sleep(self._policy.wait_s(attempt))
        raise StorageError(
            f"{place}: no success in {self._policy.max_attempts} attempts; the last one: "
            f"{str(last_error) or repr(last_error)}"
        ) from last_error


@lru_cache(maxsize=8)
def _connect(policy: RetryPolicy, owner_pid: int) -> Any:  # noqa: ARG001
    """Return a process's connection; it takes 0.3 s to make, and one through a fork is dead."""
    return s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": policy.connect_timeout_s,
            "read_timeout": policy.read_timeout_s,
            "max_pool_connections": MAX_CONNECTIONS,
            # We retry, and count.
            "retries": {"mode": "standard", "total_max_attempts": 1},
        },
    )


class _RangeReader(io.RawIOBase):
    """One version of an object as a file: each read is a request of its own."""

    def __init__(self, storage: S3Storage, info: FileInfo) -> None:
        self._storage = storage
        self._info = info
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._info.size)
        if stop <= self._position:
            return 0
        data = self._storage.read_range(self._info, self._position, stop)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def _is_visible_file(path: str) -> bool:
    """Tell whether a key below the listed folder is a file that listings show."""
    return not path.endswith("/") and not any(is_hidden(name) for name in path.split("/"))


def _refusal(error: Exception, place: str) -> Exception | None:
    """Say what a failed request means; None where it is worth repeating."""
    if isinstance(error, BROKEN_CONNECTION):
        return None
    answer = getattr(error, "response", {})
    code = str(answer.get("Error", {}).get("Code", ""))
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status is None or status in DENIED_STATUS or code in DENIED_CODES:
        return StorageDeniedError(f"{place}: {error}. Check the bucket, credentials and rights.")
    if status == 404:
        return FileNotFoundError(f"{place} is not a file")
    if status == 412:
        return FileExistsError(f"{place} exists already, or is at another version")
    if status in RETRIED_STATUS or code in RETRIED_CODES:
        return None
    return StorageError(f"{place}: {error}")
