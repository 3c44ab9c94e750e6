"""The lines of a JSONL file, plain or compressed: where its rows begin, and their bytes.

A row is a line that is not blank; lines end at a line feed and nowhere else. What a line means is
read elsewhere.
"""

import io
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

import pyarrow as pa

from granite_ray.errors import CorruptInputError
from granite_ray.io.storage import Storage

CODECS: dict[str, Literal["gzip", "zstd"]] = {".gz": "gzip", ".zst": "zstd"}
MAX_LINE_BYTES = 512 * 1024**2
"""A longer line is no document but a file of another kind, and would fill the memory."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows that follow one another in a file: what a shard is made of.

    `start_byte` is where its first row begins, in a file that can be sought; `num_bytes` are
    uncompressed and may be an estimate.
    """

    num_rows: int
    num_bytes: int
    start_byte: int = 0


def scan_lines(storage: Storage, path: str, max_rows: int, max_bytes: int) -> list[Stretch]:
    """Count a file's rows, in stretches of at most `max_rows` and `max_bytes` (or one row)."""
    stretches: list[Stretch] = []
    start_byte = num_rows = num_bytes = 0
    can_seek = codec_of(path) is None
    with opened_lines(storage, path) as file:
        for offset, line in _read_lines(file, path):
            if num_rows and (num_rows == max_rows or num_bytes + len(line) > max_bytes):
                stretches.append(Stretch(num_rows, num_bytes, start_byte))
                num_rows = num_bytes = 0
            if not num_rows and can_seek:
                start_byte = offset
            num_rows += 1
            num_bytes += len(line)
    if num_rows:
        stretches.append(Stretch(num_rows, num_bytes, start_byte))
    return stretches


def read_lines(storage: Storage, path: str, start_byte: int, num_skipped: int) -> Generator[bytes]:
    """Yield a file's rows from `start_byte` on, but for the first `num_skipped`."""
    with opened_lines(storage, path) as file:
        if start_byte:
            file.seek(start_byte)
        for index, (_, line) in enumerate(_read_lines(file, path)):
            if index >= num_skipped:
                yield line


def codec_of(path: str) -> Literal["gzip", "zstd"] | None:
    """Return the codec that a file's ending names, None for a plain file."""
    return next((codec for ending, codec in CODECS.items() if path.lower().endswith(ending)), None)


@contextmanager
def opened_lines(storage: Storage, path: str) -> Iterator[BinaryIO]:
    """Open a file and decompress it as its ending tells."""
    with storage.open(path) as file:
        codec = codec_of(path)
        if codec is None:
            yield file
        else:
            # Arrow's stream, since it is the one that refuses a file cut off at any byte.
            stream = pa.CompressedInputStream(pa.PythonFile(cast(io.IOBase, file), mode="r"), codec)
            yield cast(BinaryIO, io.BufferedReader(stream))


def _read_lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    """Yield each row with its distance from where the file stood."""
    offset = 0
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise CorruptInputError(
                f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes; it is not JSONL."
            )
        if line.strip():
            yield offset, line
        offset += len(line)
