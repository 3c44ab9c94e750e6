"""read the rows → measure them against the truth. Nothing is written here."""

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.config import ClassifyConfig, JobConfig, SummarizeConfig
from granite_ray.errors import ConfigError, ConflictError
from granite_ray.evaluation.bootstrap import CONFIDENCE_LEVEL, NUM_RESAMPLES, SEED
from granite_ray.evaluation.findings import Evaluation, Findings, RowCounts
from granite_ray.evaluation.label_sets import score_label_sets
from granite_ray.evaluation.labels import score_labels
from granite_ray.evaluation.records import score_records
from granite_ray.evaluation.texts import score_texts
from granite_ray.evaluation.truths import has_truth
from granite_ray.io.commit import read_snapshot
from granite_ray.io.results import read_results
from granite_ray.io.storage import Storage, absolute, open_storage
from granite_ray.output import changed_fields, read_job


def evaluate(
    config: JobConfig, truth: str, *, open_storage: Callable[[str], Storage] = open_storage
) -> Evaluation:
    """Measure a job's results against a column that holds the truth.

    Rows whose truth is null or blank are left out and counted. A failed row counts as wrong.

    Args:
        config: The job, as it ran.
        truth: A column of `source.keep_columns`: a label (or a list of them) for classify, a
            record for a task with a schema, a text otherwise.
        open_storage: Opens the sink.

    Raises:
        ConfigError: There are no results, or the column is missing or of the wrong type.
        ConflictError: The results are those of another task, chunking or checkpoint.
    """
    sink = open_storage(config.sink.path)
    job = read_job(sink)
    if job is None:
        raise ConfigError(f"{sink.root} holds no job. Run the config first: granite-ray run.")
    _check_same(config, job["config"], sink.root)
    is_partial = read_snapshot(sink) is None
    rows = read_results(config.sink.path, open_storage)
    measured = _rows_with_truth(rows, truth)
    findings = _score(measured, truth, config)
    return Evaluation(
        task=config.task.kind,
        truth=truth,
        sink=sink.root,
        checkpoint=", ".join(pc.unique(measured["checkpoint"]).to_pylist()),
        fingerprint=job["fingerprint"],
        version=version("granite-ray"),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        is_partial=is_partial,
        rows=_count(rows, measured, findings.num_abstained),
        num_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE_LEVEL,
        seed=SEED,
        findings=findings,
    )


def _check_same(config: JobConfig, stored: dict[str, Any], root: str) -> None:
    """Refuse results that other questions were asked for: the figures would not be this job's."""
    ran = JobConfig.model_validate(stored).dump()
    wanted = config.dump()
    if absolute(config.model.path) == ran["model"]["path"]:
        wanted["model"]["path"] = ran["model"]["path"]
    changed = changed_fields(ran, wanted)
    if changed:
        raise ConflictError(
            f"{root} holds the answers of another config ({changed} changed since). Evaluate with "
            "the config that they are of, or run this one first."
        )


def _rows_with_truth(rows: pa.Table, truth: str) -> pa.Table:
    if not rows.num_rows:
        raise ConfigError("The results have no rows yet. Run the job first.")
    if truth not in rows.column_names:
        raise ConfigError(
            f"--truth {truth}: the results have no such column. Keep it when the job runs: put "
            f"{truth} into source.keep_columns, and run again (an output that was written without "
            "it needs --restart)."
        )
    measured = rows.filter(has_truth(rows, truth))
    if not measured.num_rows:
        raise ConfigError(
            f"--truth {truth}: none of the {rows.num_rows:,} rows has a value there. Name the "
            "column that holds the truth."
        )
    return measured


def _score(rows: pa.Table, truth: str, config: JobConfig) -> Findings:
    task = config.task
    if isinstance(task, ClassifyConfig):
        return (score_label_sets if task.multi_label else score_labels)(rows, truth, task)
    if isinstance(task, SummarizeConfig):
        return score_texts(rows, truth, "summary")
    if task.schema_ is None:
        return score_texts(rows, truth, "text")
    return score_records(rows, truth, task.schema_, config.source.text_column)


def _count(rows: pa.Table, measured: pa.Table, num_abstained: int) -> RowCounts:
    num_failed = pc.sum(pc.equal(measured["status"], "failed")).as_py()
    return RowCounts(
        total=rows.num_rows,
        without_truth=rows.num_rows - measured.num_rows,
        measured=measured.num_rows,
        answered=measured.num_rows - num_failed - num_abstained,
        abstained=num_abstained,
        failed=num_failed,
    )
