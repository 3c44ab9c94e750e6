"""Labels against the truth: any number of labels a document."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.config import ClassifyConfig
from granite_ray.evaluation.agreement import Agreement, Values
from granite_ray.evaluation.bootstrap import Floats, Integers, estimate, share
from granite_ray.evaluation.confidence import NUM_BINS, Calibration
from granite_ray.evaluation.findings import Findings
from granite_ray.evaluation.label_names import LabelNames, Scores, pairs
from granite_ray.evaluation.truths import label_sets_of


def score_label_sets(rows: pa.Table, truth: str, config: ClassifyConfig) -> Findings:
    """Measure any number of labels a document.

    Raises:
        ConfigError: The truth column holds no lists of labels of the task.
    """
    column = label_sets_of(rows, truth)
    names = LabelNames.of(config, column.flatten(), truth)
    shape = rows.num_rows, len(names.names)
    truths, answers = pairs(column, names), pairs(rows["labels"].combine_chunks(), names)
    agreement = Agreement(
        truths=_values(truths, shape),
        answers=_values(answers, shape),
        hits=_values(np.intersect1d(truths, answers, assume_unique=True), shape),
    )
    is_exact = agreement.is_exact() & pc.equal(rows["status"], "ok").to_numpy()
    calibration = _calibration(rows, truths, names)

    def measure(weights: Floats) -> dict[str, Floats]:
        return {
            **agreement.figures(weights),
            "subset_accuracy": share(weights, is_exact),
            "calibration_error": calibration.error(weights),
        }

    estimates = estimate(measure, rows.num_rows)
    about = f"ECE of labels, {NUM_BINS} bins; 0 is best"
    return Findings(
        metrics={
            **agreement.averages(estimates, "labels", "labels"),
            "subset_accuracy": estimates["subset_accuracy"].metric("rows with all labels right"),
            "calibration_error": estimates["calibration_error"].metric(about),
        },
        tables={
            "labels": agreement.table("Labels", "label", names.names, estimates),
            "reliability": calibration.table("Reliability, bin by bin"),
        },
        notes=(
            "A failed row counts as one without labels, and never as right for subset accuracy.",
            *names.notes(truths % shape[1]),
        ),
    )


def _values(pairs: Integers, shape: tuple[int, int]) -> Values:
    return Values(pairs // shape[1], pairs % shape[1], shape)


def _calibration(rows: pa.Table, truths: Integers, names: LabelNames) -> Calibration:
    """Judge the probability of every label that was asked for, as a yes to it."""
    scores = Scores.of(rows["scores"], names)
    is_true = np.isin(scores.rows * len(names.names) + scores.codes, truths)
    return Calibration(scores.probabilities, is_true, scores.rows, rows.num_rows)
