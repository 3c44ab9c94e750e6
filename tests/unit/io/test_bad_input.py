"""Malformed documents are rows, unreadable files are named; nothing else ever happens."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from granite_ray.config import SourceConfig
from granite_ray.errors import CorruptInputError
from granite_ray.io.input_files import InputFile, describe_file
from granite_ray.io.listing import list_input
from granite_ray.io.shards import plan_shards
from granite_ray.io.sources import RawShard, read_shard, resolve_columns
from granite_ray.io.storage import open_storage

SAMPLED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_all(folder: Path, **options: Any) -> list[RawShard]:
    source = SourceConfig(**({"path": str(folder)} | options))
    storage = open_storage(str(folder))
    files = [describe_file(storage, file, source) for file in list_input(source).files]
    columns = resolve_columns(files, source, ())
    return [read_shard(storage, shard, columns, source) for shard in plan_shards(files, source)]


def rows_of(shards: list[RawShard]) -> list[dict[str, Any]]:
    return [row for shard in shards for row in shard.table.to_pylist()]


@pytest.mark.parametrize(
    ("line", "error_type"),
    [
        (b'{"text": "fine"}', None),
        (b'{"text": null}', None),
        (b'{"other": 1}', None),
        (b'{"text": "\\ud83d\\ude00", "n": NaN}', None),
        (b'{"text": "lone \\ud800"}', None),
        (b'{"text": 5}', "invalid_text"),
        (b'{"text": ["a"]}', "invalid_text"),
        (b'{"text": "cut', "invalid_json"),
        (b"[1, 2]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'{"text": "\xff"}', "invalid_json"),
        (b'\xef\xbb\xbf{"text": "a"}', "invalid_json"),
        (b'{"text": "a"}\x00', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"text": "a", "n": ' + b"9" * 5_000 + b"}", "invalid_json"),
    ],
)
def test_a_bad_line_is_a_row_that_says_so(
    tmp_path: Path, line: bytes, error_type: str | None
) -> None:
    good = b'{"text": "good"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, b"", b"  \r", line, good]))
    rows = rows_of(read_all(tmp_path, format="jsonl"))
    assert [row["error_type"] for row in rows] == [None, error_type, None]
    assert [row["source_row"] for row in rows] == [0, 1, 2]
    assert (rows[1]["error_message"] is None) == (error_type is None)


def test_a_mark_at_the_start_of_a_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    rows = rows_of(read_all(tmp_path, format="jsonl"))
    assert [(row["text"], row["error_type"]) for row in rows] == [(b"a", None), (b"b", None)]


@pytest.mark.parametrize(
    ("value", "document_id", "error_type"),
    [
        ('"x"', "x", None),
        ("17", "17", None),
        ("null", None, None),
        ("true", None, "invalid_column"),
        ("1.5", None, "invalid_column"),
        ('"\\ud800"', None, "invalid_column"),
    ],
)
def test_an_id_is_a_string_or_an_integer(
    tmp_path: Path, value: str, document_id: str | None, error_type: str | None
) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "id": {value}}}\n')
    (row,) = rows_of(read_all(tmp_path, format="jsonl", id_column="id"))
    assert (row["document_id"], row["error_type"]) == (document_id, error_type)


def test_kept_jsonl_values_are_strings(tmp_path: Path) -> None:
    values: list[Any] = ["as is", 1.5, True, None, {"a": ["é"]}]
    lines = [json.dumps({"text": "a", "k": value}) for value in values]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "b"}', '{"text": 1, "k": "x"}']))
    rows = rows_of(read_all(tmp_path, format="jsonl", keep_columns=["k"]))
    kept = [row["k"] for row in rows]
    assert kept == ["as is", "1.5", "true", None, '{"a": ["é"]}', None, "x"]


@SAMPLED
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b'{"text": "a"}', b" ", b"{}"])))
def test_any_bytes_are_as_many_rows_as_lines_that_are_not_blank(
    tmp_path: Path, lines: list[bytes]
) -> None:
    content = b"\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "there is one"}')
    for options in ({}, {"documents_per_shard": 1}, {"bytes_per_shard": 20}):
        shards = read_all(tmp_path, format="jsonl", **options)
        rows = [row for row in rows_of(shards) if row["source_file"] == "a.jsonl"]
        assert len(rows) == sum(bool(line.strip()) for line in content.split(b"\n"))


def whole_parquet() -> bytes:
    table = pa.table({"text": [f"text {number}" * 3 for number in range(50)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=20)
    return bytes(sink.getvalue().to_pybytes())


LINES = b"".join(b'{"text": "line %d"}\n' % number for number in range(200))
WHOLE: dict[str, tuple[str, bytes]] = {
    "a.parquet": ("parquet", whole_parquet()),
    "a.jsonl.gz": ("jsonl", gzip.compress(LINES, mtime=0)),
    "a.jsonl.zst": ("jsonl", pa.compress(LINES, "zstd", asbytes=True)),
}


@pytest.mark.parametrize("name", WHOLE)
@SAMPLED
@given(data=st.data())
def test_a_file_cut_at_any_byte_is_named(tmp_path: Path, name: str, data: st.DataObject) -> None:
    source_format, whole = WHOLE[name]
    end = data.draw(st.integers(1, len(whole) - 1))
    (tmp_path / name).write_bytes(whole[:end])
    with pytest.raises(CorruptInputError, match=name):
        read_all(tmp_path, format=source_format)


@pytest.mark.parametrize("name", WHOLE)
@SAMPLED
@given(data=st.data())
def test_a_file_with_a_wrong_byte_is_read_or_named(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    source_format, whole = WHOLE[name]
    damaged = bytearray(whole)
    # The Parquet footer is left alone: Arrow takes lengths in it at their word.
    place = data.draw(st.integers(0, len(whole) // 3))
    damaged[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / name).write_bytes(damaged)
    try:
        read_all(tmp_path, format=source_format)
    except CorruptInputError as error:
        assert name in str(error)  # noqa: PT017 - reading it all is the other good outcome


def corrupt_page(content: bytes) -> bytes:
    first = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(1).column(0)
    start = first.dictionary_page_offset or first.data_page_offset
    return content[:start] + b"\xff" * 40 + content[start + 40 :]


def test_a_bad_page_stops_the_job_or_costs_its_part(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(corrupt_page(whole_parquet()))
    (tmp_path / "b.parquet").write_bytes(whole_parquet())
    with pytest.raises(CorruptInputError, match=r"a\.parquet cannot be read.*on_bad_file"):
        read_all(tmp_path)
    shards = read_all(tmp_path, on_bad_file="skip", documents_per_shard=20)
    bad = [file for shard in shards for file in shard.bad_files]
    assert [file.path for file in bad] == ["a.parquet"]
    assert "a.parquet" in bad[0].reason
    assert len(rows_of(shards)) == 80


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all, but long enough for it"])
def test_what_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(CorruptInputError, match=r"a\.parquet"):
        read_all(tmp_path)


def test_parquet_without_rows_is_fine(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pq.ParquetWriter(tmp_path / "b.parquet", table.schema):
        pass  # not even a row group
    assert read_all(tmp_path) == []


def test_a_line_is_not_judged_by_the_plan(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n[\n{}\n")
    source = SourceConfig(path=str(tmp_path), format="jsonl")
    storage = open_storage(str(tmp_path))
    (info,) = list_input(source).files
    described = describe_file(storage, info, source)
    assert isinstance(described, InputFile)
    assert described.num_rows == 3
