"""Local disks and S3 behind one small interface: list, read, put if absent, replace, delete.

Paths are relative to the storage's root and use `/`. Nothing here knows what the files mean.
"""

from dataclasses import dataclass
from typing import BinaryIO, Protocol


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file as listed.

    `version` changes whenever the content is replaced: the etag on S3, `<size>-<mtime_ns>` locally.
    """

    path: str
    size: int
    version: str


class Storage(Protocol):
    """A folder tree on some storage. Implementations can be pickled.

    Every method raises `StorageError` when storage fails for good (after its own bounded retries),
    `StorageDeniedError` when it refuses access, and FileNotFoundError where a file is missing.
    """

    root: str
    """The folder as the user spelled it; messages name it."""

    def list(self, folder: str = "", *, recursive: bool = True) -> list[FileInfo]:
        """List files below `folder`, sorted by path; nothing hidden, [] if it does not exist."""
        ...

    def info(self, path: str) -> FileInfo:
        """Describe one file as it is now."""
        ...

    def open(self, path: str) -> BinaryIO:
        """Open a file for random reads."""
        ...

    def read(self, path: str) -> tuple[bytes, str]:
        """Return a file's bytes and their version."""
        ...

    def put_if_absent(self, path: str, data: bytes | memoryview) -> None:
        """Make the file appear whole, or raise FileExistsError where it exists already."""
        ...

    def replace(self, path: str, data: bytes, expected_version: str | None) -> str:
        """Compare-and-swap: replace the file only if it is at `expected_version` (None: absent).

        Returns the new version; raises FileExistsError where another version is there.
        """
        ...

    def delete(self, path: str) -> None:
        """Delete a file; no error where it is missing."""
        ...


def open_storage(path: str) -> Storage:
    """Return the storage whose root is `path`: `s3://bucket/folder`, or a local folder."""
    raise NotImplementedError(path)
