"""From an output to its evaluation: what is read, what is refused, what is told."""

import json
from typing import Any

import pyarrow as pa
import pytest

from granite_ray.config import JobConfig, parse_config
from granite_ray.errors import ConfigError, ConflictError, GraniteRayError
from granite_ray.evaluation import Evaluation, evaluate
from tests.corpus import job_values
from tests.faulty_storage import MemoryStorage
from tests.unit.evaluation.outputs import (
    FINGERPRINT,
    NAMES,
    label_rows,
    label_set_rows,
    label_set_table,
    label_table,
    table_of,
    write_output,
)

TASK = {"kind": "classify", "labels": list(NAMES), "abstain_below": 0.3}


def config_of(**task: Any) -> JobConfig:
    values = job_values("in", "out")
    values["task"] = task or TASK
    return parse_config(values)


def output_of(config: JobConfig, rows: pa.Table, *, is_complete: bool = True) -> MemoryStorage:
    storage = MemoryStorage()
    write_output(storage, config, rows, is_complete=is_complete)
    return storage


def measure(config: JobConfig, storage: MemoryStorage, truth: str = "truth") -> Evaluation:
    return evaluate(config, truth, open_storage=lambda _: storage)


def test_every_row_is_in_one_count() -> None:
    rows = label_rows(100)
    rows[3]["truth"], rows[40]["truth"] = None, "  "
    found = measure(config_of(), output_of(config_of(), label_table(rows)))
    counts = found.rows
    assert (counts.total, counts.without_truth, counts.measured) == (100, 2, 98)
    assert counts.measured == counts.answered + counts.abstained + counts.failed
    measured = [row for index, row in enumerate(rows) if index not in (3, 40)]
    assert counts.failed == sum(row.get("status") == "failed" for row in measured)
    assert counts.answered == sum(row.get("label") is not None for row in measured)
    right = sum(row.get("label") == row["truth"] for row in measured)
    assert found.metrics["accuracy"].value == pytest.approx(right / 98)


def test_it_says_what_it_is_of() -> None:
    config = config_of()
    found = measure(config, output_of(config, label_table(label_rows(40))))
    assert (found.task, found.truth, found.checkpoint) == ("classify", "truth", "tiny")
    assert found.fingerprint == FINGERPRINT
    assert not found.is_partial


def test_results_before_the_first_snapshot_are_measured_and_called_partial() -> None:
    config, rows = config_of(), label_table(label_rows(40))
    partial = measure(config, output_of(config, rows, is_complete=False))
    whole = measure(config, output_of(config, rows))
    assert partial.is_partial
    assert partial.metrics == whole.metrics


def test_the_json_holds_the_same_figures_and_no_nan() -> None:
    config = config_of()
    rows = label_table([{"truth": "alpha", "status": "failed"}] * 3)
    found = measure(config, output_of(config, rows))
    values = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert values["metrics"]["accuracy"]["value"] == 0
    assert values["metrics"]["accuracy_of_answered"]["value"] is None
    assert values["rows"]["failed"] == values["rows"]["total"] == 3
    assert values["bootstrap"] == {"num_resamples": 1000, "confidence_level": 0.95, "seed": 0}
    assert values["fingerprint"] == FINGERPRINT
    assert values["tables"]["labels"][0]["label"] == "alpha"


@pytest.mark.parametrize(
    ("task", "rows", "metrics"),
    [
        (TASK, label_table(label_rows(20)), {"accuracy", "calibration_error"}),
        (
            {**TASK, "multi_label": True},
            label_set_table(label_set_rows(20)),
            {"subset_accuracy", "micro_f1"},
        ),
        (
            {"kind": "summarize"},
            table_of([pa.field("summary", pa.string())], [{"truth": "a", "summary": "a"}],
                     pa.string()),
            {"rouge_l", "chrf"},
        ),
        (
            {"kind": "generate", "template": "{{ text }}"},
            table_of([pa.field("text", pa.string())], [{"truth": "a", "text": "a"}], pa.string()),
            {"rouge_l", "chrf"},
        ),
        (
            {
                "kind": "generate",
                "template": "{{ text }}",
                "schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
            },
            table_of(
                [pa.field("fields", pa.struct([("a", pa.int64())]))],
                [{"truth": '{"a": 1}', "fields": {"a": 1}}],
                pa.string(),
            ),
            {"exact_records", "macro_f1"},
        ),
    ],
    ids=["label", "labels", "summary", "text", "record"],
)  # fmt: skip
def test_each_task_has_its_own_figures(
    task: dict[str, Any], rows: pa.Table, metrics: set[str]
) -> None:
    config = config_of(**task)
    assert metrics <= set(measure(config, output_of(config, rows)).metrics)


@pytest.mark.parametrize(
    ("truth", "rows", "message"),
    [
        ("section", label_rows(3), "put section into source.keep_columns"),
        ("truth", [{**row, "truth": None} for row in label_rows(3)], "none of the 3 rows has"),
        ("truth", [], "The results have no rows yet"),
    ],
)
def test_a_truth_that_is_not_there_is_refused(
    truth: str, rows: list[dict[str, Any]], message: str
) -> None:
    storage = output_of(config_of(), label_table(rows))
    with pytest.raises(ConfigError, match=message):
        measure(config_of(), storage, truth)


def test_an_output_that_no_job_has_begun_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory holds no job"):
        measure(config_of(), MemoryStorage())


def test_answers_to_another_question_are_refused() -> None:
    storage = output_of(config_of(), label_table(label_rows(20)))
    changed = config_of(**{**TASK, "abstain_below": 0.5})
    with pytest.raises(ConflictError, match=r"task\.abstain_below changed since") as refused:
        measure(changed, storage)
    assert isinstance(refused.value, GraniteRayError)
    assert refused.value.exit_code == 5


def test_what_cannot_change_the_answers_may_differ() -> None:
    storage = output_of(config_of(), label_table(label_rows(20)))
    values = job_values("elsewhere", "out", engine={"num_replicas": 4})
    values["task"] = TASK
    assert measure(parse_config(values), storage).rows.total == 20
