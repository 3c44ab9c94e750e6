"""What a plan must know of each input file: its rows, in stretches, and its columns.

Only Parquet footers are read; JSONL is counted in one pass. No document is looked at here.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from granite_ray.config import SourceConfig
from granite_ray.errors import CorruptInputError, InputChangedError, StorageError
from granite_ray.io.files import FileInfo
from granite_ray.io.lines import Stretch, read_lines, scan_lines
from granite_ray.io.storage import Storage
from granite_ray.records import ShardPart

NUM_SAMPLED_ROWS = 100
"""JSONL rows whose keys are taken to find a column that is missing everywhere."""

NUM_CHECKERS = 16


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file as planned; `schema` is known of Parquet, `sampled_keys` of JSONL."""

    path: str
    identity: str
    stretches: tuple[Stretch, ...]
    schema: pa.Schema | None = None
    sampled_keys: frozenset[str] = frozenset()

    @property
    def num_rows(self) -> int:
        return sum(stretch.num_rows for stretch in self.stretches)


def describe_file(storage: Storage, file: FileInfo, source: SourceConfig) -> InputFile:
    """Read what a plan must know of one file.

    Raises:
        CorruptInputError: The file cannot be read; names it and the reason.
        InputChangedError: It is no longer the one that was listed.
    """
    if source.format == "text":
        return InputFile(file.path, file.version, (Stretch(1, file.size),))
    with unchanged(storage, file.path, file.version), readable(file.path):
        if source.format == "parquet":
            return _describe_parquet(storage, file)
        return _describe_jsonl(storage, file, source)


@contextmanager
def unchanged(storage: Storage, path: str, identity: str) -> Iterator[None]:
    """Run a read, and refuse it where the file is not, or was not all along, the one planned.

    One look afterwards is enough: a file that had changed before would still differ now.
    """
    try:
        yield
    except (FileNotFoundError, CorruptInputError):
        _check_identity(storage, path, identity)
        raise
    _check_identity(storage, path, identity)


def check_unchanged(storage: Storage, parts: Sequence[ShardPart]) -> None:
    """Raise InputChangedError unless every file of a shard is still the one that was planned."""
    files = sorted({(part.path, part.identity) for part in parts})
    with ThreadPoolExecutor(NUM_CHECKERS) as pool:
        list(pool.map(lambda file: _check_identity(storage, *file), files))


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Tell a corrupt file from a storage that fails."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        # Arrow raises plain OSErrors for what it cannot decode; those of the system have a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"{path}: {error.strerror}.") from error
        raise CorruptInputError(
            f"Input file {path} cannot be read: {_first_line(error)}. Repair or remove it, or set "
            f"source.on_bad_file to skip."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0].rstrip(".")


def _check_identity(storage: Storage, path: str, identity: str) -> None:
    try:
        now = storage.info(path).version
    except FileNotFoundError as error:
        raise InputChangedError(f"Input file {path} is gone. Run the command again.") from error
    if now != identity:
        raise InputChangedError(
            f"Input file {path} has changed since it was planned ({identity} then, {now} now). Run "
            f"the command again."
        )


def _describe_parquet(storage: Storage, file: FileInfo) -> InputFile:
    with storage.open(file.path) as content, pq.ParquetFile(content) as parquet:
        metadata = parquet.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        stretches = tuple(Stretch(group.num_rows, group.total_byte_size) for group in groups)
        schema = parquet.schema_arrow.remove_metadata()
        return InputFile(file.path, file.version, stretches, schema)


def _describe_jsonl(storage: Storage, file: FileInfo, source: SourceConfig) -> InputFile:
    limits = source.documents_per_shard, int(source.bytes_per_shard)
    stretches = scan_lines(storage, file.path, *limits)
    sample = itertools.islice(read_lines(storage, file.path, 0, 0), NUM_SAMPLED_ROWS)
    keys = frozenset().union(*map(_keys, sample))
    return InputFile(file.path, file.version, tuple(stretches), sampled_keys=keys)


def _keys(line: bytes) -> frozenset[str]:
    """Return a row's keys; a bad row has none, and is reported when it is read."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(row) if isinstance(row, dict) else frozenset()
