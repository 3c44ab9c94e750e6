"""The stations beside the replicas, as Ray runs them: read and prepare, commit.

A shard travels as ONE row of one Ray block, its tables inside as Arrow IPC: Ray can neither split
it, nor merge it with another, nor drop it because it is empty, nor guess its types.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.config import EngineConfig, JobConfig, JobSection, ModelConfig
from granite_ray.engine.factory import Engine
from granite_ray.errors import ConfigError
from granite_ray.io.commit import Generation, commit_shard, file_path
from granite_ray.io.input_files import check_unchanged
from granite_ray.io.lease import check_lease
from granite_ray.io.reuse import join_rows, number_rows, reusable_rows, rows_to_do
from granite_ray.io.sinks import CommitRecord, count_rows
from granite_ray.io.sources import SourceColumns, read_shard
from granite_ray.io.storage import OpenedStorages, Storage
from granite_ray.parallel.place import RankPlace
from granite_ray.prepare import prepare_shard
from granite_ray.records import Shard, ShardPart
from granite_ray.tasks import TaskLimits
from granite_ray.tokenizer import Tokenizer, load_tokenizer

BEAT_S = 1.0
"""How often a commit shows that it is at work."""


class MakeEngine(Protocol):
    """Builds the engine of one replica, or of one of its ranks, in the process that it is for."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        engine: EngineConfig,
        num_threads: int | None = None,
        place: RankPlace | None = None,
    ) -> Engine:
        """Build it; see `factory.make_engine`."""
        ...


class EngineSections(Protocol):
    """What a replica reads of a config: a job's, or a server's."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def job(self) -> JobSection: ...


class ReplicaContext(Protocol):
    """What a replica's engine needs of its surroundings; it is pickled to every rank."""

    @property
    def config(self) -> EngineSections: ...
    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def run_id(self) -> str: ...
    @property
    def make_engine(self) -> MakeEngine: ...


@dataclass(frozen=True, slots=True)
class ShardWork:
    """A shard that a job has to do: the revision it becomes, files whose rows may be taken over.

    `job` is the job's place among those that share the pass.
    """

    shard: Shard
    revision: int = 0
    reuse: tuple[str, ...] = ()
    job: int = 0

    def to_json(self) -> str:
        """Write it as JSON, for a Ray block."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ShardWork":
        """Read what `to_json` wrote."""
        values = json.loads(text)
        parts = tuple(ShardPart(**part) for part in values["shard"]["parts"])
        shard = Shard(values["shard"]["shard_id"], parts)
        return cls(shard, values["revision"], tuple(values["reuse"]), values["job"])


@dataclass(frozen=True, slots=True)
class StageContext:
    """All that the stages need for one job beside the shard; it is pickled to every worker.

    Stages get one for each job of the pass, mostly a single one. Jobs that share a pass have the
    source, the chunks, the checkpoint and the engine in common: there the first speaks for all.
    """

    config: JobConfig
    checkpoint: Checkpoint
    columns: SourceColumns
    source_root: str
    schema: pa.Schema
    max_chunk_tokens: int
    generation: Generation
    run_id: str
    open_storage: Callable[[str], Storage]
    make_engine: MakeEngine


# read, prepare ───────────────────────────────────────────────────────────────────────────────────


def read_and_prepare(block: pa.Table, contexts: Sequence[StageContext]) -> pa.Table:
    """Read one shard and cut its documents; split off rows whose answers are there already."""
    works, shared = read_work(block), contexts[0]
    storages = OpenedStorages(shared.open_storage)
    source = storages(shared.source_root)
    raw = read_shard(source, works[0].shard, shared.columns, shared.config.source)
    tokenizer = _tokenizer(local_checkpoint(shared).tokenizer_path)
    prepared = number_rows(
        prepare_shard(raw.table, tokenizer, shared.config.chunking, shared.max_chunk_tokens)
    )
    reused = [
        reusable_rows(
            prepared,
            storages(contexts[work.job].config.sink.path),
            work.reuse,
            contexts[work.job].schema,
        )
        for work in works
    ]
    bad_files = json.dumps({bad.path: bad.reason for bad in raw.bad_files})
    known = [block["work"], pa.array([bad_files]), pa.array([storages.num_retries])]
    columns = [*known, pack([rows_to_do(prepared, reused)]), pack(reused)]
    return pa.table(columns, names=["work", "bad_files", "num_retries", "prepared", "reused"])


def write_work(works: Sequence[ShardWork]) -> str:
    """Write what the jobs of a pass have to do of one shard, for a Ray block."""
    return json.dumps([work.to_json() for work in works])


def read_work(block: pa.Table) -> list[ShardWork]:
    """Read what `write_work` wrote: one entry for each job that has this shard to do."""
    return [ShardWork.from_json(text) for text in json.loads(block["work"][0].as_py())]


@lru_cache(maxsize=2)
def _tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer once in a worker process: it takes longer than a shard to read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # shards run side by side already
    return load_tokenizer(path)


def local_checkpoint(context: ReplicaContext) -> Checkpoint:
    """Return the checkpoint where this node can read it; a hub id may be downloaded here."""
    config, planned = context.config, context.checkpoint
    if all(Path(path).is_dir() for path in (planned.path, planned.tokenizer_path)):
        return planned
    found = open_checkpoint(config.model, weights_needed=config.engine.backend != "fake")
    if found.identity != planned.identity:
        raise ConfigError(
            f"model.path {config.model.path} is another checkpoint on node "
            f"{ray.util.get_node_ip_address()} than on the driver's. Give every node the same."
        )
    return found


def task_limits(config: JobConfig, checkpoint: Checkpoint) -> TaskLimits:
    """Return what bounds a task's prompts."""
    return TaskLimits(
        max_model_len=checkpoint.max_model_len,
        max_failed_chunks=config.chunking.max_failed_chunks,
        max_chunk_tokens=config.chunking.max_tokens,
        text_column=config.source.text_column,
    )


# commit ──────────────────────────────────────────────────────────────────────────────────────────


def commit(block: pa.Table, contexts: Sequence[StageContext], journal: Any) -> pa.Table:
    """Commit one shard for each job; return paths and commit records, none where it was skipped.

    Raises:
        InputChangedError: If the input was replaced while it was answered.
        LeaseError: If another run has taken the output over.
        StorageError: If the storage fails.
    """
    if not block["answered"][0].is_valid:
        return pa.Table.from_pylist([], schema=COMMITTED)
    works = read_work(block)
    with _shown_life(journal):
        committed = [_commit(block, at, contexts[work.job]) for at, work in enumerate(works)]
    ray.get(journal.end.remote(works[0].shard.shard_id))
    return pa.Table.from_pylist(committed, schema=COMMITTED)


COMMITTED = pa.schema(
    [
        pa.field("job", pa.int64()),
        pa.field("path", pa.string()),
        pa.field("record", pa.string()),
        pa.field("model_calls", pa.int64()),
        pa.field("num_retries", pa.int64()),
    ]
)


def _commit(block: pa.Table, at: int, context: StageContext) -> dict[str, Any]:
    """Commit the shard for the job that stands at this place in its work."""
    work = read_work(block)[at]
    answered, reused = unpack(block["answered"], at), unpack(block["reused"], at)
    rows = join_rows(answered, reused)
    record = CommitRecord(
        shard_id=work.shard.shard_id,
        revision=work.revision,
        fingerprint=context.generation.fingerprint,
        generation=context.generation.number,
        run_id=context.run_id,
        parts=work.shard.parts,
        num_generated=answered.num_rows,
        num_reused=reused.num_rows,
        bad_files=json.loads(block["bad_files"][0].as_py()),
        **count_rows(rows),
    )
    storages, tag = OpenedStorages(context.open_storage), context.generation.tag
    sink = storages(context.config.sink.path)
    check_unchanged(storages(context.source_root), work.shard.parts)
    record = commit_shard(sink, rows, record, tag, partial(check_lease, sink, context.run_id))
    path = file_path(record.shard_id, tag, record.revision)
    num_read_retries = block["num_retries"][0].as_py() if at == 0 else 0
    return {
        "job": work.job,
        "path": path,
        "record": json.dumps(asdict(record)),
        "model_calls": block["model_calls"][0].as_py()[at],
        "num_retries": num_read_retries + storages.num_retries,
    }


@contextmanager
def _shown_life(journal: Any) -> Iterator[None]:
    """Show life meanwhile: after the last answer the replicas are gone, and no other does it."""
    is_done = threading.Event()

    def beat() -> None:
        while not is_done.wait(BEAT_S):
            journal.show_life.remote()

    threading.Thread(target=beat, name="beat", daemon=True).start()
    try:
        yield
    finally:
        is_done.set()


# tables inside a Ray block ───────────────────────────────────────────────────────────────────────


def pack(tables: Sequence[pa.Table]) -> pa.Array:
    """Return tables as the one value of a column: a list of Arrow IPC streams."""
    sink, ends = pa.BufferOutputStream(), [0]
    for table in tables:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        ends.append(sink.tell())
    offsets = pa.array(ends, pa.int64()).buffers()[1]
    values = pa.Array.from_buffers(pa.large_binary(), len(tables), [None, offsets, sink.getvalue()])
    return pa.LargeListArray.from_arrays(pa.array([0, len(tables)], pa.int64()), values)


def unpack(column: pa.ChunkedArray, at: int = 0) -> pa.Table:
    """Return one of the tables in the one value of a column, without a copy."""
    values = column.chunk(0).flatten()
    first = values.offset + at
    ends = pa.Array.from_buffers(pa.int64(), first + 2, [None, values.buffers()[1]])
    start, stop = ends[first].as_py(), ends[first + 1].as_py()
    with pa.ipc.open_stream(values.buffers()[2].slice(start, stop - start)) as reader:
        return reader.read_all()
