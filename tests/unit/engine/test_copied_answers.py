"""Extraction with copied strings on engines that run a model: every value stands in its chunk."""

import asyncio
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.checkpoint import Checkpoint
from granite_ray.config import EngineConfig, ExtractConfig, ModelConfig
from granite_ray.engine.factory import Engine, make_engine
from granite_ray.records import Document, Result
from granite_ray.tasks import TaskLimits, make_task
from granite_ray.tokenizer import Tokenizer
from tests.schemas import closed
from tests.unit.engine.test_copying import ITEMS, NOTE, SPAN, TEXTS
from tests.unit.tasks.scripted import make_document

SCHEMA = {
    "type": "object",
    "properties": {
        "tags": {**ITEMS, "minItems": 1, "maxItems": 2},
        "name": SPAN,
        "place": closed({"note": NOTE, "city": SPAN}),
    },
    "required": ["name", "tags", "place"],
}
KINDS = {"native": "granitemoehybrid", "transformers": "granitemoe", "fake": "granitemoe"}
"""The backends, and the tiny checkpoint that each runs: random weights, so any token may come."""


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Iterator[Engine]:
    config = EngineConfig(device="cpu", backend=request.param)
    engine = make_engine(checkpoints[KINDS[request.param]], ModelConfig(), config)
    yield engine
    engine.shutdown()


def extract(engine: Engine, tokenizer: Tokenizer, document: Document, temperature: float) -> Result:
    options = {"schema": SCHEMA, "max_tokens": 300, "temperature": temperature}
    task = make_task(ExtractConfig(kind="extract", **options), tokenizer, TaskLimits(2000))
    return asyncio.run(task.run(document, engine))


def copied(fields: dict[str, Any]) -> dict[str, str]:
    """The copied values of a row, by the paths that its evidence should have."""
    values = {"/name": fields["name"], "/place/city": (fields["place"] or {}).get("city")}
    values |= {f"/tags/{index}": tag for index, tag in enumerate(fields["tags"] or ())}
    return {path: value for path, value in values.items() if value is not None}


def check(document: Document, result: Result) -> int:
    """Check a row's values and evidence; return how many strings were copied."""
    if result.error is not None:  # of several chunks, each may leave out what the record needs
        assert len(document.chunks) > 1
        assert re.search("no chunk gives the required|'minItems'", result.error.message)
        return 0
    values = copied(result.values["fields"])
    evidence = {one["path"]: one for one in result.values["evidence"]}
    for path, value in values.items():
        one = evidence[path]
        chunk = document.chunks[one["chunk_index"]]
        assert value
        assert one["value"] == value == document.text[one["start"] : one["end"]]
        assert chunk.start <= one["start"] <= one["end"] <= chunk.end
    return len(values)


@settings(max_examples=int(os.environ.get("COPY_EXAMPLES", "12")), deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3), st.sampled_from([0.0, 5.0]))
def test_every_copied_value_stands_where_its_evidence_says(
    engine: Engine, tokenizer: Tokenizer, texts: list[str], temperature: float
) -> None:
    document = make_document(tokenizer, *texts)
    check(document, extract(engine, tokenizer, document, temperature))


def test_strings_are_copied_at_all(engine: Engine, tokenizer: Tokenizer) -> None:
    texts = [
        'Ada met 👩‍👩‍👧 in "東京",\n',
        "then\tBob\\Bo wrote e\u0301 \u2028 and ",
        "\x00\x1b\x7f ended.",
    ]
    documents = [make_document(tokenizer, text) for text in texts]
    documents.append(make_document(tokenizer, *texts))
    counts = [
        check(document, extract(engine, tokenizer, document, temperature))
        for document in documents
        for temperature in (0.0, 2.0, 5.0)
    ]
    assert sum(counts) > 8
