"""How a shard's file and the snapshot appear: once, whole, and only while the lease is held."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from granite_ray.errors import ConfigError, LeaseError, StorageError
from granite_ray.io.commit import (
    SNAPSHOT_PATH,
    CommittedFile,
    Generation,
    Snapshot,
    SnapshotFile,
    commit_shard,
    current_files,
    delete_superseded,
    file_path,
    list_result_files,
    probe_put_if_absent,
    read_records,
    read_snapshot,
    write_snapshot,
)
from granite_ray.io.sinks import CommitRecord, count_rows, read_commit_record
from granite_ray.io.storage import open_storage
from granite_ray.records import ShardPart, output_schema
from tests.faulty_storage import FaultyStorage, MemoryStorage

SCHEMA = output_schema([pa.field("answer", pa.string())], [])
TAG = "abababab"


def rows_of(*answers: str | None) -> pa.Table:
    """Rows with these answers; None is a failed one."""
    values = [
        {
            "document_id": f"d{row}",
            "status": "failed" if answer is None else "ok",
            "answer": answer,
            "error_type": "too_long" if answer is None else None,
            "num_chunks": 1,
            "num_failed_chunks": 0,
            "num_prompt_tokens": 10,
            "num_completion_tokens": 3,
            "task": "t",
            "checkpoint": "c",
            "source_file": "a",
            "source_row": row,
        }
        for row, answer in enumerate(answers)
    ]
    return pa.Table.from_pylist(values, schema=SCHEMA)


def record_of(rows: pa.Table, **changes: Any) -> CommitRecord:
    parts = (ShardPart("a", "etag", 0, rows.num_rows),)
    record = CommitRecord("s", 0, "ab" * 32, 0, "run", parts, **count_rows(rows))
    return replace(record, **changes)


def held() -> None:
    """A lease that is ours."""


def lost() -> None:
    raise LeaseError("another run has taken this output over")


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


def snapshot_of(storage: MemoryStorage, *paths: str, version: str | None = None) -> Snapshot:
    files = tuple(
        SnapshotFile.of(path, record) for path, record in read_records(storage, paths).items()
    )
    return Snapshot("run", "ab" * 32, 0, "in", files, version)


def test_a_committed_file_is_plain_parquet_with_its_record_in_the_footer(tmp_path: Path) -> None:
    storage, rows = open_storage(str(tmp_path)), rows_of("x", None, "é")
    record = commit_shard(storage, rows, record_of(rows), TAG, held)
    path = tmp_path / file_path("s", TAG, 0)
    assert pq.read_table(path).replace_schema_metadata(None) == rows.replace_schema_metadata(None)
    with path.open("rb") as file:
        assert read_commit_record(file, "s") == record
    assert (record.num_ok, record.num_failed, record.num_prompt_tokens) == (2, 1, 30)
    assert record.failures == {"too_long": 1}
    assert record.num_documents == {"a": 3}


def test_who_comes_second_is_told_the_winners_record_and_changes_nothing(
    storage: MemoryStorage,
) -> None:
    rows = rows_of("x", "y")
    first = commit_shard(storage, rows, record_of(rows, run_id="first"), TAG, held)
    before = dict(storage.files)
    late_rows = rows_of("other", None)
    late = record_of(late_rows, run_id="late")
    assert commit_shard(storage, late_rows, late, TAG, held) == first
    assert storage.files == before


@pytest.mark.parametrize("fault", ["repeated", "answer_lost"])
def test_a_put_whose_answer_was_lost_is_recognised_by_the_footer(
    storage: MemoryStorage, fault: Any
) -> None:
    rows = rows_of("x")
    record = record_of(rows)
    faulty = FaultyStorage(storage, 0, fault)
    if fault == "answer_lost":  # the storage gave up: the shard is done again, by a later attempt
        with pytest.raises(StorageError):
            commit_shard(faulty, rows, record, TAG, held)
    assert commit_shard(faulty, rows, record, TAG, held) == record
    assert [file.path for file in list_result_files(storage)] == [file_path("s", TAG, 0)]


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "cd" * 32},
        {"parts": (ShardPart("a", "another etag", 0, 1),)},
        {"shard_id": "another"},
    ],
)
def test_a_file_of_another_job_under_the_name_is_refused(
    storage: MemoryStorage, changes: dict[str, Any]
) -> None:
    rows = rows_of("x")
    there = record_of(rows, **changes)
    commit_shard(storage, rows, there, TAG, held)
    storage.files[file_path("s", TAG, 0)] = storage.files[file_path(there.shard_id, TAG, 0)]
    with pytest.raises(StorageError, match="another job"):
        commit_shard(storage, rows, record_of(rows), TAG, held)


def test_nothing_is_written_without_the_lease(storage: MemoryStorage) -> None:
    rows = rows_of("x")
    path = file_path("s", TAG, 0)
    with pytest.raises(LeaseError):
        commit_shard(storage, rows, record_of(rows), TAG, lost)
    assert not storage.files
    commit_shard(storage, rows, record_of(rows), TAG, held)
    with pytest.raises(LeaseError):
        write_snapshot(storage, snapshot_of(storage, path), lost)
    with pytest.raises(LeaseError):
        delete_superseded(storage, snapshot_of(storage), lost)
    assert set(storage.files) == {path}


def test_rows_that_are_not_those_counted_are_never_committed(storage: MemoryStorage) -> None:
    with pytest.raises(AssertionError, match="2 rows, counted 1"):
        commit_shard(storage, rows_of("x", "y"), record_of(rows_of("x")), TAG, held)
    assert not storage.files


def test_a_snapshot_is_read_back_as_it_was_written(storage: MemoryStorage) -> None:
    rows = rows_of("x", None)
    commit_shard(storage, rows, record_of(rows, bad_files={"b": "cut"}), TAG, held)
    assert read_snapshot(storage) is None
    written = snapshot_of(storage, file_path("s", TAG, 0))
    write_snapshot(storage, written, held)
    found = read_snapshot(storage)
    assert found is not None
    assert found == replace(written, version=storage.files[SNAPSHOT_PATH][1])
    assert found.files[0].failures == {"too_long": 1}
    assert found.files[0].bad_files == {"b": "cut"}


def test_a_snapshot_replaced_meanwhile_is_not_overwritten(storage: MemoryStorage) -> None:
    write_snapshot(storage, snapshot_of(storage), held)
    seen = read_snapshot(storage)
    assert seen is not None
    write_snapshot(storage, seen, held)
    before = storage.files[SNAPSHOT_PATH]
    with pytest.raises(StorageError, match="replaced by another run"):
        write_snapshot(storage, seen, held)
    assert storage.files[SNAPSHOT_PATH] == before


def test_what_the_snapshot_does_not_list_is_deleted_and_other_files_stay(
    storage: MemoryStorage,
) -> None:
    rows = rows_of("x")
    for shard_id, revision in (("s", 0), ("s", 1), ("gone", 0)):
        record = record_of(rows, shard_id=shard_id, revision=revision)
        commit_shard(storage, rows, record, TAG, held)
    storage.put_if_absent("results/notes.txt", b"a user's own")
    kept = file_path("s", TAG, 1)
    assert delete_superseded(storage, snapshot_of(storage, kept), held) == 2
    assert set(storage.files) == {kept, "results/notes.txt"}


def test_of_several_revisions_the_highest_counts_and_other_generations_never() -> None:
    names = [("s", TAG, 2), ("s", TAG, 10), ("s", "cdcdcdcd", 11), ("r", "cdcdcdcd", 0)]
    files = [CommittedFile(file_path(*name), *name) for name in names]
    assert current_files(files, TAG) == {"s": files[1]}


@pytest.mark.parametrize("shard_id", ["a", "a.b", "a.12345678.r3", "ü-x.parquet", "part-000.r1"])
def test_a_files_name_tells_its_shard_whatever_the_shard_is_called(
    storage: MemoryStorage, shard_id: str
) -> None:
    path = file_path(shard_id, TAG, 12)
    storage.put_if_absent(path, b"")
    assert list_result_files(storage) == [CommittedFile(path, shard_id, TAG, 12)]


def test_each_restart_moves_the_names_of_files_on() -> None:
    tags = [Generation("ffffffff" + "0" * 56, number).tag for number in range(3)]
    assert tags == ["ffffffff", "00000000", "00000001"]


class IgnoresPutIfAbsent(MemoryStorage):
    """A storage that takes every put, as some imitations of S3 do."""

    def put_if_absent(self, path: str, data: bytes | memoryview) -> None:
        self.files[path] = (bytes(data), "0")


def test_a_storage_that_ignores_put_if_absent_is_refused_and_left_clean() -> None:
    storage = IgnoresPutIfAbsent()
    with pytest.raises(ConfigError, match="put-if-absent"):
        probe_put_if_absent(storage, "run")
    assert not storage.files


@pytest.mark.parametrize("at", [None, 0, 1])
def test_a_storage_that_honours_it_passes_also_where_answers_are_lost(at: int | None) -> None:
    storage = MemoryStorage()
    probe_put_if_absent(FaultyStorage(storage, at, "repeated"), "run")
    assert not storage.files


def test_a_damaged_file_and_one_of_someone_else_are_named(storage: MemoryStorage) -> None:
    rows = rows_of("x")
    commit_shard(storage, rows, record_of(rows), TAG, held)
    path = file_path("s", TAG, 0)
    whole = storage.files[path][0]
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    for data in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], sink.getvalue().to_pybytes()):
        storage.files[path] = (data, "1")
        with pytest.raises(StorageError, match=f"{path} is not a committed shard"):
            read_records(storage, [path])
