"""Rows of superseded files whose answers still hold are taken over instead of asked again.

An answer holds where the content hash agrees: it covers everything of a document that the prompt
sees, and the files are of the same fingerprint.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from granite_ray.io.storage import Storage

POSITION = "position"
"""Where a row stands in its shard, while answered and reused rows travel apart."""

TAKEN_ANEW = ("document_id", "source_file", "source_row")


def number_rows(prepared: pa.Table) -> pa.Table:
    """Add the column `position`: where each prepared document stands in its shard."""
    return prepared.append_column(POSITION, pa.array(np.arange(prepared.num_rows, dtype=np.int64)))


def reusable_rows(
    prepared: pa.Table, sink: Storage, paths: Sequence[str], schema: pa.Schema
) -> pa.Table:
    """Return the rows of a prepared shard that are answered already, with their `position`.

    Args:
        prepared: Numbered documents with their kept columns.
        sink: Where the committed files are.
        paths: Files of the same fingerprint whose `ok` rows may be taken over.
        schema: The output schema.
    """
    old = _ok_rows(sink, paths, schema)
    matches = pc.index_in(prepared["content_hash"], old["content_hash"].combine_chunks())
    is_reused = pc.and_(pc.is_valid(matches), pc.is_null(prepared["error_type"]))
    fresh = prepared.filter(is_reused)
    rows = old.take(matches.filter(is_reused)).append_column(POSITION, fresh[POSITION])
    for index, field in enumerate(schema):
        if field.name in TAKEN_ANEW or field.name in _kept_names(prepared, schema):
            rows = rows.set_column(index, field, fresh[field.name].cast(field.type))
    return rows


def rows_to_do(prepared: pa.Table, reused: Sequence[pa.Table]) -> pa.Table:
    """Return the numbered documents that some job has to answer: not reused by every one."""
    positions = [set(rows[POSITION].to_pylist()) for rows in reused]
    done = set.intersection(*positions)
    if not done:
        return prepared
    return prepared.filter([at not in done for at in prepared[POSITION].to_pylist()])


def join_rows(answered: pa.Table, reused: pa.Table) -> pa.Table:
    """Put answered and reused rows of a shard back into the order of its input."""
    return pa.concat_tables([answered, reused]).sort_by(POSITION).drop_columns([POSITION])


def _ok_rows(sink: Storage, paths: Sequence[str], schema: pa.Schema) -> pa.Table:
    tables = [schema.empty_table()]
    for path in paths:
        with sink.open(path) as file:
            table = pq.read_table(file).replace_schema_metadata(schema.metadata)
        ok = pc.and_(pc.equal(table["status"], "ok"), pc.is_valid(table["content_hash"]))
        tables.append(table.filter(ok).cast(schema))
    return pa.concat_tables(tables)


def _kept_names(prepared: pa.Table, schema: pa.Schema) -> set[str]:
    """Columns carried over from the source: those that follow `source_row` in the output."""
    names = schema.names
    return set(names[names.index("source_row") + 1 :]) & set(prepared.schema.names)
