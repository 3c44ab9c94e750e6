"""Rows whose answers still hold are taken over, and the shard keeps the order of its input."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.io.commit import commit_shard, file_path
from granite_ray.io.reuse import POSITION, join_rows, number_rows, reusable_rows, rows_to_do
from granite_ray.io.sinks import CommitRecord, count_rows, result_table
from granite_ray.records import Result, RowError, ShardPart, output_schema, prepared_schema
from tests.faulty_storage import MemoryStorage

KEPT = [pa.field("year", pa.int64())]
SCHEMA = output_schema([pa.field("answer", pa.string())], KEPT).with_metadata(
    {"task": "t", "checkpoint": "c"}
)
TAG = "abababab"


def prepare(contents: list[str | None], name: str = "a", year: int = 2000) -> pa.Table:
    """One document for each content; None is one that was found bad."""
    rows: list[dict[str, Any]] = [
        {
            "document_id": f"{name}{row}",
            "text": content or "",
            "columns": "{}",
            "chunks": [],
            "content_hash": f"hash of {content}" if content else None,
            "error_type": None if content else "null_text",
            "error_message": None if content else "the text is null",
            "source_file": name,
            "source_row": row,
            "year": year,
        }
        for row, content in enumerate(contents)
    ]
    return pa.Table.from_pylist(rows, schema=prepared_schema(KEPT))


def commit(storage: MemoryStorage, prepared: pa.Table, failed: tuple[int, ...] = ()) -> str:
    """Commit answers to prepared documents; return their file's path."""
    results = [
        Result({}, error=RowError(row["error_type"] or "worker_death", "it failed"))
        if row["error_type"] or at in failed
        else Result({"answer": f"answer to {row['text']}"}, num_prompt_tokens=9)
        for at, row in enumerate(prepared.to_pylist())
    ]
    rows = result_table(prepared, results, SCHEMA)
    name = rows["source_file"][0].as_py()
    record = CommitRecord(name, 0, "ab" * 32, 0, "r", (ShardPart(name, "x"),), **count_rows(rows))
    commit_shard(storage, rows, record, TAG, lambda: None)
    return file_path(name, TAG, 0)


def split_tables(
    storage: MemoryStorage, prepared: pa.Table, paths: Sequence[str]
) -> tuple[pa.Table, pa.Table]:
    numbered = number_rows(prepared)
    reused = reusable_rows(numbered, storage, paths, SCHEMA)
    return rows_to_do(numbered, [reused]), reused


def split(
    storage: MemoryStorage, prepared: pa.Table, *paths: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    to_do, reused = split_tables(storage, prepared, paths)
    assert reused.schema.names == [*SCHEMA.names, POSITION]
    return to_do.to_pylist(), reused.to_pylist()


def test_answers_to_the_same_content_are_taken_over_wherever_it_stands_now() -> None:
    storage = MemoryStorage()
    path = commit(storage, prepare(["x", "y", "z"]))
    to_do, reused = split(storage, prepare(["new", "z", "x"], "b", year=2020), path)
    assert [row["text"] for row in to_do] == ["new"]
    assert [(row["answer"], row[POSITION]) for row in reused] == [
        ("answer to z", 1),
        ("answer to x", 2),
    ]
    first = reused[0]
    assert (first["document_id"], first["source_file"], first["source_row"]) == ("b1", "b", 1)
    assert (first["year"], first["num_prompt_tokens"], first["status"]) == (2020, 9, "ok")


def test_failed_rows_and_bad_documents_are_never_taken_over() -> None:
    storage = MemoryStorage()
    path = commit(storage, prepare(["x", "y", None]), failed=(0,))
    to_do, reused = split(storage, prepare(["x", "y", None]), path)
    assert [row["content_hash"] for row in to_do] == ["hash of x", None]
    assert [row["answer"] for row in reused] == ["answer to y"]


def test_one_answer_serves_every_document_of_its_content() -> None:
    storage = MemoryStorage()
    path = commit(storage, prepare(["x"]))
    to_do, reused = split(storage, prepare(["x", "x", "x"]), path)
    assert not to_do
    assert [row["document_id"] for row in reused] == ["a0", "a1", "a2"]


def test_without_files_all_is_to_be_done() -> None:
    to_do, reused = split(MemoryStorage(), prepare(["x", "y"]))
    assert (len(to_do), len(reused)) == (2, 0)


CONTENTS = st.lists(st.sampled_from(["x", "y", "z", "w", None]), max_size=8)


@given(old=st.lists(CONTENTS.filter(len), max_size=3), new=CONTENTS)
@settings(max_examples=60, deadline=None)
def test_split_and_joined_a_shard_has_each_document_once_in_order(
    old: list[list[str | None]], new: list[str | None]
) -> None:
    storage = MemoryStorage()
    paths = [commit(storage, prepare(item, f"old{at}")) for at, item in enumerate(old)]
    to_do, reused = split_tables(storage, prepare(new), paths)
    results = [Result({"answer": f"answer to {text}"}) for text in to_do["text"].to_pylist()]
    answered = result_table(to_do, results, SCHEMA).append_column(POSITION, to_do[POSITION])
    rows = join_rows(answered, reused)
    assert rows.schema.names == SCHEMA.names
    assert rows["source_row"].to_pylist() == list(range(len(new)))
    assert rows["answer"].to_pylist() == [f"answer to {content or ''}" for content in new]
    known = {content for contents in old for content in contents if content}
    assert to_do.num_rows == sum(content not in known for content in new)
