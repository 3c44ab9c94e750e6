import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from granite_ray.records import Chunk, Document
from granite_ray.tasks.evidence import Evidence, find_evidence
from granite_ray.tasks.merge import merge_records
from granite_ray.tasks.shapes import Shape

SHAPE = Shape("object", properties={"a": Shape("string")})

any_text = st.text(
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from("aAéÉe\u0301 \n\t“\"\u2019'—-東京🙂👩‍🚀ﬁß한글"),
    max_size=40,
)


def locate(value: str, text: str, *spans: tuple[int, int], chunk_index: int = 0) -> Evidence:
    chunks = tuple(
        Chunk(index, start, end, ()) for index, (start, end) in enumerate(spans or [(0, len(text))])
    )
    document = Document("d", "f", 0, text, "hash", chunks)
    [evidence] = find_evidence(merge_records([(chunk_index, {"a": value})], SHAPE), SHAPE, document)
    return evidence


def found(value: str, text: str) -> str | None:
    evidence = locate(value, text)
    return None if evidence.start is None else text[evidence.start : evidence.end]


@settings(max_examples=200, deadline=None)
@given(any_text, st.data())
def test_every_piece_of_a_text_is_found_as_it_is(text: str, data: st.DataObject) -> None:
    assume(text)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    evidence = locate(text[start:end], text)
    assert (evidence.start, evidence.end) == (
        text.find(text[start:end]),
        evidence.start + end - start,
    )


def change_form(value: str, data: st.DataObject) -> str:
    forms = [str.upper, str.casefold]
    forms += [lambda v, f=form: unicodedata.normalize(f, v) for form in ("NFC", "NFD", "NFKC")]
    forms += [
        lambda v: v.replace(" ", "\n  "),
        lambda v: v.replace('"', "“").replace("-", "—"),
    ]
    for form in data.draw(st.lists(st.sampled_from(forms), max_size=3)):
        value = form(value)
    return value


WORDS = st.lists(
    st.sampled_from(
        [
            "Zürich",
            "naïve",
            "ﬁn",
            "straße",
            "東京",
            "\uff46\uff55\uff4c\uff4c",
            "🙂",
            "한글",
            '"so"',
            "x-y",
            "I\u0307",
        ]
    ),
    min_size=1,
    max_size=6,
).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(any_text, WORDS, any_text, st.data())
def test_a_value_is_found_however_it_is_written(
    before: str, words: str, after: str, data: st.DataObject
) -> None:
    text = f"{before} {words} {after}"
    value = change_form(words, data)
    evidence = locate(value, text)
    assert evidence.start is not None
    assert evidence.end is not None
    piece = text[evidence.start : evidence.end]
    assert skeleton(piece) == skeleton(value)


def skeleton(text: str) -> str:
    """Letters, digits and symbols alone, in one form: an independent idea of `the same`."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(c for c in plain if unicodedata.category(c)[0] in "LNSM")


@settings(max_examples=200, deadline=None)
@given(any_text, any_text)
def test_offsets_always_index_the_text(value: str, text: str) -> None:
    evidence = locate(value, text)
    if evidence.start is not None and evidence.end is not None:
        assert 0 <= evidence.start < evidence.end <= len(text)
        assert skeleton(text[evidence.start : evidence.end]) == skeleton(value)


@pytest.mark.parametrize(
    ("value", "text", "expected"),
    [
        ("東京", "日本の東京です", "東京"),
        ("🙂", "a 👩‍🚀🙂 b", "🙂"),
        ("acme corp", "By ACME\n   Corp.", "ACME\n   Corp"),
        ('"fine" - he said', "“Fine” \u2013 he said", "“Fine” \u2013 he said"),
        ("café", "a CAFE\u0301!", "CAFE\u0301"),
        ("cafe", "a CAFE\u0301!", None),
        ("fin", "the ﬁn", "ﬁn"),
        ("in", "the ﬁn", None),
        ("co-operate", "co\u00adop x co-\u200boperate", "co-\u200boperate"),
        ("한글", unicodedata.normalize("NFD", "이 한글"), unicodedata.normalize("NFD", "한글")),
        ("absent", "nothing here", None),
        ("", "text", None),
        ("   ", "a b", None),
    ],
)
def test_what_counts_as_the_same(value: str, text: str, expected: str | None) -> None:
    assert found(value, text) == expected


def test_the_value_is_looked_for_in_its_own_chunk_first() -> None:
    text = "fox ... fox"
    assert locate("fox", text, (0, 4), (4, 11), chunk_index=1).start == 8
    assert locate("FOX", text, (0, 4), (4, 11), chunk_index=1).start == 8


def test_a_value_of_another_chunk_is_found_where_it_stands() -> None:
    evidence = locate("fox", "fox ... dog", (0, 4), (4, 11), chunk_index=1)
    assert (evidence.start, evidence.end, evidence.chunk_index) == (0, 3, 1)


def test_strings_inside_lists_and_objects_have_their_pointers() -> None:
    shape = Shape(
        "object",
        properties={
            "a/b": Shape("array", items=Shape("object", properties={"n": Shape("string")})),
            "count": Shape("integer"),
            "free": Shape("json"),
        },
    )
    document = Document("d", "f", 0, "x y", "h", (Chunk(0, 0, 2, ()), Chunk(1, 2, 3, ())))
    records = [(0, {"a/b": [{"n": "x"}], "count": 1, "free": "x"}), (1, {"a/b": [{"n": "y"}]})]
    evidence = find_evidence(merge_records(records, shape), shape, document)
    assert evidence == [
        Evidence("/a~1b/0/n", "x", 0, 1, 0),
        Evidence("/a~1b/1/n", "y", 2, 3, 1),
    ]
