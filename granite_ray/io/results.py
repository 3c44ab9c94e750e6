"""Read the results of a job: the snapshot, or before the first is complete what is committed."""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from granite_ray.errors import ConfigError
from granite_ray.io.commit import RESULTS_FOLDER, read_snapshot
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
        paths = sorted(snapshot.paths) if snapshot else _committed(sink)
        try:
            return _read_files(sink, paths)
        except FileNotFoundError:
            # A new snapshot came between, and its run deleted what it superseded: read again.
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def _committed(sink: Storage) -> list[str]:
    paths = [file.path for file in sink.list(RESULTS_FOLDER)]
    if not paths:
        raise ConfigError(
            f"{sink.root} holds no results. Has a run been started with this sink.path?"
        )
    return paths


def _read_files(sink: Storage, paths: list[str]) -> pa.Table:
    tables = []
    for path in paths:
        with sink.open(path) as file:
            tables.append(pq.read_table(file).replace_schema_metadata(None))
    return pa.concat_tables(tables)
