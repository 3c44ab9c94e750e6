"""Results → the bytes of one output file; its Parquet footer is the commit record.

Knows the shape of a committed shard, not where it is stored nor when it may be.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from granite_ray.errors import StorageError
from granite_ray.records import PREPARED_FIELDS, Result, Shard, ShardPart

RECORD_KEY = b"granite_ray"
SCHEMA_VERSION = 1
ROW_GROUP_SIZE = 10_000
CARRIED_COLUMNS = ("document_id", "content_hash", "source_file", "source_row")
"""What a row takes over from its prepared document beside the kept columns; its `text` is not."""


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """What the footer of a committed shard says: which input it covers, and what became of it.

    `num_documents` counts the rows by input file; it is how a later run knows what share of the
    documents vanished with their files.
    """

    shard_id: str
    revision: int
    fingerprint: str
    generation: int
    run_id: str
    parts: tuple[ShardPart, ...]
    num_ok: int = 0
    num_failed: int = 0
    num_generated: int = 0
    num_reused: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    num_documents: Mapping[str, int] = field(default_factory=dict)
    bad_files: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def num_rows(self) -> int:
        """Rows of the file: one for every input document of the shard."""
        return self.num_ok + self.num_failed

    @property
    def shard(self) -> Shard:
        """The shard that the file covers."""
        return Shard(self.shard_id, self.parts)


def result_table(prepared: pa.Table, results: Sequence[Result], schema: pa.Schema) -> pa.Table:
    """Put one result beside each prepared document, in the order of the documents.

    Args:
        prepared: `records.PREPARED_FIELDS` and the kept columns; row i belongs to `results[i]`.
        results: What the task says of each document.
        schema: `records.output_schema`, with `task` and `checkpoint` in its metadata.
    """
    constants = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    carried = {*CARRIED_COLUMNS, *prepared.schema.names[len(PREPARED_FIELDS) :]}
    columns = []
    for column in schema:
        if column.name in _RESULT_COLUMNS:
            values = [_RESULT_COLUMNS[column.name](result) for result in results]
            columns.append(pa.array(values, column.type))
        elif column.name in constants:
            columns.append(pa.repeat(pa.scalar(constants[column.name], column.type), len(results)))
        elif column.name in carried:
            columns.append(prepared.column(column.name).cast(column.type))
        else:
            values = [result.values.get(column.name) for result in results]
            columns.append(pa.array(values, column.type))
    return pa.table(columns, schema=schema)


_RESULT_COLUMNS: dict[str, Any] = {
    "status": lambda result: "failed" if result.error else "ok",
    "error_type": lambda result: result.error.error_type if result.error else None,
    "error_message": lambda result: result.error.message if result.error else None,
    "num_chunks": lambda result: result.num_chunks,
    "num_failed_chunks": lambda result: result.num_failed_chunks,
    "num_prompt_tokens": lambda result: result.num_prompt_tokens,
    "num_completion_tokens": lambda result: result.num_completion_tokens,
    "finish_reason": lambda result: result.finish_reason,
}


def count_rows(rows: pa.Table) -> dict[str, Any]:
    """Return the counts of a `CommitRecord` as the rows themselves give them."""
    failed = rows.filter(pc.equal(rows["status"], "failed"))
    return {
        "num_ok": rows.num_rows - failed.num_rows,
        "num_failed": failed.num_rows,
        "num_prompt_tokens": pc.sum(rows["num_prompt_tokens"]).as_py() or 0,
        "num_completion_tokens": pc.sum(rows["num_completion_tokens"]).as_py() or 0,
        "failures": _value_counts(failed["error_type"]),
        "num_documents": _value_counts(rows["source_file"]),
    }


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}


def encode_shard(rows: pa.Table, record: CommitRecord) -> pa.Buffer:
    """Return the Parquet file of a shard, with its record in the footer."""
    metadata = {RECORD_KEY: json.dumps(asdict(record), separators=(",", ":")).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        row_group_size=ROW_GROUP_SIZE,
        store_schema=True,
    )
    return sink.getvalue()


def read_commit_record(file: BinaryIO, path: str) -> CommitRecord:
    """Read the footer of a committed shard.

    Raises:
        StorageError: Where the file is no output of ours, or is damaged.
    """
    try:
        metadata = pq.read_metadata(file).metadata or {}
        values = json.loads(metadata[RECORD_KEY])
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise StorageError(
            f"{path} is not a committed shard or is damaged ({error}). Move it away and run again."
        ) from error
    parts = tuple(ShardPart(**part) for part in values.pop("parts"))
    return CommitRecord(parts=parts, **values)
