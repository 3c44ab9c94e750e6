"""Which columns a job reads, and as which types: settled for all files before any model is loaded.

A column is one of a file's own or, where it has none of that name, a Hive partition key of its
path (`key=value`, always a string). Rows are read elsewhere.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from granite_ray.config import FilterCondition, SourceConfig
from granite_ray.errors import ConfigError
from granite_ray.io.filters import filter_mask
from granite_ray.io.input_files import InputFile
from granite_ray.io.types import can_be_json, is_binary, is_string, plain_type, unified_type
from granite_ray.records import PREPARED_FIELDS, RAW_FIELDS

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
PROMPT_FIELDS = "task.template or task.documents_column"


@dataclass(frozen=True, slots=True)
class SourceColumns:
    """What is read of each row."""

    text_column: str
    id_column: str | None
    prompt_columns: tuple[str, ...]
    keep_fields: "tuple[pa.Field[Any], ...]"
    filter: tuple[FilterCondition, ...]
    reads_text: bool = True

    def ids_only(self) -> "SourceColumns":
        """Return the same rows with nothing but their ids."""
        return replace(self, prompt_columns=(), keep_fields=(), reads_text=False)

    def names(self) -> tuple[str, ...]:
        """Return the columns that must be read, each once."""
        wanted = [*self.prompt_columns, *(field.name for field in self.keep_fields)]
        wanted += [condition.column for condition in self.filter]
        wanted += [self.text_column] if self.reads_text else []
        wanted += [self.id_column] if self.id_column else []
        return tuple(sorted(set(wanted)))


def resolve_columns(
    files: Sequence[InputFile], source: SourceConfig, prompt_columns: Sequence[str]
) -> SourceColumns:
    """Check the columns of every file, and settle the types of those that are kept.

    Raises:
        ConfigError: Naming the file, the column and the config field.
    """
    shapes = list(_distinct_shapes(files, source))
    keep_fields = tuple(pa.field(name, _kept_type(shapes, name)) for name in source.keep_columns)
    columns = SourceColumns(
        text_column=source.text_column,
        id_column=source.id_column,
        prompt_columns=tuple(prompt_columns),
        keep_fields=keep_fields,
        filter=source.filter,
    )
    check_collisions(columns, ())
    for shape in shapes:
        _check_shape(shape, columns, source)
    return columns


def check_collisions(columns: SourceColumns, output_names: Iterable[str]) -> None:
    """Refuse a kept column whose name is one of the output's, or of the records on the way."""
    taken = {field.name for field in (*RAW_FIELDS, *PREPARED_FIELDS)} | set(output_names)
    for field in columns.keep_fields:
        if field.name in taken:
            raise ConfigError(
                f"source.keep_columns has {field.name!r}, a name that the columns "
                f"of results or documents have here. Rename it in the source, or leave it out."
            )


def partition_values(path: str) -> dict[str, str | None]:
    """Return the Hive partition keys in the folders of a path."""
    folders = [folder.partition("=") for folder in path.split("/")[:-1]]
    return {
        unquote(key): None if value == HIVE_NULL else unquote(value)
        for key, equals, value in folders
        if key and equals
    }


@dataclass(frozen=True, slots=True)
class _Shape:
    """The columns that some files have in common; `path` is the first of them.

    `is_open` says that rows may have other columns too, as those of JSONL do.
    """

    path: str
    schema: pa.Schema
    is_open: bool


def _distinct_shapes(files: Sequence[InputFile], source: SourceConfig) -> Iterator[_Shape]:
    """Yield each combination of columns once: 100,000 files have few."""
    seen = set()
    for file in files:
        keys = tuple(partition_values(file.path))
        if (file.schema, keys) not in seen:
            seen.add((file.schema, keys))
            yield _Shape(file.path, _schema(file, keys), source.format == "jsonl")
    sampled = frozenset().union(*(file.sampled_keys for file in files))
    if sampled:
        _check_sampled(sampled, files, source)


def _schema(file: InputFile, keys: Sequence[str]) -> pa.Schema:
    own = list(file.schema) if file.schema is not None else []
    names = {field.name for field in own}
    return pa.schema([*own, *(pa.field(key, pa.string()) for key in keys if key not in names)])


def _check_sampled(
    sampled: frozenset[str], files: Sequence[InputFile], source: SourceConfig
) -> None:
    """Refuse a JSONL text or id column that no sampled row of any file has."""
    known = sampled.union(*(partition_values(file.path) for file in files))
    for field, name in (("text_column", source.text_column), ("id_column", source.id_column)):
        if name is not None and name not in known:
            raise ConfigError(
                f"source.{field} is {name!r}, which no row looked at has. They have: "
                f"{', '.join(sorted(known))}."
            )


def _check_shape(shape: _Shape, columns: SourceColumns, source: SourceConfig) -> None:
    if source.format == "parquet":
        text_type = plain_type(_find(shape, columns.text_column, "source.text_column").type)
        if not (is_string(text_type) or is_binary(text_type) or pa.types.is_null(text_type)):
            raise _wrong_type(shape, "source.text_column", columns.text_column, "a string")
    if columns.id_column is not None and not _is_open_for(shape, columns.id_column):
        id_type = plain_type(_find(shape, columns.id_column, "source.id_column").type)
        if not (is_string(id_type) or pa.types.is_integer(id_type) or pa.types.is_null(id_type)):
            raise _wrong_type(
                shape, "source.id_column", columns.id_column, "a string or an integer"
            )
    for name in columns.prompt_columns:
        if not _is_open_for(shape, name) and not can_be_json(
            _find(shape, name, PROMPT_FIELDS).type
        ):
            raise _wrong_type(shape, PROMPT_FIELDS, name, "text, a number or a date")
    for condition in columns.filter:
        if not _is_open_for(shape, condition.column):
            _check_condition(shape, condition)


def _check_condition(shape: _Shape, condition: FilterCondition) -> None:
    field = _find(shape, condition.column, "source.filter")
    try:
        filter_mask(pa.schema([field]).empty_table(), [condition])
    except pa.ArrowException as error:
        raise ConfigError(
            f"source.filter compares column {field.name!r}, which is {field.type} in {shape.path}, "
            f"with {condition.value!r} by {condition.operator!r}. Write a value of its type."
        ) from error


def _kept_type(shapes: Sequence[_Shape], name: str) -> pa.DataType:
    """Return the one type that all files' values of a kept column can have."""
    first_path = ""
    settled: pa.DataType = pa.null()
    for shape in shapes:
        if _is_open_for(shape, name):
            return pa.string()
        own = plain_type(_find(shape, name, "source.keep_columns").type)
        merged = unified_type(settled, own)
        if merged is None:
            raise ConfigError(
                f"source.keep_columns has {name!r}, which is {settled} in {first_path} and {own} "
                f"in {shape.path}. Make them agree, or leave it out."
            )
        if merged != settled:
            first_path, settled = shape.path, merged
    return pa.string() if pa.types.is_null(settled) else settled


def _is_open_for(shape: _Shape, name: str) -> bool:
    return shape.is_open and name not in shape.schema.names


def _find(shape: _Shape, name: str, field: str) -> "pa.Field[Any]":
    index = shape.schema.get_field_index(name)
    if index < 0:
        raise ConfigError(
            f"{field}: {shape.path} has no column {name!r}. It has: "
            f"{', '.join(sorted(set(shape.schema.names))) or 'none'}."
        )
    return shape.schema.field(index)


def _wrong_type(shape: _Shape, field: str, name: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"{field}: column {name!r} of {shape.path} is {shape.schema.field(name).type}. It "
        f"must be {wanted}."
    )
