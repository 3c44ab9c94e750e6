"""Jobs that share a pass and put the document first: the model computes a document once for all."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from granite_ray import run_job, run_jobs
from granite_ray.config import JobConfig, parse_config
from tests.corpus import WORDS, write_file
from tests.invariants import check_output, rows_of
from tests.tiny_models import write_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(900)]

NUM_DOCUMENTS = 6
DOCUMENT_TOKENS = 2000
MAX_COMPUTED_SHARE = 0.45
TASKS: dict[str, dict[str, Any]] = {
    "summaries": {"kind": "summarize", "max_tokens": 8},
    "classes": {"kind": "classify", "labels": ["science", "sports", "news"]},
    "records": {
        "kind": "extract",
        "schema": {"type": "object", "properties": {"year": {"type": "integer"}}},
        "max_tokens": 12,
    },
}


def long_text(number: int, tokenizer: Tokenizer) -> str:
    """A text of so many tokens that begins like no other."""
    text = f"Document {number}."
    while len(tokenizer.encode(text).ids) < DOCUMENT_TOKENS:
        text += "".join(f" {WORDS[(number * 7 + at) % len(WORDS)]}" for at in range(20))
    return text


def jobs(source: Path, checkpoint: Path, out: Path) -> list[JobConfig]:
    return [
        parse_config(
            {
                "source": {"path": str(source), "id_column": "id"},
                "task": {**task, "prompt_order": "document_first"},
                "chunking": {"max_tokens": 3000},
                "model": {"path": str(checkpoint)},
                "engine": {"device": "cpu", "cache_gib": 0.05, "max_num_batched_tokens": 1024},
                "sink": {"path": str(out / name)},
                "job": {"max_failed_fraction": 1.0, "scheduling_timeout_s": 300},
            }
        )
        for name, task in TASKS.items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["granite", "granitemoehybrid"])
def test_three_tasks_compute_less_than_half_of_what_three_jobs_do(
    kind: str, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", kind)
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 4096}))
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = [long_text(number, tokenizer) for number in range(NUM_DOCUMENTS)]
    write_file(tmp_path / "in" / "a.parquet", range(NUM_DOCUMENTS), texts)

    together = run_jobs(jobs(tmp_path / "in", checkpoint, tmp_path / "together"))
    alone = [run_job(config) for config in jobs(tmp_path / "in", checkpoint, tmp_path / "alone")]

    engine = together[0].report.engine
    asked = engine["prompt_tokens"]
    assert asked == sum(report.engine["prompt_tokens"] for report in alone)
    assert asked > 3 * NUM_DOCUMENTS * DOCUMENT_TOKENS
    computed = asked - engine["cached_prompt_tokens"]
    separately = sum(
        report.engine["prompt_tokens"] - report.engine["cached_prompt_tokens"] for report in alone
    )
    share = computed / separately
    assert 1 / len(TASKS) < share <= MAX_COMPUTED_SHARE, f"{computed} of {separately}: {share:.3f}"
    for name in TASKS:
        mine = check_output(tmp_path / "together" / name, NUM_DOCUMENTS)
        assert_same_answers(mine, rows_of(tmp_path / "alone" / name))


def assert_same_answers(mine: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Every column is the same; probabilities as near as other batches round them."""
    for row, other in zip(mine, others, strict=True):
        for each in (row, other):
            each.pop("scores", None)
        assert row.pop("confidence", 0.0) == pytest.approx(other.pop("confidence", 0.0), abs=1e-4)
        assert row == other
