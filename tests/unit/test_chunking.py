import itertools
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.chunking import Boundary, Encoding, chunk_text
from granite_ray.records import Chunk
from granite_ray.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import write_tokenizer

BOUNDARIES: tuple[Boundary, ...] = ("heading", "paragraph", "sentence", "token")

PIECES = [
    "word ",
    "The dog does not mind. ",
    "A question? ",
    "\n",
    "\n\n",
    "\r\n\r\n",
    "# Heading\n",
    "東京は日本の首都です。",
    "今日は",
    "مرحبا بالعالم",
    "😀",
    "👨\u200d👩\u200d👧",
    "e\u0301",
    "\x00",
    "\ufeff",
    "Donaudampfschifffahrt" * 9,
    "........",
    " " * 30,
    "1234567890",
    "<|end_of_text|>",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
)

LONG_TEXTS = {
    "prose": "The quick brown fox jumps over the lazy dog, and it does not mind. " * 3000,
    "one word": "a" * 200_000,
    "newlines": "\n" * 200_000,
    "dots": "." * 200_000,
    "spaces": " " * 200_000,
    "quotes": '."' * 100_000,
    "cjk": "東京は日本の首都です。今日は良い天気ですね。" * 4000,
    "cjk without stops": "東京日本" * 20_000,
    "emoji": "😀" * 40_000,
    "marks": "e" + "\u0301" * 60_000,
    "latin, then cjk": "lazy dog " * 10_000 + "東京は。" * 10_000,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(str(folder))


def cut(tokenizer: Tokenizer, text: str, max_tokens: int, **options: Any) -> list[Chunk]:
    encode = tokenizer.encode_with_offsets
    return list(chunk_text(text, encode, max_tokens=max_tokens, **options))


def pieces(tokenizer: Tokenizer, text: str, max_tokens: int, **options: Any) -> list[str]:
    return [text[chunk.start : chunk.end] for chunk in cut(tokenizer, text, max_tokens, **options)]


@settings(max_examples=300, deadline=None)
@given(
    text=TEXTS,
    max_tokens=st.integers(4, 60),
    overlap_share=st.sampled_from([0.0, 0.1, 0.3, 0.5]),
    boundary=st.sampled_from(BOUNDARIES),
)
def test_chunks_cover_the_text_fit_and_overlap_as_told(
    tokenizer: Tokenizer, text: str, max_tokens: int, overlap_share: float, boundary: Boundary
) -> None:
    overlap_tokens = int(max_tokens * overlap_share)
    chunks = cut(tokenizer, text, max_tokens, overlap_tokens=overlap_tokens, boundary=boundary)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert (chunks[0].start, chunks[-1].end) == (0, len(text)) if text else chunks == []
    for chunk in chunks:
        assert chunk.token_ids == tokenizer.encode_text(text[chunk.start : chunk.end])
        assert 1 <= len(chunk.token_ids) <= max_tokens
    for before, after in itertools.pairwise(chunks):
        assert before.start < after.start <= before.end < after.end
        assert tokenizer.count(text[after.start : before.end]) <= overlap_tokens


@settings(deadline=None)
@given(text=TEXTS, max_tokens=st.integers(4, 60))
def test_a_text_that_fits_is_one_chunk(tokenizer: Tokenizer, text: str, max_tokens: int) -> None:
    if 0 < tokenizer.count(text) <= max_tokens:
        assert pieces(tokenizer, text, max_tokens) == [text]


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_the_work_grows_with_the_text_and_not_faster(tokenizer: Tokenizer, name: str) -> None:
    text, num_encoded = LONG_TEXTS[name], 0

    def encode(piece: str) -> Encoding:
        nonlocal num_encoded
        num_encoded += len(piece)
        return tokenizer.encode_with_offsets(piece)

    chunks = list(chunk_text(text, encode, max_tokens=400, overlap_tokens=40, boundary="heading"))
    assert chunks[-1].end == len(text)
    assert num_encoded < 6 * len(text)


def test_a_text_that_fits_is_encoded_once(tokenizer: Tokenizer) -> None:
    seen = []

    def encode(piece: str) -> Encoding:
        seen.append(piece)
        return tokenizer.encode_with_offsets(piece)

    list(chunk_text("A short text.", encode, max_tokens=100))
    assert seen == ["A short text."]


def test_only_as_much_is_encoded_as_chunks_are_asked_for(tokenizer: Tokenizer) -> None:
    seen = []

    def encode(piece: str) -> Encoding:
        seen.append(len(piece))
        return tokenizer.encode_with_offsets(piece)

    next(chunk_text(LONG_TEXTS["prose"], encode, max_tokens=100))
    assert sum(seen) < 2000


# where it cuts ───────────────────────────────────────────────────────────────────────────────────

SECTIONS = [
    "# One\nThe dog sleeps. It\nrests.\n\nMore of it.\n\n",
    "## Two\nThe fox runs. It jumps.\n\nEnd.",
]


def test_headings_are_the_first_choice_where_asked_for(tokenizer: Tokenizer) -> None:
    text = "".join(SECTIONS)
    longest = max(tokenizer.count(section) for section in SECTIONS) + 6
    assert pieces(tokenizer, text, longest, boundary="heading") == SECTIONS


def test_a_paragraph_is_the_next_finer_boundary(tokenizer: Tokenizer) -> None:
    paragraphs = ["The dog does not mind at all.\n\n", "The fox is quick and brown.\n \n", "Short."]
    text = "".join(paragraphs)
    for boundary in ("heading", "paragraph"):
        got = pieces(tokenizer, text, tokenizer.count(paragraphs[0]) + 3, boundary=boundary)
        assert got[0] == paragraphs[0]


@pytest.mark.parametrize(
    "sentences",
    [
        ["The dog does not mind. ", "The fox is quick! ", "Is it? ", "Yes."],
        ['He said "it lasts." ', "Then he left the company."],
        ["東京は日本の首都です。", "今日は良い天気ですね。", "世界。"],
        ["「東京は日本です。」", "今日は良い天気です。"],
        ["هل هذا صحيح\u061f ", "كيف حالك اليوم."],
        ["first line without a stop\n", "second line of the table\n", "third"],
    ],
)
def test_a_sentence_is_not_divided_where_it_fits(
    tokenizer: Tokenizer, sentences: list[str]
) -> None:
    text = "".join(sentences)
    longest = max(tokenizer.count(sentence) for sentence in sentences) + 1
    got = pieces(tokenizer, text, longest)
    starts = set(itertools.accumulate(map(len, sentences)))
    assert len(got) > 1
    assert set(itertools.accumulate(map(len, got))) <= starts


def test_a_long_sentence_is_cut_between_words(tokenizer: Tokenizer) -> None:
    text = "the company was founded by three people in the city and it lasts to this day"
    for boundary in BOUNDARIES:
        got = pieces(tokenizer, text, 10, boundary=boundary)
        assert len(got) > 2
        assert [word for piece in got for word in piece.split()] == text.split()


def test_chunks_by_tokens_are_filled(tokenizer: Tokenizer) -> None:
    text = "The dog. " * 200
    chunks = cut(tokenizer, text, 50, boundary="token")
    assert all(len(chunk.token_ids) >= 45 for chunk in chunks[:-1])


def test_a_coarse_boundary_never_leaves_a_chunk_less_than_half_full(tokenizer: Tokenizer) -> None:
    text = "# A\n" + "word " * 400
    first, *_ = cut(tokenizer, text, 100, boundary="heading")
    assert len(first.token_ids) >= 50


@pytest.mark.parametrize("sign", ["e\u0301\u0323", "👨\u200d👩\u200d👧", "👍🏽", "\r\n", "❤\ufe0f"])
def test_what_looks_like_one_sign_is_not_divided(tokenizer: Tokenizer, sign: str) -> None:
    got = pieces(tokenizer, sign * 60, 3 * tokenizer.count(sign) - 1, boundary="token")
    assert len(got) > 10
    assert all(piece == sign * (len(piece) // len(sign)) for piece in got)


def test_a_sign_longer_than_a_chunk_is_divided_all_the_same(tokenizer: Tokenizer) -> None:
    text = "e" + "\u0301" * 100
    assert unicodedata.category(text[1]) == "Mn"
    assert "".join(pieces(tokenizer, text, 5)) == text


def test_an_overlap_begins_with_a_word_and_repeats_about_as_much_as_told(
    tokenizer: Tokenizer,
) -> None:
    text = "the company was founded by three people in the city and it lasts. " * 30
    chunks = cut(tokenizer, text, 60, overlap_tokens=20, boundary="token")
    for before, after in itertools.pairwise(chunks):
        assert text[after.start - 1].isspace()
        assert not text[after.start].isspace()
        assert 10 <= tokenizer.count(text[after.start : before.end]) <= 20


def test_an_overlap_that_leaves_no_room_is_left_out(tokenizer: Tokenizer) -> None:
    text = "ab😀" * 20
    chunks = cut(tokenizer, text, 4, overlap_tokens=2)
    assert chunks[-1].end == len(text)
