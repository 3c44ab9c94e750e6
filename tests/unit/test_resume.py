"""What a run still has to do, decided on names, footers and the snapshot."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from granite_ray.errors import ConflictError
from granite_ray.io.columns import SourceColumns
from granite_ray.io.commit import (
    Generation,
    Snapshot,
    SnapshotFile,
    commit_shard,
    file_path,
    read_records,
)
from granite_ray.io.lease import Lease
from granite_ray.io.sinks import CommitRecord
from granite_ray.output import HeldOutput
from granite_ray.planning import InputPlan
from granite_ray.records import Shard, ShardPart, output_schema
from granite_ray.report import RunReport
from granite_ray.resume import MAX_REUSED_FILES, check_source, resume_plan
from granite_ray.stages import ShardWork
from tests.faulty_storage import FaultyStorage, MemoryStorage

FINGERPRINT = "ab" * 32
GENERATION = Generation(FINGERPRINT)
EMPTY = output_schema([], []).empty_table()


def shard(name: str, start: int = 0, identity: str = "v1") -> Shard:
    return Shard(f"{name}-{identity}-{start}", (ShardPart(name, identity, start, start + 10),))


def plan_of(*shards: Shard, root: str = "in") -> InputPlan:
    columns = SourceColumns("text", None, (), (), ())
    return InputPlan(root, shards, columns, 10 * len(shards), is_exact=True)


def put(storage: MemoryStorage, shard: Shard, **changes: Any) -> str:
    """Put a committed file of ten documents there; return its path."""
    values: dict[str, Any] = {
        "num_ok": 10,
        "num_documents": {part.path: 10 for part in shard.parts},
    } | changes
    record = CommitRecord(shard.shard_id, 0, FINGERPRINT, 0, "run", shard.parts)
    record = replace(record, **values)
    rows = EMPTY
    counted = record.num_rows
    if counted:  # what is decided here looks at footers only
        columns = [pa.nulls(counted, field.type) for field in EMPTY.schema]
        rows = pa.table(columns, names=EMPTY.schema.names)
    tag = values.get("tag", GENERATION.tag)
    commit_shard(storage, rows, record, tag, lambda: None)
    return file_path(shard.shard_id, tag, record.revision)


def output_on(storage: Any, snapshot: Snapshot | None = None) -> HeldOutput:
    report = RunReport("run", "t", "c", storage.root, versions={})
    return HeldOutput(storage, Lease(storage, "run", 30), report, GENERATION, snapshot)


def snapshot_of(storage: MemoryStorage, *paths: str) -> Snapshot:
    records: Mapping[str, CommitRecord] = read_records(storage, paths)
    files = tuple(SnapshotFile.of(path, records[path]) for path in paths)
    return Snapshot("run", FINGERPRINT, 0, "in", files)


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


def test_committed_shards_are_dropped_from_the_plan(storage: MemoryStorage) -> None:
    put(storage, shard("a"))
    found = resume_plan(plan_of(shard("a"), shard("b")), output_on(storage))
    assert found.work == (ShardWork(shard("b")),)
    assert list(found.committed) == ["a-v1-0"]
    assert found.committed["a-v1-0"].num_ok == 10


def test_files_of_the_snapshot_are_not_opened(storage: MemoryStorage) -> None:
    paths = [put(storage, shard("a", start)) for start in range(0, 100, 10)]
    snapshot = snapshot_of(storage, *paths[:-1])
    plan = plan_of(*(shard("a", start) for start in range(0, 100, 10)))
    watched = FaultyStorage(storage)
    resume_plan(plan, output_on(watched, snapshot))
    assert watched.num_calls == 2, "one listing, and the one footer that the snapshot does not know"


def test_a_changed_file_reuses_the_rows_of_its_old_shards_and_of_no_other(
    storage: MemoryStorage,
) -> None:
    old = [put(storage, shard("a", start)) for start in (0, 10)]
    put(storage, shard("b"))
    found = resume_plan(plan_of(shard("a", 0, "v2"), shard("b")), output_on(storage))
    assert found.work == (ShardWork(shard("a", 0, "v2"), 0, tuple(sorted(old))),)
    assert list(found.committed) == ["b-v1-0"]


def test_of_a_very_large_changed_file_the_nearest_rows_are_looked_at(
    storage: MemoryStorage,
) -> None:
    starts = range(0, 1000, 10)
    for start in starts:
        put(storage, shard("a", start))
    found = resume_plan(plan_of(shard("a", 500, "v2")), output_on(storage))
    reused = found.work[0].reuse
    assert len(reused) == MAX_REUSED_FILES
    distances = [abs(int(path.split(".")[0].rpartition("-")[2]) - 500) for path in reused]
    assert max(distances) <= 10 * (MAX_REUSED_FILES // 2 + 1)


def test_files_of_another_generation_count_for_nothing(storage: MemoryStorage) -> None:
    put(storage, shard("a"))
    output = output_on(storage)
    output.generation = Generation(FINGERPRINT, 1)
    found = resume_plan(plan_of(shard("a")), output)
    assert found.work == (ShardWork(shard("a")),)
    assert not found.committed


def test_only_a_redrive_does_failed_rows_again_as_the_next_revision(
    storage: MemoryStorage,
) -> None:
    put(storage, shard("a"), num_ok=8, num_failed=2)
    path = put(storage, shard("a"), num_ok=9, num_failed=1, revision=1)
    put(storage, shard("b"))
    plan = plan_of(shard("a"), shard("b"))
    assert not resume_plan(plan, output_on(storage)).work
    found = resume_plan(plan, output_on(storage), redrive=True)
    assert found.work == (ShardWork(shard("a"), 2, (path,)),)
    assert list(found.committed) == ["b-v1-0"]


def vanished(storage: MemoryStorage, *, of: int, gone: int) -> tuple[InputPlan, Snapshot]:
    shards = [shard(f"f{number}") for number in range(of)]
    snapshot = snapshot_of(storage, *(put(storage, item) for item in shards))
    return plan_of(*shards[gone:]), snapshot


@pytest.mark.parametrize(("gone", "is_refused"), [(0, False), (5, False), (6, True)])
def test_more_vanished_documents_than_allowed_are_refused_with_their_number(
    storage: MemoryStorage, gone: int, is_refused: bool
) -> None:
    plan, snapshot = vanished(storage, of=10, gone=gone)
    found = resume_plan(plan, output_on(storage, snapshot))
    assert found.num_vanished == 10 * gone
    if is_refused:
        with pytest.raises(ConflictError, match="60 of 100 documents have vanished"):
            check_source(plan, snapshot, found, 0.5)
    else:
        check_source(plan, snapshot, found, 0.5)


def test_a_changed_file_has_not_vanished(storage: MemoryStorage) -> None:
    snapshot = snapshot_of(storage, put(storage, shard("a")))
    found = resume_plan(plan_of(shard("a", 0, "v2")), output_on(storage, snapshot))
    assert found.num_vanished == 0


def test_another_root_is_refused_by_name_and_a_first_run_never_is(storage: MemoryStorage) -> None:
    plan = plan_of(shard("a"), root="elsewhere")
    found = resume_plan(plan, output_on(storage))
    check_source(plan, None, found, 0.5)
    with pytest.raises(ConflictError, match=r"root elsewhere, but these results are of in\."):
        check_source(plan, snapshot_of(storage), found, 0.5)
