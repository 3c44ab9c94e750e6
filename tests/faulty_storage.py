"""A storage in memory that fails, or loses its driver, at any call that a test chooses."""

import io
import itertools
import threading
from typing import Any, BinaryIO, Literal

from granite_ray.errors import StorageError
from granite_ray.io.files import FileInfo, is_hidden

Fault = Literal["fails", "answer_lost", "repeated", "dies_before", "dies_after"]
FAULTS: tuple[Fault, ...] = ("fails", "answer_lost", "repeated", "dies_before", "dies_after")
"""A call fails; it is done but fails; it is done, its answer lost, and it is done again; the
process dies before it or after it."""


class DriverDiedError(BaseException):
    """What stands for `kill -9`: nothing catches it, and the storage answers no more."""


class MemoryStorage:
    """What `Storage` promises, in a dictionary."""

    root = "memory"
    num_retries = 0

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str]] = {}
        self._versions = itertools.count()
        self._lock = threading.Lock()

    def list(self, folder: str = "", *, recursive: bool = True) -> list[FileInfo]:
        prefix = f"{folder.strip('/')}/" if folder else ""
        names = sorted(path for path in self.files if path.startswith(prefix))
        return [
            self.info(path)
            for path in names
            if not any(is_hidden(part) for part in path.removeprefix(prefix).split("/"))
            and (recursive or "/" not in path.removeprefix(prefix))
        ]

    def info(self, path: str) -> FileInfo:
        data, version = self.read(path)
        return FileInfo(path, len(data), version)

    def open(self, path: str) -> BinaryIO:
        return io.BytesIO(self.read(path)[0])

    def read(self, path: str) -> tuple[bytes, str]:
        try:
            return self.files[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def put_if_absent(self, path: str, data: bytes | memoryview) -> None:
        self.replace(path, bytes(data), None)

    def replace(self, path: str, data: bytes, expected_version: str | None) -> str:
        with self._lock:
            if self.files.get(path, (b"", None))[1] != expected_version:
                raise FileExistsError(path)
            version = str(next(self._versions))
            self.files[path] = (data, version)
        return version

    def delete(self, path: str) -> None:
        self.files.pop(path, None)

    def sweep(self, folder: str = "") -> None:
        """Nothing is ever left half-written here."""


class FaultyStorage:
    """A storage as one run sees it, with at most one fault: at its `at`-th call, from 0."""

    def __init__(self, inner: MemoryStorage, at: int | None = None, fault: Fault = "fails") -> None:
        self.root = inner.root
        self.num_retries = 0
        self.num_calls = 0
        self._inner = inner
        self._at = at
        self._fault = fault
        self._is_dead = False
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                number = self.num_calls
                self.num_calls += 1
                return self._call(number, lambda: method(*arguments, **options), name)

        return call

    def _call(self, number: int, do: Any, name: str) -> Any:
        if self._is_dead:
            raise DriverDiedError
        if number != self._at:
            return do()
        if self._fault == "fails":
            raise StorageError(f"{name}: no answer")
        self._is_dead = self._fault in ("dies_before", "dies_after")
        if self._fault == "dies_before":
            raise DriverDiedError
        answer = do()
        if self._fault == "answer_lost":
            raise StorageError(f"{name}: the answer was lost")
        if self._fault == "dies_after":
            raise DriverDiedError
        # Storages know a repeated `replace` as their own; of a repeated put they only say that the
        # file is there.
        return answer if name == "replace" else do()
