"""The form that rows of every format are read into: `RAW_FIELDS`, then the kept columns.

Rows that come one by one, from JSONL and text files, are put into this form here.
"""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from granite_ray.errors import RowFailure
from granite_ray.io.columns import SourceColumns
from granite_ray.records import RAW_FIELDS


def raw_schema(columns: SourceColumns) -> pa.Schema:
    """Return the schema of raw rows."""
    fields: list[pa.Field[Any]] = [*RAW_FIELDS, *columns.keep_fields]
    return pa.schema(fields)


def default_id(path: str, row: int) -> str:
    """Name a document that has no id of its own."""
    return f"{path}#{row}"


def empty_row(path: str, row: int, columns: SourceColumns) -> dict[str, Any]:
    """Return the fields of a row of which nothing else is known."""
    document_id = None if columns.id_column else default_id(path, row)
    return {"document_id": document_id, "columns": "{}", "source_file": path, "source_row": row}


def fill_row(raw: dict[str, Any], values: Mapping[str, Any], columns: SourceColumns) -> None:
    """Fill in what the job reads; the text last, so that a row with a bad one has all else.

    Raises:
        RowFailure: A value is of a wrong type or cannot be written; names its column.
    """
    if columns.id_column is not None:
        raw["document_id"] = _id(values.get(columns.id_column), columns.id_column)
    for field in columns.keep_fields:
        raw[field.name] = _kept(values.get(field.name), field.name)
    shown = {name: values.get(name) for name in columns.prompt_columns}
    for name, value in shown.items():
        _encodable(_dump(value), name)
    raw["columns"] = _dump(shown)
    if columns.reads_text:
        raw["text"] = _text(values.get(columns.text_column), columns.text_column)


def _id(value: object, name: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowFailure(
            "invalid_column", f"id column {name!r} holds {kind_of(value)}, not a string or integer"
        )
    return _encodable(str(value), name)


def _kept(value: object, name: str) -> str | None:
    if value is None:
        return None
    return _encodable(value if isinstance(value, str) else _dump(value), name)


def _text(value: object, name: str) -> bytes | None:
    """Return a text's bytes; those of a lone surrogate are invalid UTF-8, which prepare refuses."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RowFailure(
            "invalid_text", f"text column {name!r} holds {kind_of(value)}, not a string"
        )
    return value.encode(errors="surrogatepass")


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowFailure("invalid_column", f"column {name!r} holds a lone surrogate") from error
    return text


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def kind_of(value: object) -> str:
    """Name the JSON type of a value, without showing it."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
