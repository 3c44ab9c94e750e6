"""Each task asks both engines about the quickstart corpus, and is told the same."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from granite_ray.checkpoint import QUICKSTART_PATH
from granite_ray.config import JobConfig, load_config, parse_config
from granite_ray.quickstart.make_corpus import CORPUS_PATH
from granite_ray.records import Result
from tests.parity import run_on_own_engine
from tests.schemas import closed

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
LABELS = load_config(QUICKSTART).task.labels

SCHEMA = closed(
    {
        "kind of package": {"enum": ["library", "program", "documentation", "data"]},
        "name": {"type": ["string", "null"], "maxLength": 20},
        "is for developers": {"type": "boolean"},
        "version": {"type": "integer", "minimum": 0, "maximum": 99},
    }
)
TASKS: dict[str, dict[str, Any]] = {
    "summarize": {"kind": "summarize", "max_tokens": 24},
    "summarize with key points": {"kind": "summarize", "max_tokens": 120, "key_points": 2},
    "classify": {"kind": "classify", "labels": LABELS},
    "classify, calibrated": {
        "kind": "classify",
        "labels": LABELS,
        "calibration": "contextual",
        "prompt_order": "document_first",
    },
    "classify by several labels": {"kind": "classify", "labels": LABELS[:6], "multi_label": True},
    "extract": {"kind": "extract", "schema": SCHEMA, "max_tokens": 80},
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return pq.read_table(CORPUS_PATH, columns=["text"]).to_pylist()


def config_of(task: dict[str, Any], backend: str) -> JobConfig:
    return parse_config(
        {
            "source": {"path": "quickstart"},
            "task": task,
            "chunking": {"max_tokens": 256},
            "model": {"path": str(QUICKSTART_PATH), "dtype": "float32"},
            "engine": {"backend": backend, "device": "cpu"},
            "sink": {"path": "unused"},
        }
    )


def answer(task: dict[str, Any], backend: str, rows: list[dict[str, Any]]) -> list[Result]:
    return run_on_own_engine(config_of(task, backend), rows)


def plain(result: Result) -> dict[str, Any]:
    """A result as plain data; scores by label, since nearly equal ones may change places."""
    data = dataclasses.asdict(result)
    if "scores" in data["values"]:
        scores = data["values"]["scores"]
        data["values"]["scores"] = {score["label"]: score["probability"] for score in scores}
    return data


def assert_same(one: object, other: object) -> None:
    """Equal in all, numbers within 1e-4: backends add up in different orders."""
    if isinstance(one, float):
        assert math.isclose(one, other, abs_tol=1e-4)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        *((name, 40) for name in TASKS if name != "summarize with key points"),
        *(pytest.param(name, 400, marks=pytest.mark.slow) for name in TASKS),
    ],
)
def test_a_task_gives_equal_results_on_both_backends(
    name: str, num_rows: int, rows: list[dict[str, Any]]
) -> None:
    longest = sorted(rows, key=lambda row: len(row["text"]))[-num_rows // 20 :]
    chosen = [*rows[:num_rows], *longest]
    native, reference = (
        answer(TASKS[name], backend, chosen) for backend in ("native", "transformers")
    )
    for one, other in zip(native, reference, strict=True):
        assert_same(plain(one), plain(other))
    assert any(result.num_chunks > 1 for result in native), "some are longer than a chunk"
    assert sum(result.error is None for result in native) > num_rows * 2 / 3
    assert len({str(result.values) for result in native}) > num_rows * 2 / 3
