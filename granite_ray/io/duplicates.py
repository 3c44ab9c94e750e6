"""`source.on_duplicate: error`: whether an id occurs twice, by 8 bytes an id.

Each file is hashed on its own, anywhere; only where two hashes agree are ids read again.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from granite_ray.config import SourceConfig
from granite_ray.errors import CorruptInputError
from granite_ray.io.input_files import InputFile
from granite_ray.io.raw import default_id
from granite_ray.io.sources import SourceColumns, read_part
from granite_ray.io.storage import Storage
from granite_ray.records import ShardPart


def id_hashes(
    storage: Storage, file: InputFile, columns: SourceColumns, source: SourceConfig
) -> NDArray[np.uint64]:
    """Return the hash of each id in a file; rows without an id, or filtered out, have none."""
    ids = (document_id for document_id, _ in _read_ids(storage, file, columns, source))
    return np.fromiter((_hash(document_id) for document_id in ids), np.uint64)


def find_duplicates(
    storage: Storage,
    files: Sequence[InputFile],
    hashes: Sequence[NDArray[np.uint64]],
    columns: SourceColumns,
    source: SourceConfig,
) -> tuple[str, str] | None:
    """Return two places (`file#row`) that have the same id, None where all ids differ.

    Args:
        storage: The storage of the source's root.
        files: The input files.
        hashes: What `id_hashes` returned for each of them.
        columns: As resolved for the files.
        source: Where the documents come from.
    """
    values, counts = np.unique(np.concatenate([*hashes, _NONE]), return_counts=True)
    repeated = values[counts > 1]
    suspects = frozenset(repeated.tolist())
    places: dict[str, str] = {}
    for file, own in zip(files, hashes, strict=True):
        if not np.isin(own, repeated).any():
            continue
        for document_id, row in _read_ids(storage, file, columns, source):
            if _hash(document_id) not in suspects:
                continue
            if document_id in places:
                return places[document_id], default_id(file.path, row)
            places[document_id] = default_id(file.path, row)
    return None


_NONE: NDArray[np.uint64] = np.empty(0, np.uint64)
"""Joined to the hashes, so that a corpus without files has an array too."""


def _read_ids(
    storage: Storage, file: InputFile, columns: SourceColumns, source: SourceConfig
) -> Iterator[tuple[str, int]]:
    """Yield each id and its row; a corrupt file that may be skipped ends early."""
    whole = ShardPart(file.path, file.identity)
    try:
        for table in read_part(storage, whole, columns.ids_only(), source):
            rows = table.select(["document_id", "source_row"]).to_pylist()
            yield from (
                (row["document_id"], row["source_row"])
                for row in rows
                if row["document_id"] is not None
            )
    except CorruptInputError:
        if source.on_bad_file == "fail":
            raise


def _hash(document_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest())
