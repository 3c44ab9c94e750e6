"""Row ranges of JSONL files → raw rows. A bad line is a row that says what is wrong with it."""

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import pyarrow as pa

from granite_ray.errors import RowFailure
from granite_ray.io.columns import SourceColumns, partition_values
from granite_ray.io.filters import row_passes
from granite_ray.io.lines import read_lines
from granite_ray.io.raw import empty_row, fill_row, kind_of, raw_schema
from granite_ray.io.storage import Storage
from granite_ray.records import ShardPart

ROWS_AT_ONCE = 1024
BOM = b"\xef\xbb\xbf"


def read_jsonl(storage: Storage, part: ShardPart, columns: SourceColumns) -> Iterator[pa.Table]:
    """Yield the raw rows of a part."""
    partitions = partition_values(part.path)
    num_skipped = 0 if part.start_byte else part.start_row
    num_rows = None if part.stop_row is None else part.stop_row - part.start_row
    with closing(read_lines(storage, part.path, part.start_byte, num_skipped)) as lines:
        numbered = enumerate(itertools.islice(lines, num_rows), part.start_row)
        while some := list(itertools.islice(numbered, ROWS_AT_ONCE)):
            rows = [_raw_row(line, row, part.path, columns, partitions) for row, line in some]
            found = [row for row in rows if row is not None]
            yield pa.Table.from_pylist(found, schema=raw_schema(columns))


def _raw_row(
    line: bytes, row: int, path: str, columns: SourceColumns, partitions: Mapping[str, str | None]
) -> dict[str, Any] | None:
    """Return the fields of one line; None where `source.filter` refuses it.

    A line that cannot be parsed passes every filter: nothing says that it is not a document.
    """
    raw = empty_row(path, row, columns)
    try:
        values = {**partitions, **_parse(line.removeprefix(BOM) if row == 0 else line)}
        if not row_passes(values, columns.filter):
            return None
        fill_row(raw, values, columns)
    except RowFailure as failure:
        raw |= {"error_type": failure.error_type, "error_message": failure.message}
    return raw


def _parse(line: bytes) -> dict[str, Any]:
    try:
        # NaN and Infinity are no JSON, but common: they are missing numbers.
        values = json.loads(line.decode(), parse_constant=lambda _: None)
    except UnicodeDecodeError as error:
        raise RowFailure("invalid_json", f"not valid UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise RowFailure("invalid_json", f"not valid JSON at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise RowFailure("invalid_json", "a number too long or nesting too deep") from error
    if not isinstance(values, dict):
        raise RowFailure("invalid_json", f"{kind_of(values)} where an object was expected")
    return values
