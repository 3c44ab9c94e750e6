"""Files in, raw rows out: every format, row ranges, ids, kept and prompt columns, filters."""

import datetime
import decimal
import gzip
import json
from typing import Any

import pyarrow as pa
import pytest

from granite_ray.errors import InputChangedError
from granite_ray.io.input_files import describe_file
from granite_ray.io.listing import list_input
from granite_ray.io.shards import plan_shards
from granite_ray.io.sources import read_shard, resolve_columns
from granite_ray.records import RAW_FIELDS

NUM_ROWS = 250


def make_table(num_rows: int = NUM_ROWS) -> pa.Table:
    return pa.table(
        {
            "text": [f"text {row} é文😀" for row in range(num_rows)],
            "key": pa.array(range(1_000, 1_000 + num_rows), pa.int64()),
            "stars": pa.array([row % 5 for row in range(num_rows)], pa.int8()),
            "unused": [b"\x00" * 100] * num_rows,
        }
    )


def as_lines(table: pa.Table) -> bytes:
    rows = table.drop_columns(["unused"]).to_pylist()
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def pack(codec: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def put_table(corpus: Any, ending: str, table: pa.Table) -> str:
    """Put a table in the form of an ending; return its format."""
    contents = {
        "parquet": lambda: table,
        "jsonl": lambda: as_lines(table),
        "jsonl.gz": lambda: gzip.compress(as_lines(table)),
        "jsonl.zst": lambda: pack("zstd", as_lines(table)),
    }
    options = {"row_group_size": 90} if ending == "parquet" else {}
    corpus.put(f"a.{ending}", contents[ending](), **options)
    return "parquet" if ending == "parquet" else "jsonl"


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("max_rows", [7, 90, 100, 500])
def test_the_shards_together_are_the_rows_of_the_file(
    corpus: Any, ending: str, max_rows: int
) -> None:
    table = make_table()
    source = corpus.source(
        format=put_table(corpus, ending, table),
        documents_per_shard=max_rows,
        id_column="key",
        keep_columns=["stars"],
    )
    shards = corpus.read_shards(source, "key", "stars")
    assert all(0 < len(shard.table) <= max_rows for shard in shards)
    rows = [row for shard in shards for row in shard.table.to_pylist()]
    kept = int if ending == "parquet" else str
    for number, (row, original) in enumerate(zip(rows, table.to_pylist(), strict=True)):
        assert row["text"].decode() == original["text"]
        assert row["document_id"] == str(original["key"])
        assert json.loads(row["columns"]) == {"key": original["key"], "stars": original["stars"]}
        assert (row["source_file"], row["source_row"]) == (f"a.{ending}", number)
        assert row["stars"] == kept(original["stars"])
        assert row["error_type"] is None


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "jsonl.zst"])
def test_rows_are_read_from_any_storage(any_corpus: Any, ending: str) -> None:
    table = make_table()
    source_format = put_table(any_corpus, ending, table)
    rows = any_corpus.rows(any_corpus.source(format=source_format, documents_per_shard=100))
    assert [row["text"].decode() for row in rows] == table["text"].to_pylist()
    assert [row["document_id"] for row in rows[:2]] == [f"a.{ending}#0", f"a.{ending}#1"]


def test_text_files_are_one_document_each(any_corpus: Any) -> None:
    contents = {"a.txt": b"one", "lang=en/b.md": b"", "lang=de/c.txt": b"\xff\xfe bytes"}
    for path, content in contents.items():
        any_corpus.put(path, content)
    source = any_corpus.source(format="text")
    assert {row["source_file"]: row["text"] for row in any_corpus.rows(source)} == contents
    narrowed = any_corpus.source(
        format="text",
        path=f"{any_corpus.storage.root}/*/*",
        keep_columns=["lang"],
        id_column="lang",
        filter=[["lang", "in", ["de"]]],
    )
    (row,) = any_corpus.rows(narrowed, "lang")
    assert (row["lang"], row["document_id"], row["columns"]) == ("de", "de", '{"lang": "de"}')


def test_the_schema_is_the_declared_one(corpus: Any) -> None:
    corpus.put("a.parquet", make_table(0))
    corpus.put("b.parquet", make_table(3))
    (shard,) = corpus.read_shards(corpus.source(keep_columns=["stars"]))
    assert shard.table.schema == pa.schema([*RAW_FIELDS, pa.field("stars", pa.int8())])


def test_files_of_other_types_give_one_type(corpus: Any) -> None:
    corpus.put("a.parquet", pa.table({"text": ["a"], "n": pa.array([1], pa.int32()), "s": ["x"]}))
    corpus.put(
        "b.parquet",
        pa.table(
            {
                "text": pa.array(["b"], pa.large_string()),
                "n": pa.array([2**40], pa.int64()),
                "s": pa.array(["y"]).dictionary_encode(),
            }
        ),
    )
    corpus.put("c.parquet", pa.table({"text": pa.nulls(1), "n": pa.nulls(1), "s": pa.nulls(1)}))
    corpus.put(
        "d.parquet",
        pa.table({"text": pa.array([b"d"]), "n": pa.array([4], pa.int8()), "s": ["z"]}),
    )
    rows = corpus.rows(corpus.source(keep_columns=["n", "s"]), "n", "s")
    assert [row["text"] for row in rows] == [b"a", b"b", None, b"d"]
    assert [row["n"] for row in rows] == [1, 2**40, None, 4]
    assert [row["s"] for row in rows] == ["x", "y", None, "z"]


def test_a_partition_key_is_a_column(corpus: Any) -> None:
    table = pa.table({"text": ["t"]})
    for path in ["lang=en%20gb/a.parquet", "lang=__HIVE_DEFAULT_PARTITION__/b.parquet"]:
        corpus.put(path, table)
    corpus.put("lang=de/c.parquet", table.append_column("lang", [["own"]]))
    source = corpus.source(keep_columns=["lang"])
    assert [row["lang"] for row in corpus.rows(source, "lang")] == [None, "own", "en gb"]
    english = corpus.source(filter=[["lang", "!=", "own"]])
    assert [row["source_file"] for row in corpus.rows(english)] == ["lang=en%20gb/a.parquet"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (["n", ">=", 2], [2, 3]),
        (["n", "!=", 2], [0, 3]),
        (["n", "<", 2.5], [0, 2]),
        (["n", "in", [0, 3, 9]], [0, 3]),
        (["n", "not in", [0, 9]], [2, 3]),
        (["s", "==", "b"], [2]),
        (["s", ">", "a"], [2]),
        (["b", "==", True], [0, 2]),
    ],
)
def test_a_filter_keeps_row_numbers_and_drops_nulls(
    corpus: Any, ending: str, condition: list[Any], expected: list[int]
) -> None:
    table = pa.table(
        {
            "text": list("0123"),
            "n": [0, None, 2, 3],
            "s": ["a", None, "b", None],
            "b": [True, None, True, False],
            "unused": [b""] * 4,
        }
    )
    source_format = put_table(corpus, ending, table)
    rows = corpus.rows(corpus.source(format=source_format, filter=[condition]))
    assert [row["source_row"] for row in rows] == expected
    assert [row["text"].decode() for row in rows] == [str(number) for number in expected]


def test_a_filter_compares_dates_written_as_text(corpus: Any) -> None:
    days = [datetime.date(2024, 1, day) for day in (1, 2, 3)]
    corpus.put("a.parquet", pa.table({"text": ["a", "b", "c"], "day": days}))
    rows = corpus.rows(
        corpus.source(filter=[["day", ">", "2024-01-01"], ["day", "<", "2024-01-03"]])
    )
    assert [row["source_row"] for row in rows] == [1]


def test_prompt_columns_are_plain_json(corpus: Any) -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "text": ["a"],
            "when": pa.array([moment], pa.timestamp("ns", "UTC")),
            "day": [moment.date()],
            "price": [decimal.Decimal("1.10")],
            "score": [float("nan")],
            "far": [float("-inf")],
            "nested": [{"list": [1.5, None], "day": moment.date()}],
            "letter": pa.array(["é"]).dictionary_encode(),
        }
    )
    corpus.put("a.parquet", table)
    names = [name for name in table.schema.names if name != "text"]
    (row,) = corpus.rows(corpus.source(), *names)
    assert json.loads(row["columns"]) == {
        "when": "2024-01-02T03:04:05+00:00",
        "day": "2024-01-02",
        "price": "1.10",
        "score": None,
        "far": None,
        "nested": {"list": [1.5, None], "day": "2024-01-02"},
        "letter": "é",
    }


def test_a_date_beyond_python_fails_its_row_alone(corpus: Any) -> None:
    days = pa.array([0, 10_000_000], pa.int32()).cast(pa.date32())
    corpus.put("a.parquet", pa.table({"text": ["a", "b"], "day": days}))
    first, second = corpus.rows(corpus.source(), "day")
    assert first["error_type"] is None
    assert (second["error_type"], second["text"]) == ("invalid_column", b"b")
    assert "'day'" in second["error_message"]


def not_utf8(values: list[bytes | None]) -> pa.Array:
    """Return strings that are none, as a careless writer leaves them in a file."""
    stored = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), stored.buffers())


def test_invalid_utf8_fails_its_row_or_is_left_to_prepare(corpus: Any) -> None:
    bad = not_utf8([b"ok", b"\xff\xfe", None, b"fine"])
    nested = pa.ListArray.from_arrays([0, 1, 2, 3, 4], bad)
    good = pa.array(list("abcd"))
    corpus.put("a.parquet", pa.table({"text": bad, "key": good, "kept": good, "list": nested}))
    rows = corpus.rows(corpus.source(keep_columns=["list"]))
    assert [row["text"] for row in rows] == [b"ok", b"\xff\xfe", None, b"fine"]
    assert [row["list"] for row in rows] == [["ok"], None, [None], ["fine"]]
    assert [row["error_type"] for row in rows] == [None, "invalid_column", None, None]
    rows = corpus.rows(corpus.source(text_column="key", id_column="text"), "list")
    assert [row["document_id"] for row in rows] == ["ok", None, None, "fine"]
    assert [row["error_type"] for row in rows] == [None, "invalid_column", None, None]


def test_only_the_columns_asked_for_are_read(corpus: Any) -> None:
    corpus.put("a.parquet", make_table(10), compression="none")
    content = bytearray((corpus.storage.read("a.parquet"))[0])
    start = content.find(b"\x00" * 90)
    content[start - 40 : start + 60] = b"\xff" * 100
    corpus.storage.delete("a.parquet")
    corpus.put("a.parquet", bytes(content))
    assert len(corpus.rows(corpus.source(id_column="key"))) == 10


@pytest.mark.parametrize("change", ["replaced", "gone"])
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "txt"])
def test_a_file_that_changed_since_the_plan_is_refused(
    any_corpus: Any, ending: str, change: str
) -> None:
    storage = any_corpus.storage
    source_format = {"txt": "text"}.get(ending, ending)
    content: Any = make_table(5) if ending == "parquet" else as_lines(make_table(5))
    any_corpus.put(f"a.{ending}", content)
    source = any_corpus.source(format=source_format)
    files = any_corpus.describe(source)
    (shard,) = plan_shards(files, source)
    columns = resolve_columns(files, source, ())
    storage.delete(f"a.{ending}")
    if change == "replaced":
        any_corpus.put(f"a.{ending}", b"something else")
    with pytest.raises(InputChangedError, match=f"a.{ending}"):
        read_shard(storage, shard, columns, source)


def test_a_file_that_changed_since_the_listing_is_refused(corpus: Any) -> None:
    corpus.put("a.parquet", make_table(5))
    source = corpus.source()
    (file,) = list_input(source).files
    corpus.storage.delete("a.parquet")
    corpus.put("a.parquet", b"not parquet")
    with pytest.raises(InputChangedError, match=r"a\.parquet has changed"):
        describe_file(corpus.storage, file, source)
