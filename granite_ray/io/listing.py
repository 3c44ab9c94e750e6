"""What `source.path` names, as a sorted list of files below one root. Nothing here opens a file.

A folder gives the files of its tree whose ending suits `source.format`. A file, or one that a glob
matches, is taken as it is. Names that start with "." or "_" are passed over in folders and globs.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from granite_ray.config import SourceConfig
from granite_ray.errors import ConfigError, StorageDeniedError
from granite_ray.io.files import FileInfo
from granite_ray.io.storage import Storage, absolute, open_storage

ENDINGS: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".pq"),
    "jsonl": tuple(
        kind + packing for kind in (".jsonl", ".ndjson", ".json") for packing in ("", ".gz", ".zst")
    ),
    "text": (".txt", ".text", ".md", ".markdown", ".rst"),
}
"""Which files of a folder are input; a file of another ending is reached by name or by a glob."""

S3 = "s3://"


@dataclass(frozen=True, slots=True)
class InputListing:
    """The input as it was at one moment: files relative to `root`, sorted, each once."""

    root: str
    files: tuple[FileInfo, ...]


def list_input(
    source: SourceConfig, open_storage: Callable[[str], Storage] = open_storage
) -> InputListing:
    """List the files that `source.path` names.

    The root is the deepest folder common to the paths' parts before their first wildcard: it does
    not depend on which files exist today, so that a new file leaves the other files' names alone.

    Raises:
        ConfigError: Nothing found, or no access; names the path.
    """
    try:
        return _list_input(source, open_storage)
    except StorageDeniedError as error:
        raise ConfigError(f"source.path: {error}") from error


def _list_input(source: SourceConfig, open_storage: Callable[[str], Storage]) -> InputListing:
    paths = [absolute(path) for path in source.path]
    top = _open_top(paths, source, open_storage)
    selections = [_select(path, top, source) for path in paths]
    root = _common_folder([folder for folder, _ in selections])
    skip = len(_within(root, top.root))
    files = {
        info.path: FileInfo(info.path[skip:].lstrip("/"), info.size, info.version)
        for _, found in selections
        for info in found
    }
    _refuse_unwritable_names(files)
    return InputListing(root, tuple(files[path] for path in sorted(files)))


def _open_top(
    paths: Sequence[str], source: SourceConfig, open_storage: Callable[[str], Storage]
) -> Storage:
    """Open the storage above all paths: one that the listing can name every path in."""
    if len({path.startswith(S3) for path in paths}) > 1:
        raise ConfigError(f"source.path mixes local paths and s3://: {list(source.path)}.")
    buckets = {_bucket(path) for path in paths}
    if len(buckets) > 1:
        raise ConfigError(f"source.path names several buckets {sorted(buckets)}; use one a job.")
    return open_storage(buckets.pop() or "/")


def _select(path: str, top: Storage, source: SourceConfig) -> tuple[str, list[FileInfo]]:
    """Return the folder that a path is about, and its files relative to `top`."""
    if _has_wildcard(path):
        folder, found = _match_glob(path, top, source)
    else:
        folder, found = _file_or_folder(path, top, source)
    if not found:
        raise ConfigError(
            f"source.path {path!r} names no file to read. For source.format {source.format!r} a "
            f"folder's files must end in one of {', '.join(ENDINGS[source.format])}; name other "
            f"files by a glob."
        )
    return folder, found


def _file_or_folder(path: str, top: Storage, source: SourceConfig) -> tuple[str, list[FileInfo]]:
    inner = _within(path, top.root)
    if inner:
        try:
            return path.rpartition("/")[0], [top.info(inner)]
        except FileNotFoundError:
            pass  # a folder, or missing
    return path, [info for info in top.list(inner) if _is_input(info.path, source)]


def _match_glob(path: str, top: Storage, source: SourceConfig) -> tuple[str, list[FileInfo]]:
    folder = _before_wildcard(path)
    pattern = _glob_pattern(_within(path, top.root))
    found = []
    for info in top.list(_within(folder, top.root)):
        is_match = pattern.fullmatch(info.path) is not None
        if is_match or (_is_input(info.path, source) and _has_match_above(pattern, info.path)):
            found.append(info)
    return folder, found


def _has_match_above(pattern: re.Pattern[str], path: str) -> bool:
    """Tell whether a glob matches a folder that the file is in."""
    return any(pattern.fullmatch(folder) for folder in _folders_above(path))


def _folders_above(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """Translate `*` and `?` (within a name) and `**` (any number of folders)."""
    translated = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(translated.get(piece, re.escape(piece)) for piece in pieces), re.S)


def _is_input(path: str, source: SourceConfig) -> bool:
    return path.lower().endswith(ENDINGS[source.format])


def _has_wildcard(path: str) -> bool:
    return "*" in path or "?" in path


def _before_wildcard(path: str) -> str:
    names = path.split("/")
    first = next(index for index, name in enumerate(names) if _has_wildcard(name))
    return "/".join(names[:first])


def _bucket(path: str) -> str:
    return S3 + path.removeprefix(S3).partition("/")[0] if path.startswith(S3) else ""


def _within(path: str, top: str) -> str:
    return path.removeprefix(top).strip("/")


def _common_folder(folders: Sequence[str]) -> str:
    levels = zip(*(folder.split("/") for folder in folders), strict=False)
    common = itertools.takewhile(lambda names: len(set(names)) == 1, levels)
    return "/".join(names[0] for names in common) or "/"


def _refuse_unwritable_names(paths: dict[str, FileInfo]) -> None:
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"source.path has a file whose name is not valid UTF-8: {path!r}. Rename it."
            ) from error
