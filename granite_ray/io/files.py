"""What a storage says of one file, which names are hidden, and paths in full.

A ground floor of its own, so that the storages and their interface need not import each other.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file as listed.

    `version` changes whenever the content is replaced: the etag on S3, `<size>-<mtime_ns>` locally.
    """

    path: str
    size: int
    version: str


def is_hidden(name: str) -> bool:
    """Tell whether a listing passes over a file or folder of this name, as Spark does."""
    return name.startswith((".", "_"))


def absolute(path: str) -> str:
    """Return a path that means the same in every folder, without a slash at its end."""
    if "://" in path:
        return path.rstrip("/")
    # Not resolve(): a root behind a link that moves every night would change its name.
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100
