"""The whole chain means something: the embedded model answers the quickstart's questions well.

Bounds lie below what was reached (see the checkpoint's card) by about three standard errors.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rouge_score.rouge_scorer import RougeScorer

from granite_ray.config import JobConfig, load_config
from granite_ray.job import EMBEDDED_SOURCES
from granite_ray.records import Result
from tests.parity import run_on_own_engine

CONFIGS = Path(__file__).parents[3] / "configs"
Rows = list[dict[str, Any]]

MIN_ACCURACY = 0.56
MIN_TOP_3 = 0.7
MIN_ROUGE_L = 0.17
MIN_FIELD_F1 = 0.75
MIN_AGREEMENT = 0.6


def read_rows(config: JobConfig) -> Rows:
    rows = pq.read_table(EMBEDDED_SOURCES[config.source.path[0]]).to_pylist()
    text = config.source.text_column
    return [{**row, "text": row[text]} for row in rows]


def values(results: Sequence[Result], name: str) -> list[Any]:
    assert all(result.error is None for result in results)
    return [result.values[name] for result in results]


def test_sections_are_named_and_confidence_can_be_believed() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    rows = read_rows(config)[::5]
    results = run_on_own_engine(config, rows)
    is_right = np.array(values(results, "label")) == [row["section"] for row in rows]
    assert is_right.mean() >= MIN_ACCURACY
    assert abs(np.mean(values(results, "confidence")) - is_right.mean()) <= 0.12
    ranked = [[score["label"] for score in scores[:3]] for scores in values(results, "scores")]
    assert np.mean([row["section"] in best for row, best in zip(rows, ranked, strict=True)]) >= (
        MIN_TOP_3
    )


def test_synopses_are_close_to_the_archives_own() -> None:
    config = load_config(CONFIGS / "quickstart_synopses.yaml")
    rows = read_rows(config)[::8]
    summaries = values(run_on_own_engine(config, rows), "summary")
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(rows, summaries, strict=True)
    scores = [scorer.score(row["synopsis"], text)["rougeL"].fmeasure for row, text in pairs]
    assert np.mean(scores) >= MIN_ROUGE_L
    assert len(set(summaries)) > 0.9 * len(summaries)


def test_changelog_fields_are_found_and_stand_in_the_text() -> None:
    config = load_config(CONFIGS / "quickstart_changelogs.yaml")
    rows = read_rows(config)[::6]
    results = run_on_own_engine(config, rows)
    num_right = num_given = num_true = 0
    for row, result in zip(rows, results, strict=True):
        # An answer that was cut off is a row that says so: nothing was found.
        given, true = flat(result.values.get("fields", {})), flat(row["truth"])
        num_right += len(given & true)
        num_given += len(given)
        num_true += len(true)
        for one in result.values.get("evidence", []):
            assert row["text"][one["start"] : one["end"]] == one["value"]
    assert 2 * num_right / (num_given + num_true) >= MIN_FIELD_F1


def flat(record: dict[str, Any]) -> set[tuple[str, str]]:
    """A record's values, each with its field."""
    return {
        (name, one)
        for name, value in record.items()
        for one in (value if isinstance(value, list) else [value])
        if one is not None
    }


def test_backends_agree_on_trained_weights() -> None:
    config = load_config(
        CONFIGS / "quickstart_changelogs.yaml", ["model.dtype=float32", "task.max_tokens=300"]
    )
    rows = [row for row in read_rows(config) if len(row["text"]) < 500][::20]
    reference = load_config(
        CONFIGS / "quickstart_changelogs.yaml",
        ["model.dtype=float32", "task.max_tokens=300", "engine.backend=transformers"],
    )
    for one, other in zip(
        run_on_own_engine(config, rows), run_on_own_engine(reference, rows), strict=True
    ):
        assert dataclasses.asdict(one) == dataclasses.asdict(other)


def test_entries_in_chunks_give_what_they_give_at_once() -> None:
    config = load_config(CONFIGS / "quickstart_changelogs.yaml")
    entries = [row for row in read_rows(config) if len(row["text"]) < 450]
    groups = [entries[at : at + 3] for at in range(0, 60, 3)]
    texts = ["\n\n".join(row["text"] for row in group) for group in groups]
    rows = [{"entry": str(at), "text": text, "changelog": text} for at, text in enumerate(texts)]
    path = CONFIGS / "quickstart_changelogs.yaml"
    whole = load_config(path, ["chunking.max_tokens=1400"])
    cut = load_config(path, ["chunking.max_tokens=250"])
    at_once, in_chunks = run_on_own_engine(whole, rows), run_on_own_engine(cut, rows)
    assert all(result.num_chunks == 1 for result in at_once)
    assert all(result.num_chunks > 1 for result in in_chunks)
    same = [
        one.values["fields"][name] == other.values["fields"][name]
        for one, other in zip(at_once, in_chunks, strict=True)
        for name in ("package", "version", "bugs", "cves")
    ]
    assert np.mean(same) >= MIN_AGREEMENT
