"""Copied strings are spans of the source, whatever the tokens, and nothing else is taken away."""

import json
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.records import Grammar
from tests.schemas import closed
from tests.tiny import END_OF_TEXT
from tests.vocabularies import VOCABULARIES

CITY = 'the \\ "città"'
SPAN = {"type": ["string", "null"], "x-copy": True}
ITEMS = {"type": "array", "items": {"type": "string", "x-copy": True}, "maxItems": 3}
NOTE = {"type": "string", "maxLength": 6}
SCHEMA = closed(
    {
        "name": SPAN,
        "tags": ITEMS,
        "place": {"anyOf": [closed({"note": NOTE, CITY: SPAN}, [CITY]), {"type": "null"}]},
        "note": NOTE,
        "lists": {"type": "array", "items": ITEMS, "maxItems": 2},
    },
    ["tags", "place", "lists"],
)
COPIED = {b"name", b"tags", json.dumps(CITY, ensure_ascii=False)[1:-1].encode(), b"lists"}

PIECES = [
    *("The fox", " the dog", ".", '"', '","', '":"', "\\", "\\n", "\\u0041", "\n", "\t", "}]"),
    *("日本の首都", "🙂", "👩\u200d👩\u200d👧", "e\u0301", "ÅÅ", "\u2028", "\x00", "\x1b", "\x7f"),
    *("aaaa", "abab", "null", "مرحبا", "\ufeff", "\u00a0", "    "),
]
TEXTS = (
    st.lists(
        st.one_of(
            st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
        ),
        min_size=1,
        max_size=5,
    )
    .map("".join)
    .filter(bool)
)

MARKS = re.compile(rb'"((?:[^"\\]|\\.)*+\\?)("?)|[{}\[\],:]', re.DOTALL)


class Vocabulary:
    """One vocabulary, and compilers over it: with copies, and for the same schema without."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(path))
        self.vocab_size = self.tokenizer.get_vocab_size() + 5
        self.end = self.tokenizer.token_to_id(END_OF_TEXT)
        self.compiler = GrammarCompiler(str(path), self.vocab_size, [self.end])

    def matchers(self, text, schema=SCHEMA):
        plain = re.sub(r', "x-copy": true', "", json.dumps(schema))
        assert "x-copy" not in plain
        return (
            self.compiler.matcher(Grammar(json.dumps(schema), text)),
            self.compiler.matcher(Grammar(plain)),
        )

    def spell(self, token_id):
        return self.compiler._tokenizer.decode_bytes([token_id])


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request, tmp_path_factory):
    return Vocabulary(VOCABULARIES[request.param](tmp_path_factory.mktemp(request.param)))


def spans_of(text):
    """All spans, as JSON writes them."""
    written = [json.dumps(c, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f") for c in text]
    ends = range(1, len(text) + 1)
    return {"".join(written[i:j]).encode() for j in ends for i in range(j)}


def copied_strings(written):
    """What each copied string holds so far, and whether it is closed."""
    found, around, key, before = [], [], b"", b""
    for mark in MARKS.finditer(written):
        if mark[0] in (b"{", b"["):
            around.append(mark[0])
        elif mark[0] in (b"}", b"]"):
            around.pop()
        elif mark[0][:1] == b'"':
            if before != b":" and around[-1] == b"{":
                key = mark[1]
            elif key in COPIED:
                found.append((mark[1], bool(mark[2])))
        before = mark[0]
    return found


def is_copy(written, added, spans, beginnings):
    """Whether all copied strings of an answer are spans, or can still become one."""
    return all(
        content in (spans if is_closed else beginnings)
        for content, is_closed in copied_strings(written + added)
    )


def walk(vocabulary, text, seed, schema=SCHEMA):
    """Write a random answer; at each step the masks must be what the definition says."""
    random = Random(seed)
    matcher, plain = vocabulary.matchers(text, schema)
    spans = spans_of(text)
    beginnings = {span[:length] for span in spans for length in range(len(span) + 1)}
    written = b""
    while not matcher.is_finished:
        forced = matcher.forced_tokens()
        allowed = np.flatnonzero(matcher.allowed_tokens()).tolist()
        assert not forced or allowed == forced[:1]
        expected = [
            token_id
            for token_id in np.flatnonzero(plain.allowed_tokens()).tolist()
            if token_id == vocabulary.end
            or is_copy(written, vocabulary.spell(token_id), spans, beginnings)
        ]
        assert allowed == expected, written
        token_id = random.choice(allowed)
        if token_id == vocabulary.end:
            break
        for one in (matcher, plain):
            one.consume(token_id)
        written += vocabulary.spell(token_id)
    return json.loads(written)


def copied_values(record):
    place = record["place"] or {}
    nested = [item for items in record["lists"] for item in items]
    return [record.get("name"), place.get(CITY), *record["tags"], *nested]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(0, 2**32))
def test_tokens_that_spell_a_span_are_allowed_and_no_others(vocabulary, text, seed):
    for value in copied_values(walk(vocabulary, text, seed)):
        assert value is None or (value and value in text)
