"""Local disks and S3 behind one small interface: list, read, put if absent, replace, delete.

Paths are relative to the storage's root and use `/`. Nothing here knows what the files mean.
"""

from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

from granite_ray.errors import ConfigError
from granite_ray.io.files import FileInfo, absolute
from granite_ray.io.local import LocalStorage

__all__ = ["FileInfo", "OpenedStorages", "Storage", "absolute", "open_storage"]


class Storage(Protocol):
    """A folder tree on some storage. Implementations can be pickled.

    Every method raises `StorageError` when storage fails for good (after its own bounded retries),
    `StorageDeniedError` when it refuses access, and FileNotFoundError where a file is missing.
    """

    root: str
    """The folder in full, without a slash at its end; messages name it."""
    num_retries: int
    """Calls that this object had to repeat so far, in this process."""

    def list(self, folder: str = "", *, recursive: bool = True) -> list[FileInfo]:
        """List files below `folder`, sorted by path; [] if it does not exist.

        Nothing below `folder` whose name, or whose folder's name, starts with "." or "_" is listed.
        """
        ...

    def info(self, path: str) -> FileInfo:
        """Describe one file as it is now."""
        ...

    def open(self, path: str) -> BinaryIO:
        """Open a file for random reads; they all see the version that was opened, or fail."""
        ...

    def read(self, path: str) -> tuple[bytes, str]:
        """Return a file's bytes and their version."""
        ...

    def put_if_absent(self, path: str, data: bytes | memoryview) -> None:
        """Make the file appear whole, or raise FileExistsError where it exists already.

        FileExistsError can also mean that this very call has put it: the first answer was lost and
        the call was repeated. Who must know compares the content.
        """
        ...

    def replace(self, path: str, data: bytes, expected_version: str | None) -> str:
        """Compare-and-swap: replace the file only if it is at `expected_version` (None: absent).

        Returns the new version; raises FileExistsError where another version is there, or none.
        """
        ...

    def delete(self, path: str) -> None:
        """Delete a file; no error where it is missing."""
        ...

    def sweep(self, folder: str = "") -> None:
        """Delete what killed writers left in `folder`; for the one who alone may write there."""
        ...


def open_storage(path: str) -> Storage:
    """Return the storage whose root is `path`: `s3://bucket/folder`, or a local folder."""
    if path.startswith("s3://"):
        from granite_ray.io.s3 import S3Storage  # takes a third of a second in every process

        return S3Storage(path)
    if "://" in path:
        raise ConfigError(
            f"Path {path!r} is on a storage that is not known. Write s3://bucket/folder or a "
            f"local folder."
        )
    return LocalStorage(path)


class OpenedStorages:
    """Opens storages, each once, and knows how many calls they had to repeat in all.

    Pickled, it is only what opens them: another process counts its own.
    """

    def __init__(self, open_storage: Callable[[str], Storage]) -> None:
        self._open_storage = open_storage
        self._opened: dict[str, Storage] = {}

    def __call__(self, path: str) -> Storage:
        """Return the storage whose root is `path`."""
        if path not in self._opened:
            self._opened[path] = self._open_storage(path)
        return self._opened[path]

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenedStorages, (self._open_storage,)

    @property
    def num_retries(self) -> int:
        """Calls that had to be repeated so far, in this process."""
        return sum(storage.num_retries for storage in self._opened.values())
