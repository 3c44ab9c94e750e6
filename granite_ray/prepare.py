"""A shard's raw rows → documents with chunks of token ids; what is wrong with a row is found here.

A bad row keeps its place and says what is wrong with it. Text is never altered: a byte order mark,
a NUL or an odd line end stays, so that offsets mean the text as it was read.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.chunking import MIN_CHUNK_TOKENS, chunk_text
from granite_ray.config import ChunkingConfig
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import (
    CHUNK_TYPE,
    PREPARED_FIELDS,
    RAW_FIELDS,
    Chunk,
    Document,
    RowError,
    prepared_schema,
)
from granite_ray.tokenizer import Tokenizer

ROWS_AT_ONCE = 64
BYTES_AT_ONCE = 4 * 1024**2
"""Rows are prepared in groups: encoding together is faster, and few keep the memory low."""

SHORT_CHARS_PER_TOKEN = 6
"""A text shorter than this for every token of a chunk probably is one chunk."""


def prepare_shard(
    raw: pa.Table, tokenizer: Tokenizer, chunking: ChunkingConfig, max_chunk_tokens: int
) -> pa.Table:
    """Check, hash and chunk every row of a shard; rows keep their order and their kept columns.

    Args:
        raw: `RAW_FIELDS`, then the kept columns.
        tokenizer: The checkpoint's.
        chunking: How texts are cut.
        max_chunk_tokens: Longest chunk: the lesser of `chunking.max_tokens` and what the task
            leaves free.

    Raises:
        ConfigError: As `check_chunk_limits`.
    """
    check_chunk_limits(chunking, max_chunk_tokens)
    cutter = _Cutter(tokenizer, chunking, max_chunk_tokens)
    keep_fields = list(raw.schema)[len(RAW_FIELDS) :]
    groups = [_prepare_rows(rows, cutter) for rows in _groups(raw)]
    return pa.Table.from_batches(groups, prepared_schema(keep_fields))


def check_chunk_limits(chunking: ChunkingConfig, max_chunk_tokens: int) -> None:
    """Raise ConfigError where chunks of this length cannot be cut as configured."""
    if max_chunk_tokens < MIN_CHUNK_TOKENS:
        raise ConfigError(
            f"A chunk may have {max_chunk_tokens} tokens, fewer than the {MIN_CHUNK_TOKENS} that "
            "one character can take. Raise chunking.max_tokens or model.max_model_len, or shorten "
            "the prompt around the document."
        )
    if chunking.overlap_tokens * 2 > max_chunk_tokens:
        raise ConfigError(
            f"chunking.overlap_tokens is {chunking.overlap_tokens}, more than half of the "
            f"{max_chunk_tokens} tokens that a chunk may have. Choose at most "
            f"{max_chunk_tokens // 2}."
        )


def documents_of(prepared: pa.Table) -> list[Document]:
    """Turn the rows of `prepare_shard` into records."""
    return [
        document
        for rows in prepared.select(range(len(PREPARED_FIELDS))).to_batches()
        for document in _documents(rows)
    ]


# prepare ─────────────────────────────────────────────────────────────────────────────────────────


class _Cutter:
    """Cuts texts into chunks; those that are one chunk are encoded together."""

    def __init__(
        self, tokenizer: Tokenizer, chunking: ChunkingConfig, max_chunk_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._chunking = chunking
        self._max_tokens = max_chunk_tokens

    def cut(self, texts: Sequence[str | RowError]) -> list[list[Chunk] | RowError]:
        """Return the chunks of each text, or what is wrong with it."""
        short = [text for text in texts if isinstance(text, str) and self._is_short(text)]
        encoded = iter(self._tokenizer.encode_texts(short))
        found: list[list[Chunk] | RowError] = []
        for text in texts:
            if isinstance(text, RowError):
                found.append(text)
                continue
            token_ids = next(encoded) if self._is_short(text) else None
            if token_ids is not None and len(token_ids) <= self._max_tokens:
                found.append([Chunk(0, 0, len(text), token_ids)])
            else:
                found.append(self._cut_long(text))
        return found

    def _is_short(self, text: str) -> bool:
        return len(text) <= self._max_tokens * SHORT_CHARS_PER_TOKEN

    def _cut_long(self, text: str) -> list[Chunk] | RowError:
        chunks: list[Chunk] = []
        for chunk in chunk_text(
            text,
            self._tokenizer.encode_with_offsets,
            max_tokens=self._max_tokens,
            overlap_tokens=self._chunking.overlap_tokens,
            boundary=self._chunking.boundary,
        ):
            if len(chunks) == self._chunking.max_chunks:
                return RowError(
                    "too_long",
                    f"The text has {len(text):,} characters and needs more than the "
                    f"{self._chunking.max_chunks} chunks of chunking.max_chunks, of "
                    f"{self._max_tokens} tokens each. Raise it, or chunking.max_tokens.",
                )
            chunks.append(chunk)
        return chunks


def _groups(raw: pa.Table) -> Iterator[pa.RecordBatch]:
    """Yield the rows in groups of bounded size, at least one row each."""
    for batch in raw.to_batches(max_chunksize=ROWS_AT_ONCE):
        start = num_bytes = 0
        sizes: pa.Array[Any] = pc.binary_length(cast("pa.LargeBinaryArray", batch.column(1)))
        for row, size in enumerate(sizes.to_pylist()):
            num_bytes += size or 0
            if num_bytes > BYTES_AT_ONCE and row > start:
                yield batch.slice(start, row - start)
                start, num_bytes = row, size or 0
        yield batch.slice(start)


def _prepare_rows(raw: pa.RecordBatch, cutter: _Cutter) -> pa.RecordBatch:
    ids, texts, columns, error_types, error_messages = (raw.column(i).to_pylist() for i in range(5))
    checked = [
        RowError(error_type, message or "") if error_type else _checked_text(document_id, text)
        for document_id, text, error_type, message in zip(
            ids, texts, error_types, error_messages, strict=True
        )
    ]
    hashes = [_hash_content(*content) for content in zip(texts, columns, strict=True)]
    found = cutter.cut(checked)
    errors = [row if isinstance(row, RowError) else None for row in found]
    chunks = [[] if isinstance(row, RowError) else row for row in found]
    is_good = pa.array([error is None for error in errors])
    prepared = [
        raw.column(0),
        pc.if_else(is_good, raw.column(1), None).cast(pa.large_string()),
        raw.column(2),
        _chunk_array(chunks),
        pa.array(hashes, pa.string()),
        pa.array([error and error.error_type for error in errors], pa.string()),
        pa.array([error and error.message for error in errors], pa.string()),
        *raw.columns[5:],
    ]
    keep_fields = list(raw.schema)[len(RAW_FIELDS) :]
    return pa.RecordBatch.from_arrays(prepared, schema=prepared_schema(keep_fields))


def _checked_text(document_id: str | None, text: bytes | None) -> str | RowError:
    try:
        return _read_text(document_id, text)
    except RowFailure as failure:
        return RowError(failure.error_type, failure.message)


def _read_text(document_id: str | None, text: bytes | None) -> str:
    if document_id is None:
        raise RowFailure("null_id", "source.id_column holds no value in this row.")
    if text is None:
        raise RowFailure("null_text", "source.text_column holds no value in this row.")
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise RowFailure(
            "invalid_text", f"The text is not valid UTF-8: {error.reason} at byte {error.start}."
        ) from error
    if not decoded.lstrip("\ufeff").strip():
        raise RowFailure("empty_text", "The text is empty or white space only.")
    return decoded


def _hash_content(text: bytes | None, columns: str | None) -> str:
    """Digest all that the prompt sees of a row; the length keeps text and columns apart."""
    length = "null" if text is None else str(len(text))
    digest = hashlib.sha256(f"{length}\n{columns or ''}\n".encode())
    digest.update(text or b"")
    return digest.hexdigest()[:32]


def _chunk_array(chunks: Sequence[Sequence[Chunk]]) -> "pa.LargeListArray[Any]":
    """Build the column from flat buffers: a Python object for each token would take the time."""
    flat = [chunk for row in chunks for chunk in row]
    token_ids = array("i")
    for chunk in flat:
        token_ids.extend(chunk.token_ids)
    token_ends = accumulate((len(chunk.token_ids) for chunk in flat), initial=0)
    values = pa.Array.from_buffers(pa.int32(), len(token_ids), [None, pa.py_buffer(token_ids)])
    structs = pa.StructArray.from_arrays(
        [
            pa.array([chunk.start for chunk in flat], pa.int32()),
            pa.array([chunk.end for chunk in flat], pa.int32()),
            pa.ListArray.from_arrays(pa.array(token_ends, pa.int32()), values),
        ],
        fields=list(CHUNK_TYPE),
    )
    row_ends = accumulate((len(row) for row in chunks), initial=0)
    return pa.LargeListArray.from_arrays(pa.array(row_ends, pa.int64()), structs)


# documents ───────────────────────────────────────────────────────────────────────────────────────


def _documents(prepared: pa.RecordBatch) -> Iterator[Document]:
    all_chunks = _chunks_of(prepared.column(3))
    others = (prepared.column(i).to_pylist() for i in range(len(PREPARED_FIELDS)) if i != 3)
    for chunks, row in zip(all_chunks, zip(*others, strict=True), strict=True):
        document_id, text, columns, content_hash, error_type, message, file, row_number = row
        yield Document(
            document_id=document_id,
            source_file=file,
            source_row=row_number,
            text=text or "",
            content_hash=content_hash,
            chunks=chunks,
            columns=_read_columns(columns),
            error=RowError(error_type, message) if error_type else None,
        )


def _read_columns(columns: str | None) -> dict[str, Any]:
    return json.loads(columns) if columns else {}


def _chunks_of(column: "pa.LargeListArray[Any]") -> Iterator[tuple[Chunk, ...]]:
    """Yield the chunks of each row as views of the column: lists would be ten times as large."""
    row_ends = column.offsets.to_pylist()
    starts, ends, token_lists = (
        column.values.field(name) for name in ("start", "end", "token_ids")
    )
    token_ends = token_lists.offsets.to_pylist()
    token_ids = memoryview(token_lists.values.to_numpy())
    for first, stop in pairwise(row_ends):
        yield tuple(
            Chunk(
                index=i - first,
                start=starts[i].as_py(),
                end=ends[i].as_py(),
                token_ids=token_ids[token_ends[i] : token_ends[i + 1]],
            )
            for i in range(first, stop)
        )
