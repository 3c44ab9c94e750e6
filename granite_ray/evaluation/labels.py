"""Labels against the truth: one label a document."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.config import ClassifyConfig
from granite_ray.evaluation.agreement import Agreement, Values
from granite_ray.evaluation.bootstrap import (
    Bools,
    Estimate,
    Floats,
    Integers,
    estimate,
    ratio,
    share,
)
from granite_ray.evaluation.confidence import NUM_BINS, Calibration, Coverage
from granite_ray.evaluation.findings import Findings, Metric, Table
from granite_ray.evaluation.label_names import NO_LABEL, LabelNames, Scores, most_confused
from granite_ray.evaluation.truths import labels_of

TOP = 3
MAX_CONFUSIONS = 20


def score_labels(rows: pa.Table, truth: str, config: ClassifyConfig) -> Findings:
    """Measure one label a document.

    Raises:
        ConfigError: The truth column holds no labels of the task.
    """
    column = labels_of(rows, truth)
    names = LabelNames.of(config, column, truth)
    answers = _Answers.of(rows, names.codes(column), names)
    agreement = answers.agreement(len(names.names))
    calibration = answers.calibration()

    def measure(weights: Floats) -> dict[str, Floats]:
        return {
            **agreement.figures(weights),
            "accuracy": share(weights, answers.is_right),
            "top": share(weights, answers.is_in_top),
            "coverage": share(weights, answers.has_label),
            "accuracy_of_answered": ratio(weights @ answers.is_right, weights @ answers.has_label),
            "calibration_error": calibration.error(weights),
        }

    estimates = estimate(measure, rows.num_rows)
    coverage = Coverage.of(answers.confidences, answers.would_be_right)
    confusions = most_confused(answers.truths, answers.given, names.names, MAX_CONFUSIONS)
    return Findings(
        metrics=_metrics(estimates, agreement, names.num_own, config.abstain_below),
        tables={
            "labels": agreement.table("Labels", "label", names.names, estimates),
            "confusions": Table(
                "Most confused", ("true", "answered", "rows", "share of true"), tuple(confusions), 5
            ),
            "coverage": coverage.table(),
            "reliability": calibration.table("Reliability, bin by bin"),
        },
        curves={"coverage": coverage.curve()},
        notes=(
            "A failed or abstained row counts as wrong for accuracy, F1 and top-3.",
            "Calibration and the coverage curve take the likeliest label of an abstained row.",
            *names.notes(answers.truths),
        ),
        num_abstained=int((answers.is_ok & ~answers.has_label).sum()),
    )


@dataclass(frozen=True, slots=True)
class _Answers:
    """What each row says, and whether it is right. Confidence is -inf where there is none."""

    truths: Integers
    given: Integers
    is_ok: Bools
    has_label: Bools
    is_right: Bools
    is_in_top: Bools
    would_be_right: Bools
    confidences: Floats

    @classmethod
    def of(cls, rows: pa.Table, truths: Integers, names: LabelNames) -> "_Answers":
        given = names.codes(rows["label"])
        scores = Scores.of(rows["scores"], names)
        best = np.where(given == NO_LABEL, scores.best(len(truths), names.depths), given)
        confidences = pc.fill_null(rows["confidence"], -np.inf).to_numpy()
        return cls(
            truths=truths,
            given=given,
            is_ok=pc.equal(rows["status"], "ok").to_numpy(),
            has_label=given != NO_LABEL,
            is_right=given == truths,
            is_in_top=scores.is_in_top(truths, TOP),
            would_be_right=best == truths,
            confidences=confidences.astype(np.float64),
        )

    def agreement(self, num_labels: int) -> Agreement:
        shape = len(self.truths), num_labels
        everyone = np.arange(shape[0])
        return Agreement(
            truths=Values(everyone, self.truths, shape),
            answers=Values(everyone[self.has_label], self.given[self.has_label], shape),
            hits=Values(everyone[self.is_right], self.truths[self.is_right], shape),
        )

    def calibration(self) -> Calibration:
        """Return it for the rows that have a confidence."""
        rows = np.flatnonzero(np.isfinite(self.confidences))
        return Calibration(
            self.confidences[rows], self.would_be_right[rows], rows, len(self.truths)
        )


def _metrics(
    estimates: Mapping[str, Estimate], agreement: Agreement, num_labels: int, abstain_below: float
) -> dict[str, Metric]:
    bar = f" (abstain_below {abstain_below:g})" if abstain_below else ""
    figures = {
        "accuracy": "rows whose label is the truth",
        "macro_f1": f"F1, mean over {agreement.num_seen} labels",
        f"top_{TOP}_accuracy": f"truth among the {TOP} likeliest",
        "coverage": f"rows with a label{bar}",
        "accuracy_of_answered": "right ones among them",
        "calibration_error": f"ECE, {NUM_BINS} equal bins; 0 is best",
    }
    if num_labels <= TOP:
        del figures[f"top_{TOP}_accuracy"]
    return {
        name: estimates["top" if name.startswith("top_") else name].metric(about)
        for name, about in figures.items()
    }
