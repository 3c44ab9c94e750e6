"""Row ranges of Parquet files → raw rows: the needed columns and row groups, and no others."""

import datetime
import decimal
import json
import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from granite_ray.io.columns import SourceColumns, partition_values
from granite_ray.io.filters import filter_mask
from granite_ray.io.raw import default_id, raw_schema
from granite_ray.io.storage import Storage
from granite_ray.io.types import plain_type
from granite_ray.records import ShardPart

ROWS_AT_ONCE = 1024

Failures = dict[int, str]
"""What is wrong with a row, by its place in the table at hand."""


def read_parquet(storage: Storage, part: ShardPart, columns: SourceColumns) -> Iterator[pa.Table]:
    """Yield the raw rows of a part."""
    partitions = partition_values(part.path)
    with storage.open(part.path) as content, pq.ParquetFile(content, pre_buffer=True) as parquet:
        own = [name for name in columns.names() if name in parquet.schema_arrow.names]
        for first_row, batch in _read_range(parquet, part, own):
            table = pa.Table.from_batches([batch]).select(own)
            for name in sorted(set(columns.names()) - set(own)):
                value = pa.scalar(partitions[name], pa.string())
                table = table.append_column(name, pa.repeat(value, batch.num_rows))
            yield _raw_table(table, part.path, first_row, columns)


def _read_range(
    parquet: pq.ParquetFile, part: ShardPart, names: list[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the part's rows with the number of the first in each batch."""
    stop = parquet.metadata.num_rows if part.stop_row is None else part.stop_row
    groups, row = _overlapping_groups(parquet.metadata, part.start_row, stop)
    for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=names):
        first, last = max(part.start_row, row), min(stop, row + batch.num_rows)
        if first < last:
            yield first, batch.slice(first - row, last - first)
        row += batch.num_rows
        if row >= stop:
            return


def _overlapping_groups(
    metadata: pq.FileMetaData, start_row: int, stop_row: int
) -> tuple[list[int], int]:
    """Return the row groups that have rows of a range, and the number of their first row."""
    groups: list[int] = []
    first_row = row = 0
    for index in range(metadata.num_row_groups):
        next_row = row + metadata.row_group(index).num_rows
        if row < stop_row and next_row > start_row:
            first_row = first_row if groups else row
            groups.append(index)
        row = next_row
    return groups, first_row


def _raw_table(table: pa.Table, path: str, first_row: int, columns: SourceColumns) -> pa.Table:
    """Turn rows as stored into raw rows; those that `source.filter` refuses are left out."""
    rows = pa.array(range(first_row, first_row + table.num_rows), pa.int64())
    if columns.filter:
        mask = filter_mask(table, columns.filter).combine_chunks()
        table, rows = table.filter(mask), rows.filter(mask)
    failures: Failures = {}
    kept = [_valid(table, field.name, failures).cast(field.type) for field in columns.keep_fields]
    raw = {
        "document_id": _document_ids(table, path, rows, columns, failures),
        "text": _texts(table, columns),
        "columns": _prompt_json(table, columns, failures),
        "error_type": [
            "invalid_column" if index in failures else None for index in range(table.num_rows)
        ],
        "error_message": [failures.get(index) for index in range(table.num_rows)],
        "source_file": [path] * table.num_rows,
        "source_row": rows,
    }
    schema = raw_schema(columns)
    arrays = [pa.array(raw[field.name], field.type) for field in schema if field.name in raw]
    return pa.Table.from_arrays([*arrays, *kept], schema=schema)


def _document_ids(
    table: pa.Table, path: str, rows: "pa.Array[Any]", columns: SourceColumns, failures: Failures
) -> Any:
    if columns.id_column is None:
        return [default_id(path, int(row)) for row in rows.to_numpy()]
    return _valid(table, columns.id_column, failures).cast(pa.string())


def _texts(table: pa.Table, columns: SourceColumns) -> Any:
    """Return the texts as bytes: whether they are valid is for prepare to say."""
    if not columns.reads_text:
        return pa.nulls(table.num_rows, pa.large_binary())
    return table[columns.text_column].cast(pa.large_binary()).combine_chunks()


def _prompt_json(table: pa.Table, columns: SourceColumns, failures: Failures) -> list[str]:
    values = {name: _values(table, name, failures) for name in columns.prompt_columns}
    return [
        json.dumps(
            {name: _jsonable(column[index]) for name, column in values.items()}, ensure_ascii=False
        )
        for index in range(table.num_rows)
    ]


def _values(table: pa.Table, name: str, failures: Failures) -> list[Any]:
    """Return a column as Python values; Python's dates end with the year 9999, Arrow's do not."""
    array = _valid(table, name, failures)
    try:
        return list(array.to_pylist())
    except (ValueError, OverflowError):
        return [_value(array, index, name, failures) for index in range(len(array))]


def _value(array: "pa.Array[Any]", index: int, name: str, failures: Failures) -> Any:
    try:
        return array[index].as_py()
    except (ValueError, OverflowError):
        failures.setdefault(index, f"column {name!r} holds a time that cannot be written")
        return None


def _valid(table: pa.Table, name: str, failures: Failures) -> "pa.Array[Any]":
    """Return a column in plain form; values with invalid UTF-8 become null and fail their row."""
    column = table[name]
    array = column.cast(plain_type(column.type)).combine_chunks()
    if _is_valid(array):
        return array
    # One by one, since Arrow does not say which; `take`, since a slice of a list keeps all values.
    places = [index if _is_valid(array.take([index])) else None for index in range(len(array))]
    for index, place in enumerate(places):
        if place is None:
            failures.setdefault(index, f"column {name!r} holds text that is not valid UTF-8")
    return array.take(pa.array(places, pa.int64()))


def _is_valid(array: "pa.Array[Any]") -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _jsonable(value: Any) -> Any:
    """Return what JSON can hold: dates in ISO form, decimals as strings, NaN and infinity null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, dict):
        return {key: _jsonable(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(member) for member in value]
    return value
