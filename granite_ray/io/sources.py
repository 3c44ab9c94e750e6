"""One shard → its raw rows, in the order of the input. Nothing is judged but whether it was read.

The formats stand in `parquet` and `jsonl`; the columns that are read, in `columns`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from granite_ray.config import SourceConfig
from granite_ray.errors import CorruptInputError
from granite_ray.io.columns import (
    SourceColumns,
    check_collisions,
    partition_values,
    resolve_columns,
)
from granite_ray.io.filters import row_passes
from granite_ray.io.input_files import readable, unchanged
from granite_ray.io.jsonl import read_jsonl
from granite_ray.io.parquet import read_parquet
from granite_ray.io.raw import empty_row, fill_row, raw_schema
from granite_ray.io.storage import Storage
from granite_ray.records import Shard, ShardPart

__all__ = [
    "BadFile",
    "RawShard",
    "SourceColumns",
    "check_collisions",
    "read_part",
    "read_shard",
    "resolve_columns",
]


@dataclass(frozen=True, slots=True)
class BadFile:
    """An input file that was passed over, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class RawShard:
    """A shard as read: `RAW_FIELDS` and the kept columns, and what could not be read."""

    table: pa.Table
    bad_files: tuple[BadFile, ...] = ()


def read_shard(
    storage: Storage, shard: Shard, columns: SourceColumns, source: SourceConfig
) -> RawShard:
    """Read the rows of one shard.

    A file that cannot be read stops the job or, under `source.on_bad_file: skip`, gives none of
    the rows of its part.

    Raises:
        CorruptInputError: A file cannot be read, and `source.on_bad_file` is `fail`.
        InputChangedError: A file is no longer the one that was planned.
    """
    tables = [raw_schema(columns).empty_table()]
    bad_files = []
    for part in shard.parts:
        try:
            tables += list(read_part(storage, part, columns, source))
        except CorruptInputError as error:
            if source.on_bad_file == "fail":
                raise
            bad_files.append(BadFile(part.path, str(error)))
    return RawShard(pa.concat_tables(tables), tuple(bad_files))


def read_part(
    storage: Storage, part: ShardPart, columns: SourceColumns, source: SourceConfig
) -> Iterator[pa.Table]:
    """Yield the raw rows of one row range; the last table has been read once no error came."""
    readers = {"parquet": read_parquet, "jsonl": read_jsonl, "text": _read_text}
    with unchanged(storage, part.path, part.identity), readable(part.path):
        yield from readers[source.format](storage, part, columns)


def _read_text(storage: Storage, part: ShardPart, columns: SourceColumns) -> Iterator[pa.Table]:
    """Yield the one row of a text file; all columns but the text are keys of its path."""
    from_path = partition_values(part.path)
    rows = []
    if row_passes(from_path, columns.filter):
        raw = empty_row(part.path, 0, columns)
        content = storage.read(part.path)[0] if columns.reads_text else None
        fill_row(raw, {**from_path, columns.text_column: content}, columns)
        rows.append(raw)
    yield pa.Table.from_pylist(rows, schema=raw_schema(columns))
