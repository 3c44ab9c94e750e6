import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.config import ChunkingConfig
from granite_ray.errors import ConfigError
from granite_ray.prepare import check_chunk_limits, documents_of, prepare_shard
from granite_ray.records import RAW_FIELDS, Document, prepared_schema
from granite_ray.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import write_tokenizer

LONG_TEXT = "The quick brown fox jumps over the lazy dog. It does not mind.\n\n" * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(str(folder))


def raw_row(text: bytes | str | None, **changes: object) -> dict[str, object]:
    content = text.encode() if isinstance(text, str) else text
    row = {
        "document_id": "d",
        "text": content,
        "columns": "{}",
        "source_file": "f",
        "source_row": 0,
    }
    return row | changes


def raw_table(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=pa.schema(RAW_FIELDS))


def prepare(
    tokenizer: Tokenizer, *rows: dict[str, object], max_tokens: int = 200, **chunking: object
) -> list[Document]:
    config = ChunkingConfig.model_validate(chunking)
    prepared = prepare_shard(raw_table(*rows), tokenizer, config, max_tokens)
    prepared.validate(full=True)
    return documents_of(prepared)


def error_type(document: Document) -> str | None:
    return document.error and document.error.error_type


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (raw_row("Fine."), None),
        (raw_row("Fine.", document_id=None), "null_id"),
        (raw_row(None), "null_text"),
        (raw_row(None, document_id=None), "null_id"),
        (raw_row(b"ab\xff"), "invalid_text"),
        (raw_row("\ud800".encode(errors="surrogatepass")), "invalid_text"),
        (raw_row(b"\xc0\x80"), "invalid_text"),
        (raw_row(""), "empty_text"),
        (raw_row(" \t\r\n\u3000\u2028"), "empty_text"),
        (raw_row("\ufeff \n"), "empty_text"),
        (raw_row("\x00"), None),
        (raw_row("word " * 3000), "too_long"),
        (raw_row(None, error_type="invalid_json", error_message="Line 3."), "invalid_json"),
    ],
)
def test_what_is_wrong_with_a_row_is_told_in_this_order(
    tokenizer: Tokenizer, row: dict[str, object], expected: str | None
) -> None:
    (document,) = prepare(tokenizer, row, max_chunks=10)
    assert error_type(document) == expected
    assert bool(document.chunks) == (expected is None)


def test_a_failed_row_keeps_its_place_its_columns_and_no_text(tokenizer: Tokenizer) -> None:
    rows = [raw_row(t, source_row=i, columns='{"a": 1}') for i, t in enumerate(["x", b"\xff", "y"])]
    documents = prepare(tokenizer, *rows)
    assert [document.source_row for document in documents] == [0, 1, 2]
    assert [document.text for document in documents] == ["x", "", "y"]
    assert all(document.columns == {"a": 1} for document in documents)


def test_an_error_that_the_reader_found_is_kept_as_it_is(tokenizer: Tokenizer) -> None:
    row = raw_row("Fine.", error_type="invalid_column", error_message="source.keep_columns: price.")
    (document,) = prepare(tokenizer, row)
    assert document.error.message == "source.keep_columns: price."
    assert document.text == ""


def test_messages_name_no_text_of_the_document(tokenizer: Tokenizer) -> None:
    secret = "canary-7f3a"
    rows = [raw_row(secret.encode() + b"\xff"), raw_row(f"{secret} " * 2000)]
    for document in prepare(tokenizer, *rows, max_chunks=2):
        assert document.error
        assert secret not in document.error.message
    assert "byte 11" in prepare(tokenizer, rows[0])[0].error.message


@settings(deadline=None)
@given(text=st.binary(max_size=60))
def test_bytes_are_read_without_loss_or_the_row_says_that_they_are_no_text(
    tokenizer: Tokenizer, text: bytes
) -> None:
    (document,) = prepare(tokenizer, raw_row(text))
    try:
        wanted = text.decode("utf-8")
    except UnicodeDecodeError:
        assert error_type(document) == "invalid_text"
        return
    if document.error is None:
        assert document.text == wanted
    else:
        assert error_type(document) == "empty_text"
        assert wanted.strip("\ufeff").strip() == ""


@pytest.mark.parametrize(
    "text",
    ["\ufefftext", "a\x00b", "a\r\nb\rc", "مرحبا", "😀 👨\u200d👩\u200d👧", "<|end_of_text|>"],
)
def test_odd_but_valid_text_stays_as_it_is(tokenizer: Tokenizer, text: str) -> None:
    (document,) = prepare(tokenizer, raw_row(text))
    (chunk,) = document.chunks
    assert document.text == text
    assert (chunk.index, chunk.start, chunk.end) == (0, 0, len(text))
    assert tokenizer.decode(chunk.token_ids) == text
    assert not tokenizer.control_token_ids.intersection(chunk.token_ids)


def test_a_long_text_is_cut_as_configured(tokenizer: Tokenizer) -> None:
    (document,) = prepare(tokenizer, raw_row(LONG_TEXT), max_tokens=100, overlap_tokens=10)
    assert len(document.chunks) > 5
    assert document.chunks[-1].end == len(LONG_TEXT)
    for chunk in document.chunks:
        piece = document.text[chunk.start : chunk.end]
        assert list(chunk.token_ids) == tokenizer.encode_text(piece)
        assert len(chunk.token_ids) <= 100
    assert document.chunks[1].start < document.chunks[0].end


def test_a_document_fails_beyond_max_chunks_and_not_at_it(tokenizer: Tokenizer) -> None:
    (document,) = prepare(tokenizer, raw_row(LONG_TEXT), max_tokens=100)
    num_chunks = len(document.chunks)
    (at_limit,) = prepare(tokenizer, raw_row(LONG_TEXT), max_tokens=100, max_chunks=num_chunks)
    (beyond,) = prepare(tokenizer, raw_row(LONG_TEXT), max_tokens=100, max_chunks=num_chunks - 1)
    assert at_limit == document
    assert error_type(beyond) == "too_long"
    assert "chunking.max_chunks" in beyond.error.message


@pytest.mark.slow
def test_a_document_of_10_mb_passes(tokenizer: Tokenizer) -> None:
    text = "The documentation names a maintainer for each document.\n" * 180_000
    (document,) = prepare(tokenizer, raw_row(text), max_tokens=20_000, max_chunks=1000)
    assert document.error is None
    assert document.chunks[-1].end == len(text) > 10_000_000


def test_many_rows_come_out_as_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["short", LONG_TEXT, None, "", b"\xff", "word " * 150, "x" * 5_000_000, "last"] * 20
    rows = [raw_row(text, source_row=i, document_id=f"d{i}") for i, text in enumerate(texts)]
    together = prepare(tokenizer, *rows, max_tokens=120)
    alone = [prepare(tokenizer, row, max_tokens=120)[0] for row in rows]
    assert together == alone


def test_kept_columns_pass_unchanged_even_with_a_name_of_ours(tokenizer: Tokenizer) -> None:
    keep_fields = [
        pa.field("text", pa.string()),
        pa.field("tags", pa.list_(pa.int16()), nullable=False),
        pa.field("day", pa.dictionary(pa.int8(), pa.string())),
    ]
    kept = [
        pa.array(["kept", None, "3"]),
        pa.array([[1], [], [2, 3]], pa.list_(pa.int16())),
        pa.array(["mon", None, "tue"]).dictionary_encode().cast(keep_fields[2].type),
    ]
    raw = raw_table(raw_row("one"), raw_row(None), raw_row("three"))
    raw = pa.table([*raw.columns, *kept], schema=pa.schema([*RAW_FIELDS, *keep_fields]))
    prepared = prepare_shard(raw, tokenizer, ChunkingConfig(), 100)
    assert prepared.schema == prepared_schema(keep_fields)
    assert [column.to_pylist() for column in prepared.columns[-3:]] == [a.to_pylist() for a in kept]
    assert [document.text for document in documents_of(prepared)] == ["one", "", "three"]


def test_slices_and_pieces_of_a_table_give_their_own_rows(tokenizer: Tokenizer) -> None:
    raw = raw_table(*(raw_row(f"text {i}. " * (i * 9 + 1), source_row=i) for i in range(30)))
    in_pieces = pa.concat_tables([raw.slice(0, 7), raw.slice(7, 11), raw.slice(18)])
    whole = prepare_shard(raw, tokenizer, ChunkingConfig(), 50)
    assert prepare_shard(in_pieces, tokenizer, ChunkingConfig(), 50).equals(whole)
    assert documents_of(whole.slice(11, 9)) == documents_of(whole)[11:20]


def test_no_rows_give_no_rows(tokenizer: Tokenizer) -> None:
    prepared = prepare_shard(raw_table(), tokenizer, ChunkingConfig(), 100)
    assert prepared.schema == prepared_schema([])
    assert documents_of(prepared) == []


# content hash ────────────────────────────────────────────────────────────────────────────────────


def content_hash(tokenizer: Tokenizer, text: object, **changes: object) -> str:
    (document,) = prepare(tokenizer, raw_row(text, **changes))
    return document.content_hash


def test_the_hash_covers_text_and_prompt_columns_and_nothing_else(tokenizer: Tokenizer) -> None:
    base = content_hash(tokenizer, "text")
    assert len(bytes.fromhex(base)) == 16
    assert content_hash(tokenizer, "text", document_id="e", source_file="g", source_row=9) == base
    others = {
        content_hash(tokenizer, "texu"),
        content_hash(tokenizer, "text "),
        content_hash(tokenizer, "text", columns=json.dumps({"title": "t"})),
        content_hash(tokenizer, ""),
        content_hash(tokenizer, None),
        content_hash(tokenizer, b"\xff"),
    }
    assert len(others - {base}) == 6


def test_text_cannot_pass_for_columns(tokenizer: Tokenizer) -> None:
    first = content_hash(tokenizer, "b", columns="{}\n")
    assert content_hash(tokenizer, "\nb", columns="{}") != first


# limits ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("chunking", "max_tokens", "message"),
    [
        ({}, 3, "A chunk may have 3 tokens.*chunking.max_tokens"),
        ({}, -20, "A chunk may have -20 tokens.*model.max_model_len"),
        ({"overlap_tokens": 51}, 100, "chunking.overlap_tokens is 51.*Choose at most 50"),
    ],
)
def test_limits_that_leave_no_room_are_refused(
    tokenizer: Tokenizer, chunking: dict[str, int], max_tokens: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(tokenizer, raw_row("x"), max_tokens=max_tokens, **chunking)


def test_the_smallest_limits_are_accepted() -> None:
    check_chunk_limits(ChunkingConfig(overlap_tokens=2), 4)
