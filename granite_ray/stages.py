"""The stations beside the replicas, as Ray runs them: read and prepare, commit.

A shard travels as ONE row of one Ray block, its tables inside as Arrow IPC: Ray can neither split
it, nor merge it with another, nor drop it because it is empty, nor guess its types.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.config import EngineConfig, JobConfig, ModelConfig
from granite_ray.engine.factory import Engine
from granite_ray.errors import ConfigError
from granite_ray.io.commit import Generation, commit_shard, file_path
from granite_ray.io.input_files import check_unchanged
from granite_ray.io.lease import check_lease
from granite_ray.io.reuse import join_rows, split_reusable
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


@dataclass(frozen=True, slots=True)
class ShardWork:
    """A shard to be done: the revision it becomes, and files whose rows may be taken over."""

    shard: Shard
    revision: int = 0
    reuse: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Write it as JSON, for a Ray block."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ShardWork":
        """Read what `to_json` wrote."""
        values = json.loads(text)
        parts = tuple(ShardPart(**part) for part in values["shard"]["parts"])
        shard = Shard(values["shard"]["shard_id"], parts)
        return cls(shard, values["revision"], tuple(values["reuse"]))


@dataclass(frozen=True, slots=True)
class StageContext:
    """All that the stages need beside the shard itself; it is pickled to every worker."""

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


def read_and_prepare(block: pa.Table, context: StageContext) -> pa.Table:
    """Read one shard and cut its documents; split off rows whose answers are there already."""
    work = ShardWork.from_json(block["work"][0].as_py())
    storages = OpenedStorages(context.open_storage)
    source, sink = storages(context.source_root), storages(context.config.sink.path)
    raw = read_shard(source, work.shard, context.columns, context.config.source)
    tokenizer = _tokenizer(local_checkpoint(context).tokenizer_path)
    prepared = prepare_shard(
        raw.table, tokenizer, context.config.chunking, context.max_chunk_tokens
    )
    to_do, reused = split_reusable(prepared, sink, work.reuse, context.schema)
    bad_files = json.dumps({bad.path: bad.reason for bad in raw.bad_files})
    known = [pa.array([work.to_json()]), pa.array([bad_files]), pa.array([storages.num_retries])]
    columns = [*known, pack(to_do), pack(reused)]
    return pa.table(columns, names=["work", "bad_files", "num_retries", "prepared", "reused"])


@lru_cache(maxsize=2)
def _tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer once in a worker process: it takes longer than a shard to read."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # shards run side by side already
    return load_tokenizer(path)


def local_checkpoint(context: StageContext) -> Checkpoint:
    """Return the job's checkpoint where this node can read it; a hub id may be downloaded here."""
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


def commit(block: pa.Table, context: StageContext, journal: Any) -> pa.Table:
    """Commit one shard; return its path and commit record, nulls where it was skipped.

    Raises:
        InputChangedError: If the input was replaced while it was answered.
        LeaseError: If another run has taken the output over.
        StorageError: If the storage fails.
    """
    if not block["answered"][0].is_valid:
        return _committed(None, None)
    work = ShardWork.from_json(block["work"][0].as_py())
    with _shown_life(journal):
        committed = _commit(block, work, context)
    ray.get(journal.end.remote(work.shard.shard_id))
    return committed


def _commit(block: pa.Table, work: ShardWork, context: StageContext) -> pa.Table:
    answered, reused = unpack(block["answered"]), unpack(block["reused"])
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
    num_retries = block["num_retries"][0].as_py() + storages.num_retries
    return _committed(
        path, json.dumps(asdict(record)), block["model_calls"][0].as_py(), num_retries
    )


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


def _committed(
    path: str | None, record: str | None, model_calls: int = 0, num_retries: int = 0
) -> pa.Table:
    return pa.table(
        {
            "path": pa.array([path], pa.string()),
            "record": pa.array([record], pa.string()),
            "model_calls": pa.array([model_calls]),
            "num_retries": pa.array([num_retries]),
        }
    )


# tables inside a Ray block ───────────────────────────────────────────────────────────────────────


def pack(table: pa.Table) -> pa.Array:
    """Return a table as Arrow IPC in one binary value."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    offsets = pa.array([0, data.size], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def unpack(column: pa.ChunkedArray) -> pa.Table:
    """Return the table in the one value of a column, without a copy."""
    with pa.ipc.open_stream(column[0].as_buffer()) as reader:
        return reader.read_all()
