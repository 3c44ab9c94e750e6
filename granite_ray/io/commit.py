"""What is committed, superseded and in the snapshot; how a shard's file and the snapshot appear.

The only module that decides which output files count. Runs without Ray.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from granite_ray.errors import ConfigError, StorageError
from granite_ray.io.sinks import CommitRecord, encode_shard, read_commit_record
from granite_ray.io.storage import Storage

RESULTS_FOLDER = "results"
SNAPSHOT_PATH = "_SUCCESS.json"
JOB_PATH = "_granite/job.json"
PROBE_PATH = "_granite/probe"
FILE_NAME = re.compile(r"(?P<shard_id>.+)\.(?P<tag>[0-9a-f]{8})\.r(?P<revision>\d+)\.parquet")
NUM_FOOTER_READERS = 16


@dataclass(frozen=True, slots=True)
class CommittedFile:
    """A result file by its name alone: `results/<shard_id>.<tag>.r<revision>.parquet`."""

    path: str
    shard_id: str
    tag: str
    revision: int


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """One file of a snapshot with its counts, so that no footer need be read again."""

    path: str
    num_ok: int
    num_failed: int
    num_prompt_tokens: int
    num_completion_tokens: int
    failures: Mapping[str, int] = field(default_factory=dict)
    bad_files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, record: CommitRecord) -> "SnapshotFile":
        """Take over what a commit record says."""
        return cls(
            path,
            record.num_ok,
            record.num_failed,
            record.num_prompt_tokens,
            record.num_completion_tokens,
            dict(record.failures),
            dict(record.bad_files),
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files that are the results, as of the last complete run."""

    run_id: str
    fingerprint: str
    generation: int
    source_root: str
    files: tuple[SnapshotFile, ...]
    version: str | None = None

    @property
    def paths(self) -> frozenset[str]:
        """Paths of its files below the sink."""
        return frozenset(file.path for file in self.files)


@dataclass(frozen=True, slots=True)
class Generation:
    """Which answers an output holds: the fingerprint, and how often it was begun afresh."""

    fingerprint: str
    number: int = 0

    @property
    def tag(self) -> str:
        """What file names carry: 8 hex digits of the fingerprint, moved on by each `--restart`."""
        return f"{(int(self.fingerprint[:8], 16) + self.number) % 16**8:08x}"


def file_path(shard_id: str, tag: str, revision: int) -> str:
    """Return the one path that a shard's results of one revision can have."""
    return f"{RESULTS_FOLDER}/{shard_id}.{tag}.r{revision}.parquet"


def list_result_files(storage: Storage) -> list[CommittedFile]:
    """List every result file, of whatever generation and revision."""
    files = []
    for info in storage.list(RESULTS_FOLDER):
        match = FILE_NAME.fullmatch(info.path.removeprefix(f"{RESULTS_FOLDER}/"))
        if match:
            revision = int(match["revision"])
            files.append(CommittedFile(info.path, match["shard_id"], match["tag"], revision))
    return files


def current_files(files: Iterable[CommittedFile], tag: str) -> dict[str, CommittedFile]:
    """Return the file of each shard that counts for `tag`: its highest revision."""
    current: dict[str, CommittedFile] = {}
    for file in sorted(files, key=lambda file: file.revision):
        if file.tag == tag:
            current[file.shard_id] = file
    return current


def read_records(storage: Storage, paths: Iterable[str]) -> dict[str, CommitRecord]:
    """Read the footers of result files, several at a time."""
    paths = list(paths)
    with ThreadPoolExecutor(NUM_FOOTER_READERS) as pool:
        return dict(
            zip(paths, pool.map(lambda path: _read_record(storage, path), paths), strict=True)
        )


def _read_record(storage: Storage, path: str) -> CommitRecord:
    with storage.open(path) as file:
        return read_commit_record(file, path)


def commit_shard(
    storage: Storage,
    rows: pa.Table,
    record: CommitRecord,
    tag: str,
    check_lease: Callable[[], None],
) -> CommitRecord:
    """Make a shard's file appear whole, and return the record of the file that is there.

    Where another attempt was first (or the answer to our own put was lost), its file stays and
    its record is returned: the rows of both are answers to the same question.

    Raises:
        LeaseError: If another run has taken the output over; nothing is written then.
        StorageError: If the storage fails, or the file there belongs to another job.
    """
    if rows.num_rows != record.num_rows:
        raise AssertionError(f"{record.shard_id}: {rows.num_rows} rows, counted {record.num_rows}")
    path = file_path(record.shard_id, tag, record.revision)
    data = encode_shard(rows, record)
    check_lease()
    try:
        storage.put_if_absent(path, data)
    except FileExistsError:
        return _record_of_winner(storage, path, record)
    return record


def _record_of_winner(storage: Storage, path: str, record: CommitRecord) -> CommitRecord:
    winner = _read_record(storage, path)
    same = (winner.shard_id, winner.fingerprint, winner.num_rows, winner.parts)
    if same != (record.shard_id, record.fingerprint, record.num_rows, record.parts):
        raise StorageError(
            f"{storage.root}/{path} holds another job's rows. Choose another sink.path."
        )
    return winner


# snapshot ────────────────────────────────────────────────────────────────────────────────────────


def read_snapshot(storage: Storage) -> Snapshot | None:
    """Return the snapshot of the last complete run, if there was one."""
    try:
        data, version = storage.read(SNAPSHOT_PATH)
    except FileNotFoundError:
        return None
    values = json.loads(data)
    files = tuple(SnapshotFile(**file) for file in values["files"])
    names = ("run_id", "fingerprint", "generation", "source_root")
    return Snapshot(**{name: values[name] for name in names}, files=files, version=version)


def write_snapshot(storage: Storage, snapshot: Snapshot, check_lease: Callable[[], None]) -> None:
    """Replace the snapshot, unless another run did so since `snapshot.version` was read.

    Raises:
        LeaseError: If another run has taken the output over.
        StorageError: If the snapshot changed meanwhile.
    """
    values = asdict(snapshot)
    del values["version"]
    values["totals"] = {
        name: sum(getattr(file, name) for file in snapshot.files)
        for name in ("num_ok", "num_failed", "num_prompt_tokens", "num_completion_tokens")
    }
    check_lease()
    try:
        storage.replace(SNAPSHOT_PATH, json.dumps(values, indent=1).encode(), snapshot.version)
    except FileExistsError as error:
        raise StorageError(
            f"{storage.root}/{SNAPSHOT_PATH} was replaced by another run."
        ) from error


def delete_superseded(storage: Storage, snapshot: Snapshot, check_lease: Callable[[], None]) -> int:
    """Delete every result file that the snapshot does not list; return their number."""
    superseded = [f.path for f in list_result_files(storage) if f.path not in snapshot.paths]
    check_lease()
    for path in superseded:
        storage.delete(path)
    return len(superseded)


def probe_put_if_absent(storage: Storage, run_id: str) -> None:
    """Check that a second put-if-absent really loses on this storage.

    Raises:
        ConfigError: Where the storage lets the second put win: commits would not be exact there.
    """
    path = f"{PROBE_PATH}-{run_id}"
    try:
        with suppress(FileExistsError):  # its answer was lost: nobody else writes this path
            storage.put_if_absent(path, b"first")
        try:
            storage.put_if_absent(path, b"second")
        except FileExistsError:
            return
    finally:
        storage.delete(path)
    raise ConfigError(
        f"sink.path {storage.root}: this storage ignores put-if-absent (a second write of the same "
        "object succeeded), so results could be lost or doubled. Use a storage that honours "
        "If-None-Match."
    )


def delete_probes(storage: Storage) -> None:
    """Delete the probes of runs that were killed before they could."""
    for file in storage.list(PROBE_PATH.rpartition("/")[0]):
        if file.path.startswith(PROBE_PATH):
            storage.delete(file.path)
