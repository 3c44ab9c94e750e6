"""Columns are settled for all files, or refused by name before any model is loaded."""

import re
from typing import Any

import pyarrow as pa
import pytest

from granite_ray.errors import ConfigError
from granite_ray.io.columns import check_collisions, partition_values, resolve_columns
from granite_ray.io.types import unified_type

TABLE = pa.table({"text": ["a"], "n": [1], "x": [1.5], "raw": [b"\x00"], "flag": [True]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "body"}, "source.text_column: a.parquet has no column 'body'. It has: fl"),
        ({"text_column": "n"}, "source.text_column: column 'n' of a.parquet is int64. It must be"),
        ({"id_column": "id"}, "source.id_column: a.parquet has no column 'id'"),
        ({"id_column": "x"}, "source.id_column: column 'x' of a.parquet is double"),
        ({"keep_columns": ["k"]}, "source.keep_columns: a.parquet has no column 'k'"),
        ({"filter": [["lang", "==", "en"]]}, "source.filter: a.parquet has no column 'lang'"),
        ({"filter": [["n", "==", "five"]]}, "source.filter compares column 'n', which is int64"),
        ({"filter": [["flag", "<", 3]]}, "source.filter compares column 'flag', which is bool"),
    ],
)
def test_a_column_that_does_not_fit_is_named(
    corpus: Any, options: dict[str, Any], message: str
) -> None:
    corpus.put("a.parquet", TABLE)
    with pytest.raises(ConfigError, match=re.escape(message)):
        corpus.columns(corpus.source(**options))


def test_bytes_cannot_stand_in_a_prompt(corpus: Any) -> None:
    corpus.put("a.parquet", TABLE)
    with pytest.raises(ConfigError, match=re.escape("'raw' of a.parquet is binary")):
        corpus.columns(corpus.source(), "raw")


def test_a_column_missing_in_one_file_of_many_names_that_file(corpus: Any) -> None:
    for number in range(20):
        corpus.put(f"{number:02}.parquet", TABLE)
    corpus.put("drifted.parquet", TABLE.drop_columns(["n"]))
    with pytest.raises(ConfigError, match=r"drifted\.parquet has no column 'n'"):
        corpus.columns(corpus.source(keep_columns=["n"]))


def test_kept_columns_that_disagree_name_both_files(corpus: Any) -> None:
    corpus.put("a.parquet", pa.table({"text": ["a"], "k": [1]}))
    corpus.put("b.parquet", pa.table({"text": ["a"], "k": ["1"]}))
    message = "'k', which is int64 in a.parquet and string in b.parquet"
    with pytest.raises(ConfigError, match=re.escape(message)):
        corpus.columns(corpus.source(keep_columns=["k"]))


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.uint32(), pa.uint32()),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.null(), pa.bool_(), pa.bool_()),
        (pa.int64(), pa.uint64(), None),
        (pa.int64(), pa.float64(), None),
        (pa.timestamp("us"), pa.timestamp("ns"), None),
    ],
)
def test_types_unify_only_without_loss(
    one: pa.DataType, other: pa.DataType, both: pa.DataType | None
) -> None:
    assert unified_type(one, other) == both
    assert unified_type(other, one) == both


def test_a_column_of_nulls_alone_is_a_string(corpus: Any) -> None:
    corpus.put("a.parquet", pa.table({"text": ["a"], "k": pa.nulls(1)}))
    assert corpus.columns(corpus.source(keep_columns=["k"])).keep_fields == (
        pa.field("k", pa.string()),
    )


def test_a_kept_column_must_not_bear_the_name_of_a_result(corpus: Any) -> None:
    corpus.put("a.parquet", TABLE)
    columns = corpus.columns(corpus.source(keep_columns=["n", "x"]))
    check_collisions(columns, ["summary"])
    with pytest.raises(ConfigError, match=re.escape("source.keep_columns has 'n'")):
        check_collisions(columns, ["summary", "n"])
    with pytest.raises(ConfigError, match=re.escape("source.keep_columns has 'text'")):
        corpus.columns(corpus.source(keep_columns=["text"]))


def test_a_jsonl_column_that_no_row_has_is_refused(corpus: Any) -> None:
    corpus.put("a.jsonl", b'{"body": "x"}\nnot json\n{"title": "y"}\n')
    corpus.put("b.jsonl", b"")
    with pytest.raises(ConfigError, match=r"'text', which no row looked at has.*: body, title"):
        corpus.columns(corpus.source(format="jsonl"))
    assert corpus.columns(corpus.source(format="jsonl", text_column="title"))


def test_text_files_have_no_columns(corpus: Any) -> None:
    corpus.put("a.txt", b"x")
    with pytest.raises(ConfigError, match=r"a\.txt has no column 'key'. It has: none"):
        corpus.columns(corpus.source(format="text", keep_columns=["key"]))


def test_many_files_of_one_shape_are_checked_once(corpus: Any) -> None:
    corpus.put("a.parquet", TABLE)
    source = corpus.source(keep_columns=["n"])
    (file,) = corpus.describe(source)
    assert resolve_columns([file] * 20_000, source, ()) == resolve_columns([file], source, ())


def test_partition_keys_come_from_folders_only() -> None:
    assert partition_values("a=1/b%20c=%2F/=x/d/e=2.parquet") == {"a": "1", "b c": "/"}
