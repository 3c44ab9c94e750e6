"""Records, counted by hand."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from granite_ray.errors import ConfigError
from granite_ray.evaluation.findings import Findings
from granite_ray.evaluation.records import score_records
from granite_ray.tasks.extract import CONFLICT_TYPE, EVIDENCE_TYPE
from granite_ray.tasks.schema import check_schema
from granite_ray.tasks.shapes import shape_of
from tests.unit.evaluation.outputs import table_of

LINE = {"type": "object", "properties": {"item": {"type": "string"}, "count": {"type": "integer"}}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "total": {"type": ["number", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "seller": {"type": "object", "properties": {"name": {"type": "string"}}},
        "lines": {"type": "array", "items": LINE},
        "free": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    },
}
FIELDS = pa.field("fields", shape_of(check_schema(SCHEMA)).arrow_type)
EMPTY = dict.fromkeys(SCHEMA["properties"])


def score(
    truths: Sequence[Any], answers: Sequence[Mapping[str, Any] | None], truth: pa.DataType
) -> Findings:
    """Measure answers; None is a failed row."""
    rows = [
        {"truth": true, **({"status": "failed"} if answer is None else {"fields": answer})}
        for true, answer in zip(truths, answers, strict=True)
    ]
    return score_records(table_of([FIELDS], rows, truth), "truth", SCHEMA, "text")


def score_json(truths: Sequence[Any], answers: Sequence[Mapping[str, Any] | None]) -> Findings:
    return score([json.dumps(truth) for truth in truths], answers, pa.string())


def value_of(findings: Findings, name: str) -> float | None:
    return findings.metrics[name].value


def test_every_figure_is_what_counting_by_hand_gives() -> None:
    truths = [
        {"title": "A", "total": 2.5, "tags": ["x", "y", "y"], "seller": {"name": "N"}},
        {"title": "B", "total": None, "tags": [], "seller": None},
        {"title": "C", "total": 7, "tags": ["z"], "seller": {"name": "M"}},
    ]
    answers = [
        {"title": "A", "total": 2.5, "tags": ["y", "x", "x"], "seller": {"name": "n"}},
        {"title": "B", "total": None, "tags": [], "seller": {"name": None}},
        None,
    ]
    found = score_json(truths, answers)
    rows = {row[0]: row[1:6] for row in found.tables["fields"].rows}
    # field: true, answered, precision, recall, F1
    assert rows == {
        "/tags": (4, 3, pytest.approx(2 / 3), pytest.approx(2 / 4), pytest.approx(4 / 7)),
        "/title": (3, 2, 1.0, pytest.approx(2 / 3), pytest.approx(4 / 5)),
        "/total": (2, 1, 1.0, pytest.approx(1 / 2), pytest.approx(2 / 3)),
        "/seller/name": (2, 1, 0.0, 0.0, 0.0),
    }
    assert value_of(found, "micro_precision") == pytest.approx(5 / 7)
    assert value_of(found, "micro_recall") == pytest.approx(5 / 11)
    assert value_of(found, "micro_f1") == pytest.approx(10 / 18)
    assert value_of(found, "macro_f1") == pytest.approx((4 / 7 + 4 / 5 + 2 / 3 + 0) / 4)
    assert value_of(found, "exact_records") == pytest.approx(1 / 3), "B alone"
    assert "Not measured, because no truth names them: /lines, /free." in found.notes
    assert "evidence_exact" not in found.metrics, "generate gives no evidence"


def test_a_struct_column_is_measured_as_the_same_json() -> None:
    truths = [{"title": "A", "tags": ["x"], "seller": {"name": "N"}}, {"title": None, "tags": []}]
    answers = [{**EMPTY, "title": "A", "tags": ["x"], "seller": {"name": "O"}}, {**EMPTY}]
    types = [("title", pa.string()), ("tags", pa.list_(pa.string()))]
    seller = ("seller", pa.struct([("name", pa.string())]))
    as_struct = score(truths, answers, pa.struct([*types, seller]))
    assert as_struct.metrics == score_json(truths, answers).metrics


@pytest.mark.parametrize(
    ("field", "truth", "answer", "is_hit"),
    [
        ("title", "é", "é", True),
        ("title", "é", "e\u0301", False),
        ("title", "A ", "A", False),
        ("title", 5, "5", True),
        ("total", 2, 2.0, True),
        ("total", 2.5, 2.5000001, False),
        ("free", 5, "5", True),
        ("free", "five", '"five"', True),
        ("free", "5", '"5"', False),
        ("lines", [{"item": "a", "count": 1}, {"item": "b"}],
         [{"item": "b", "count": None}, {"item": "a", "count": 1}], True),
        ("lines", [{"item": "a", "count": 1}], [{"item": "a", "count": 2}], False),
    ],
)  # fmt: skip
def test_a_value_is_a_hit_where_it_is_the_same(
    field: str, truth: Any, answer: Any, is_hit: bool
) -> None:
    found = score_json([{field: truth}], [{**EMPTY, field: answer}])
    assert value_of(found, "micro_f1") == value_of(found, "exact_records") == float(is_hit)


@pytest.mark.parametrize(
    ("field", "column", "truth", "answer"),
    [
        ("title", pa.date32(), date(2026, 1, 31), "2026-01-31"),
        ("total", pa.decimal128(9, 2), Decimal("12.10"), 12.1),
        ("total", pa.int32(), 12, 12.0),
    ],
)
def test_arrow_values_are_compared_as_json_has_them(
    field: str, column: pa.DataType, truth: Any, answer: Any
) -> None:
    found = score([{field: truth}], [{**EMPTY, field: answer}], pa.struct([(field, column)]))
    assert value_of(found, "micro_f1") == 1


def test_a_record_that_no_struct_can_hold_is_compared_whole() -> None:
    either = [{"required": ["a"]}, {"required": ["b"]}]
    properties = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "anyOf": either}
    field = pa.field("fields", shape_of(check_schema(schema)).arrow_type)
    truths = ['{"a": 1}', '{"b": 2}', '{"a": 3}']
    answers = ['{"a": 1.0}', '{"a": 2}', '{"a":3}']
    rows = [{"truth": one, "fields": two} for one, two in zip(truths, answers, strict=True)]
    found = score_records(table_of([field], rows, pa.string()), "truth", schema, "text")
    assert value_of(found, "exact_records") == pytest.approx(2 / 3)
    assert found.tables["fields"].rows[0][0] == "/"


def test_fields_that_only_the_truth_has_are_told() -> None:
    found = score_json([{"title": "A", "colour": "red"}], [{**EMPTY, "title": "A"}])
    assert "In the truth, but not in task.schema: colour." in found.notes
    assert value_of(found, "exact_records") == 1


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"colour": "red"}, "its records name none of the fields of task.schema"),
        ({"tags": "x"}, "the value at /tags of document 'd0' is no list, as task.schema has it"),
        ({"seller": "x"}, "the value at /seller of document 'd0' is no object"),
        (["A"], "the value of document 'd0' is not a JSON object"),
    ],
)
def test_what_is_no_record_of_the_schema_is_refused(truth: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score_json([truth], [EMPTY])


def test_a_column_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="the column is int64"):
        score([1], [EMPTY], pa.int64())


# evidence ────────────────────────────────────────────────────────────────────────────────────────


def evidence(value: str, start: int | None, end: int | None) -> dict[str, Any]:
    return {"path": "/title", "value": value, "start": start, "end": end, "chunk_index": 0}


def evidence_table(texts: Sequence[str] | None) -> pa.Table:
    """Four values in two rows: exact, too long, nowhere, and of the right length elsewhere."""
    fields = [
        FIELDS,
        pa.field("evidence", pa.list_(EVIDENCE_TYPE)),
        pa.field("conflicts", pa.list_(CONFLICT_TYPE)),
    ]
    answer = {"truth": '{"title": "A"}', "fields": EMPTY, "conflicts": []}
    pieces = [
        [evidence("b\U0001f600c", 1, 4), evidence("Oslo", 0, 6)],
        [evidence("none", None, None), evidence("ab", 1, 3)],
    ]
    rows: list[dict[str, Any]] = [{**answer, "evidence": piece} for piece in pieces]
    table = table_of(fields, [*rows, {"truth": '{"title": "A"}', "status": "failed"}], pa.string())
    return table.append_column("body", [texts]) if texts else table


def test_without_the_texts_evidence_is_exact_where_its_length_is() -> None:
    found = score_records(evidence_table(None), "truth", SCHEMA, "body")
    assert value_of(found, "evidence_exact") == 2 / 4
    assert value_of(found, "evidence_located") == 3 / 4
    assert any("the texts themselves are not among" in note for note in found.notes)


def test_kept_texts_are_compared_with_the_values_themselves() -> None:
    table = evidence_table(["ab\U0001f600c", "aba", ""])
    found = score_records(table, "truth", SCHEMA, "body")
    assert value_of(found, "evidence_exact") == 1 / 4, "text[1:3] is 'ba'"
    assert value_of(found, "evidence_located") == 3 / 4
    assert not any("the texts themselves" in note for note in found.notes)
