"""What a run still has to do: the plan less what is committed, and whose rows may be taken over.

Plain decisions on names and counts; reads footers, writes nothing.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from granite_ray.errors import ConflictError
from granite_ray.io.commit import (
    CommittedFile,
    Snapshot,
    SnapshotFile,
    current_files,
    list_result_files,
    read_records,
)
from granite_ray.io.sinks import CommitRecord
from granite_ray.io.storage import Storage
from granite_ray.output import HeldOutput
from granite_ray.planning import InputPlan
from granite_ray.records import Shard
from granite_ray.stages import ShardWork

MAX_REUSED_FILES = 32
"""Result files looked at for one part of a shard. Rows that moved further are answered again."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """What is to be done, what is committed (by shard), and documents whose files vanished."""

    work: tuple[ShardWork, ...]
    committed: Mapping[str, SnapshotFile]
    num_vanished: int


def resume_plan(plan: InputPlan, output: HeldOutput, *, redrive: bool = False) -> Resumption:
    """Drop committed shards from a plan; let the rest reuse rows of superseded files.

    Footers are read only of files outside the snapshot and of superseded ones. With `redrive`,
    a shard with failed rows is done again as its next revision, which takes over its other rows.
    """
    sink, snapshot = output.sink, output.snapshot
    current = current_files(list_result_files(sink), output.generation.tag)
    planned = {shard.shard_id for shard in plan.shards}
    superseded = [file.path for shard_id, file in current.items() if shard_id not in planned]
    old_records = read_records(sink, superseded)
    places = _places_by_source(old_records)
    there = {shard_id: file for shard_id, file in current.items() if shard_id in planned}
    committed = describe_files(sink, there.values(), snapshot)
    work = []
    for shard in plan.shards:
        shard_id = shard.shard_id
        if shard_id not in committed:
            work.append(ShardWork(shard, 0, _reusable_paths(shard, places)))
        elif redrive and committed[shard_id].num_failed:
            path = committed.pop(shard_id).path
            work.append(ShardWork(shard, there[shard_id].revision + 1, (path,)))
    vanished = _count_vanished(old_records, snapshot, plan.paths)
    return Resumption(tuple(work), committed, vanished)


def describe_files(
    sink: Storage, files: Iterable[CommittedFile], snapshot: Snapshot | None
) -> dict[str, SnapshotFile]:
    """Return the counts of committed files by shard id, from the snapshot where it lists them."""
    listed = {file.path: file for file in snapshot.files} if snapshot else {}
    files = list(files)
    records = read_records(sink, [file.path for file in files if file.path not in listed])
    read = {path: SnapshotFile.of(path, record) for path, record in records.items()}
    return {file.shard_id: listed.get(file.path) or read[file.path] for file in files}


def check_source(
    plan: InputPlan,
    snapshot: Snapshot | None,
    resumption: Resumption,
    max_vanished_fraction: float,
) -> None:
    """Refuse a source that does not look like the last one.

    Raises:
        ConflictError: Another source root, or too many documents whose files vanished.
    """
    if snapshot is None:
        return
    if snapshot.source_root != plan.root:
        raise ConflictError(
            f"source.path has the root {plan.root}, but these results are of "
            f"{snapshot.source_root}. Use another sink.path, or --allow-vanished to replace them."
        )
    total = sum(file.num_ok + file.num_failed for file in snapshot.files)
    if resumption.num_vanished > max_vanished_fraction * total:
        raise ConflictError(
            f"The files of {resumption.num_vanished:,} of {total:,} documents have vanished from "
            f"{plan.root}, more than sink.max_vanished_fraction ({max_vanished_fraction:g}). "
            "Look whether the input is complete, or use --allow-vanished."
        )


def _places_by_source(records: Mapping[str, CommitRecord]) -> dict[str, list[tuple[int, str]]]:
    """Map each input file to the result files that hold its rows, with their first row."""
    places = defaultdict(list)
    for path, record in sorted(records.items()):
        for part in record.parts:
            places[part.path].append((part.start_row, path))
    return places


def _reusable_paths(
    shard: Shard, places: Mapping[str, Sequence[tuple[int, str]]]
) -> tuple[str, ...]:
    """Choose result files that may hold a shard's rows: the nearest, lest all shards read all."""
    paths = set()
    for part in shard.parts:
        nearest = sorted(places.get(part.path, ()), key=lambda at: abs(at[0] - part.start_row))
        paths |= {path for _, path in nearest[:MAX_REUSED_FILES]}
    return tuple(sorted(paths))


def _count_vanished(
    records: Mapping[str, CommitRecord], snapshot: Snapshot | None, inputs: Collection[str]
) -> int:
    listed = snapshot.paths if snapshot else frozenset()
    return sum(
        count
        for path, record in records.items()
        if path in listed
        for name, count in record.num_documents.items()
        if name not in inputs
    )
