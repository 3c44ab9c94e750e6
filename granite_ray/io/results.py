"""Read the results of a job: the snapshot, or before the first is complete what is committed."""

import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from granite_ray.errors import ConfigError
from granite_ray.io.commit import (
    JOB_PATH,
    Generation,
    current_files,
    list_result_files,
    read_snapshot,
)
from granite_ray.io.storage import Storage, open_storage

ATTEMPTS = 5


def read_results(path: str, open_storage: Callable[[str], Storage] = open_storage) -> pa.Table:
    """Return all rows of an output, exact at every moment, also while a run replaces them.

    Args:
        path: The job's `sink.path`.
        open_storage: Opens it.

    Raises:
        ConfigError: If there are no results.
    """
    sink = open_storage(path)
    for attempt in range(ATTEMPTS):
        snapshot = read_snapshot(sink)
        try:
            if snapshot:
                return _read_files(sink, sorted(snapshot.paths))
            rows = _committed_rows(sink)
            if read_snapshot(sink) is None:
                return rows
        except FileNotFoundError:
            # A new snapshot came between, and its run deleted what it superseded: read again.
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def _committed_rows(sink: Storage) -> pa.Table:
    """Return what is committed before there is a snapshot, each document once.

    Shards of a killed run whose input has changed since, or of one with a limit, may lie beside
    those that take their place.
    """
    paths = sorted(
        file.path for file in current_files(list_result_files(sink), _tag(sink)).values()
    )
    if not paths:
        raise _no_results(sink)
    rows = _read_files(sink, paths)
    places = rows.select(["source_file", "source_row"]).append_column(
        "index", pa.array(np.arange(rows.num_rows))
    )
    firsts = places.group_by(["source_file", "source_row"]).aggregate([("index", "min")])
    return rows.take(firsts["index_min"].sort())


def _tag(sink: Storage) -> str:
    """Return what the files of the present generation are named by."""
    try:
        job = json.loads(sink.read(JOB_PATH)[0])
    except FileNotFoundError as error:
        raise _no_results(sink) from error
    return Generation(job["fingerprint"], job["generation"]).tag


def _no_results(sink: Storage) -> ConfigError:
    return ConfigError(f"{sink.root} holds no results. Has a run been started with this sink.path?")


def _read_files(sink: Storage, paths: list[str]) -> pa.Table:
    tables = []
    for path in paths:
        with sink.open(path) as file:
            tables.append(pq.read_table(file).replace_schema_metadata(None))
    return pa.concat_tables(tables) if tables else pa.table({})  # files without rows have no shard
