"""The truth column as the measures take it. A type that cannot be the truth is refused by name."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.errors import ConfigError
from granite_ray.io.types import LIST_TYPES, is_string, plain_type


def has_truth(rows: pa.Table, truth: str) -> pa.ChunkedArray:
    """Tell of each row whether it has a truth: neither null nor blank."""
    column = rows[truth]
    if is_string(plain_type(column.type)):
        column = column.cast(pa.string())
        return pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column), ""), False)
    return pc.is_valid(column)


def labels_of(rows: pa.Table, truth: str) -> pa.Array:
    """Return one label a row, as text."""
    found = plain_type(rows[truth].type)
    if is_string(found) or pa.types.is_integer(found):
        return rows[truth].cast(pa.string()).combine_chunks()
    raise _wrong_type(rows, truth, "text or an integer: one label")


def label_sets_of(rows: pa.Table, truth: str) -> pa.ListArray:
    """Return a list of distinct labels a row, from a list column or text that is a JSON list."""
    found = plain_type(rows[truth].type)
    if _is_list_of_text(found):
        lists = rows[truth].to_pylist()
    elif is_string(found):
        lists = list(_parsed(rows, truth, list))
    else:
        raise _wrong_type(rows, truth, "a list of text, or text that is a JSON list")
    sets = [list(dict.fromkeys(str(one) for one in values)) for values in lists]
    return pa.array(sets, pa.list_(pa.string()))


def records_of(rows: pa.Table, truth: str) -> list[dict[str, Any]]:
    """Return a record a row, from a struct column or text that is a JSON object."""
    found = plain_type(rows[truth].type)
    if pa.types.is_struct(found):
        records: list[dict[str, Any]] = rows[truth].to_pylist()
        return records
    if is_string(found):
        return list(_parsed(rows, truth, dict))
    raise _wrong_type(rows, truth, "a struct, or text that is a JSON object")


def references_of(rows: pa.Table, truth: str) -> list[str]:
    """Return the reference text of each row."""
    if is_string(plain_type(rows[truth].type)):
        texts: list[str] = rows[truth].to_pylist()
        return texts
    raise _wrong_type(rows, truth, "text")


def _is_list_of_text(column_type: pa.DataType) -> bool:
    is_list = any(is_type(column_type) for is_type in LIST_TYPES)
    return is_list and is_string(plain_type(column_type.value_type))


def _parsed(rows: pa.Table, truth: str, wanted: type[Any]) -> Iterator[Any]:
    name = "a JSON list" if wanted is list else "a JSON object"
    for document_id, text in zip(rows["document_id"], rows[truth], strict=True):
        try:
            value = json.loads(text.as_py())
        except ValueError:
            value = None
        if not isinstance(value, wanted):
            raise ConfigError(
                f"--truth {truth}: the value of document {document_id.as_py()!r} is not "
                f"{name}. Mend it in the source and run the job again."
            )
        yield value


def _wrong_type(rows: pa.Table, truth: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"--truth {truth}: the column is {rows[truth].type}. For this task it must be {wanted}."
    )
