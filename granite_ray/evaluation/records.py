"""Records against the truth, field by field.

A field is a scalar of the schema, at whatever depth, or a whole list. Null is absent. A value is a
hit where the truth has the same; the items of a list are compared as a multiset, without order.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.errors import ConfigError
from granite_ray.evaluation.agreement import Agreement, Values
from granite_ray.evaluation.bootstrap import Floats, estimate, share
from granite_ray.evaluation.evidence import EvidenceCounts, count_evidence
from granite_ray.evaluation.findings import Findings
from granite_ray.evaluation.record_values import (
    MisfitError,
    field_paths,
    field_values,
    named_fields,
)
from granite_ray.evaluation.truths import records_of
from granite_ray.tasks.schema import check_schema
from granite_ray.tasks.shapes import Shape, shape_of

MAX_NAMES = 8


def score_records(
    rows: pa.Table, truth: str, schema: Mapping[str, Any], text_column: str
) -> Findings:
    """Measure one record a document.

    Args:
        rows: Those that have a truth.
        truth: The column with the true records.
        schema: The task's, as configured.
        text_column: The source's; where it is kept, evidence is compared with the text itself.

    Raises:
        ConfigError: The truth column does not hold records of the schema.
    """
    shape = shape_of(check_schema(schema))
    truths = records_of(rows, truth)
    fields = _measured_fields(truths, shape, truth)
    agreement = _compare(truths, rows, shape, fields, truth)
    is_exact = agreement.is_exact() & pc.equal(rows["status"], "ok").to_numpy()
    evidence = count_evidence(rows, text_column) if "evidence" in rows.column_names else None

    def measure(weights: Floats) -> dict[str, Floats]:
        return {
            **agreement.figures(weights),
            "exact_records": share(weights, is_exact),
            **(evidence.figures(weights) if evidence else {}),
        }

    estimates = estimate(measure, rows.num_rows)
    names = [path or "/" for path in fields]
    abouts = {"exact_records": "records with all fields right"}
    abouts |= evidence.abouts if evidence else {}
    return Findings(
        metrics={
            **agreement.averages(estimates, "values", "fields"),
            **{name: estimates[name].metric(about) for name, about in abouts.items()},
        },
        tables={"fields": agreement.table("Fields", "field", names, estimates)},
        notes=(
            "A failed row counts as one without values, and never as an exact record.",
            "Null is absent; values are compared exactly, list items without their order.",
            *_scope_notes(truths, shape, fields),
            *_evidence_notes(evidence),
        ),
    )


def _measured_fields(truths: Sequence[Mapping[str, Any]], shape: Shape, truth: str) -> list[str]:
    """Return the fields of the schema that any truth names, be it as null."""
    named = {path for record in truths for path in named_fields(record, shape)}
    fields = [path for path in field_paths(shape) if path in named]
    if not fields:
        raise ConfigError(
            f"--truth {truth}: its records name none of the fields of task.schema "
            f"({_some(list(field_paths(shape)))}). Name the column that holds the true records."
        )
    return fields


def _compare(
    truths: Iterable[Mapping[str, Any]],
    rows: pa.Table,
    shape: Shape,
    fields: Sequence[str],
    truth: str,
) -> Agreement:
    group_of = {path: index for index, path in enumerate(fields)}
    kinds: tuple[list[tuple[int, int]], ...] = ([], [], [])
    for row, (true_record, record) in enumerate(zip(truths, rows["fields"], strict=True)):
        try:
            asked = Counter(field_values(true_record, shape))
        except MisfitError as misfit:
            document_id = rows["document_id"][row].as_py()
            raise ConfigError(
                f"--truth {truth}: the value at {misfit.path} of document {document_id!r} is no "
                f"{misfit.wanted}, as task.schema has it. Mend it in the source and run again."
            ) from None
        given = Counter(field_values(record.as_py(), shape))
        for found, counter in zip(kinds, (asked, given, asked & given), strict=True):
            found += [
                (row, group_of[path])
                for (path, _), count in counter.items()
                if path in group_of
                for _ in range(count)
            ]
    size = rows.num_rows, len(fields)
    asked_values, given_values, hits = (_values(found, size) for found in kinds)
    return Agreement(asked_values, given_values, hits)


def _values(pairs: list[tuple[int, int]], shape: tuple[int, int]) -> Values:
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return Values(array[:, 0], array[:, 1], shape)


def _scope_notes(
    truths: Iterable[Mapping[str, Any]], shape: Shape, fields: Sequence[str]
) -> list[str]:
    notes = []
    missing = [path for path in field_paths(shape) if path not in set(fields)]
    if missing:
        notes.append(f"Not measured, because no truth names them: {_some(missing)}.")
    if shape.kind == "object":
        unknown = sorted({name for record in truths for name in record} - set(shape.properties))
        if unknown:
            notes.append(f"In the truth, but not in task.schema: {_some(unknown)}.")
    return notes


def _evidence_notes(evidence: EvidenceCounts | None) -> list[str]:
    if evidence is None or evidence.has_texts:
        return []
    return [
        "Evidence is exact where it is as long as its value: the texts themselves are not among "
        "source.keep_columns."
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
