"""Night after night over one output, with a fault at any storage call of any night.

The functions of a run on a storage in memory, without Ray and without a model; beside them a plain
model that knows what every document's row must say. Checked after each night, however it ended: a
shard file is whole or absent, the snapshot is readable and exact, no row is lost or doubled.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from granite_ray.config import JobConfig
from granite_ray.errors import GraniteRayError
from granite_ray.io.columns import SourceColumns
from granite_ray.io.commit import (
    SNAPSHOT_PATH,
    SnapshotFile,
    commit_shard,
    file_path,
    list_result_files,
)
from granite_ray.io.lease import LEASE_PATH
from granite_ray.io.results import read_results
from granite_ray.io.reuse import join_rows, number_rows, reusable_rows, rows_to_do
from granite_ray.io.sinks import CommitRecord, count_rows, read_commit_record, result_table
from granite_ray.output import HeldOutput, hold_output
from granite_ray.planning import InputPlan
from granite_ray.records import Result, RowError, Shard, ShardPart, output_schema, prepared_schema
from granite_ray.report import RunReport
from granite_ray.resume import resume_plan
from granite_ray.stages import ShardWork
from tests.corpus import make_config
from tests.faulty_storage import FAULTS, DriverDiedError, Fault, FaultyStorage, MemoryStorage

SCHEMA = output_schema([pa.field("answer", pa.string())], []).with_metadata(
    {"task": "t", "checkpoint": "c"}
)
ROWS_PER_SHARD = 3
FAILS_ON_BAD_DAYS = 5
"""Documents whose number is divisible by this have a failed row where the day is bad."""

Corpus = dict[str, list[int]]
"""Numbers by file: what is in a document is its number."""
Row = tuple[str, int, str, str | None]
"""File, row, content hash, answer: None in a failed row."""


@dataclass(frozen=True, slots=True)
class Night:
    """What happens before a run, what is asked of it, and what befalls it."""

    changes: tuple[tuple[str, tuple[int, ...]], ...]
    is_bad_day: bool
    wish: str
    fault_at: int | None
    fault: Fault


NIGHTS = st.lists(
    st.builds(
        Night,
        changes=st.lists(
            st.tuples(
                st.sampled_from(["a", "b", "c"]),
                st.lists(st.integers(0, 12), max_size=8).map(tuple),
            ),
            max_size=2,
        ).map(tuple),
        is_bad_day=st.booleans(),
        wish=st.sampled_from(["run", "run", "run", "redrive", "restart"]),
        fault_at=st.one_of(st.none(), st.integers(0, 45)),
        fault=st.sampled_from(FAULTS),
    ),
    min_size=1,
    max_size=7,
)


@given(NIGHTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_call_fails_on_whatever_night_no_row_is_lost_or_doubled(
    nights: list[Night],
) -> None:
    world = World()
    for night in nights:
        world.change(night)
        world.live_through(night)
    quiet = Night((), is_bad_day=False, wish="run", fault_at=None, fault="fails")
    world.live_through(quiet)
    calls = world.num_calls
    world.live_through(quiet)
    assert world.num_calls == calls, "a finished job asked the model again"


@dataclass
class World:
    """An output, the corpus before it, and what a reader may find in it."""

    storage: MemoryStorage = field(default_factory=MemoryStorage)
    corpus: Corpus = field(default_factory=lambda: {"a": [1, 2, 5, 7], "b": [10]})
    generation: int = 0
    num_calls: int = 0
    complete: Counter[tuple[str, int, int]] | None = None
    """(file, row, number) of the documents of the last complete run."""

    def change(self, night: Night) -> None:
        for name, numbers in night.changes:
            self.corpus[name] = list(numbers)
        if not any(self.corpus.values()):
            self.corpus["a"] = [3]

    def live_through(self, night: Night) -> None:
        sink = FaultyStorage(self.storage, night.fault_at, night.fault)
        report = RunReport("", "t", "c", "memory", versions={})
        report.run_id = f"run-{id(report)}-{self.num_calls}"
        before, wanted = self.complete, documents_of(self.corpus)
        try:
            self._run(night, sink, report)
            ended = "done"
        except GraniteRayError as error:
            ended = f"exit {error.exit_code}"
        except DriverDiedError:
            ended = "killed"
        self.storage.delete(LEASE_PATH)  # its process is gone, which the next run sees at once
        self.check_files()
        shown = self.shown()
        assert shown in ((wanted,) if ended == "done" else (before, wanted)), ended
        self.complete = shown
        if ended == "done":
            listed = {file["path"] for file in self.snapshot()["files"]}
            assert {file.path for file in list_result_files(self.storage)} == listed
        if night.fault_at is None or night.fault_at >= sink.num_calls:
            assert ended == "done"

    def _run(self, night: Night, sink: Any, report: RunReport) -> None:
        with hold_output(sink, report, 3600, lambda _: None) as output:
            output.look(CONFIG, "ab" * 32, restart=night.wish == "restart")
            output.claim(CONFIG)
            plan = plan_of(self.corpus)
            resumption = resume_plan(plan, output, redrive=night.wish == "redrive")
            files = list(resumption.committed.values())
            files += [self._commit(work, output, sink, night) for work in resumption.work]
            report.exit_code = 0
            output.complete(files, plan.root)

    def _commit(self, work: ShardWork, output: HeldOutput, sink: Any, night: Night) -> SnapshotFile:
        prepared = number_rows(prepare(work.shard, self.corpus))
        reused = reusable_rows(prepared, sink, work.reuse, SCHEMA)
        to_do = rows_to_do(prepared, [reused])
        self.num_calls += to_do.num_rows
        results = [answer(text, night.is_bad_day) for text in to_do["text"].to_pylist()]
        answered = result_table(to_do, results, SCHEMA).append_column("position", to_do["position"])
        rows = join_rows(answered, reused)
        record = CommitRecord(
            shard_id=work.shard.shard_id,
            revision=work.revision,
            fingerprint=output.generation.fingerprint,
            generation=output.generation.number,
            run_id=output.lease.run_id,
            parts=work.shard.parts,
            num_generated=answered.num_rows,
            num_reused=reused.num_rows,
            **count_rows(rows),
        )
        tag = output.generation.tag
        record = commit_shard(sink, rows, record, tag, output.lease.check)
        return SnapshotFile.of(file_path(record.shard_id, tag, record.revision), record)

    # What a reader finds.

    def check_files(self) -> None:
        """Every result file is whole, and its footer tells what its rows are."""
        for file in list_result_files(self.storage):
            record = read_commit_record(self.storage.open(file.path), file.path)
            rows = pq.read_table(self.storage.open(file.path))
            assert rows.num_rows == record.num_rows
            statuses = Counter(rows["status"].to_pylist())
            assert (statuses["ok"], statuses["failed"]) == (record.num_ok, record.num_failed)
            for row in rows.to_pylist():
                assert row["status"] == ("failed" if row["error_type"] else "ok")
                if row["status"] == "ok":
                    assert row["answer"] == f"answer to {row['content_hash']}"

    def snapshot(self) -> dict[str, Any]:
        return json.loads(self.storage.files[SNAPSHOT_PATH][0])

    def shown(self) -> Counter[tuple[str, int, int]] | None:
        """What the snapshot shows, None before the first; a reader must get through."""
        if SNAPSHOT_PATH not in self.storage.files:
            self.check_unfinished()
            return None
        rows = read_results("memory", lambda _: self.storage).to_pylist()
        files = self.snapshot()["files"]
        counts = Counter(row["status"] for row in rows)
        assert sum(file["num_ok"] for file in files) == counts["ok"]
        assert sum(file["num_failed"] for file in files) == counts["failed"]
        return Counter(
            (row["source_file"], row["source_row"], int(row["content_hash"])) for row in rows
        )

    def check_unfinished(self) -> None:
        """Before the first snapshot a reader sees no document twice."""
        if list_result_files(self.storage):
            rows = read_results("memory", lambda _: self.storage).to_pylist()
            places = Counter((row["source_file"], row["source_row"]) for row in rows)
            assert max(places.values(), default=1) == 1


def documents_of(corpus: Corpus) -> Counter[tuple[str, int, int]]:
    return Counter(
        (name, row, number)
        for name, numbers in corpus.items()
        for row, number in enumerate(numbers)
    )


def plan_of(corpus: Corpus) -> InputPlan:
    """One shard for every few rows of a file, named by what it reads."""
    shards = []
    for name, numbers in sorted(corpus.items()):
        identity = sha256(repr(numbers).encode()).hexdigest()[:8]
        for start in range(0, len(numbers), ROWS_PER_SHARD):
            part = ShardPart(name, identity, start, min(start + ROWS_PER_SHARD, len(numbers)))
            shards.append(Shard(f"{name}-{identity}-{start}", (part,)))
    columns = SourceColumns("text", None, (), (), ())
    return InputPlan("in", tuple(shards), columns, len(documents_of(corpus)), is_exact=True)


def prepare(shard: Shard, corpus: Corpus) -> pa.Table:
    part = shard.parts[0]
    numbers = corpus[part.path][part.start_row : part.stop_row]
    rows = [
        {
            "document_id": f"{part.path}#{row}",
            "text": str(number),
            "columns": "{}",
            "chunks": [],
            "content_hash": str(number),
            "source_file": part.path,
            "source_row": row,
        }
        for row, number in enumerate(numbers, part.start_row)
    ]
    return pa.Table.from_pylist(rows, schema=prepared_schema([]))


def answer(text: str, is_bad_day: bool) -> Result:
    if is_bad_day and int(text) % FAILS_ON_BAD_DAYS == 0:
        return Result({}, error=RowError("worker_death", "a bad day"))
    return Result({"answer": f"answer to {text}"}, num_prompt_tokens=len(text))


CONFIG: JobConfig = make_config("in", "memory")
