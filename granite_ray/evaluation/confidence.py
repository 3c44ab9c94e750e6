"""Whether confidence can be believed, and what abstaining would bring.

ECE: expected calibration error in equal-width bins (Guo et al. 2017, On Calibration of Modern
Neural Networks): the mean over answers of |mean confidence - accuracy| of the answer's bin. Chance
alone makes it larger than it is, the more so the fewer the rows, and its interval leans upward.
"""

from dataclasses import dataclass

import numpy as np

from granite_ray.evaluation.bootstrap import Bools, Floats, Integers, ratio
from granite_ray.evaluation.findings import Cell, Table

NUM_BINS = 15
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.5)
MAX_CURVE_POINTS = 200


class Calibration:
    """Probabilities that were given, and whether each came true.

    Args:
        probabilities: One for each answer.
        is_true: Of each answer.
        documents: The row number of each; a row may have any number of them.
        num_documents: How many rows there are.
    """

    def __init__(
        self, probabilities: Floats, is_true: Bools, documents: Integers, num_documents: int
    ) -> None:
        bins = np.floor(probabilities * NUM_BINS).astype(np.int64)
        self._bins = np.clip(bins, 0, NUM_BINS - 1)  # a probability of 1 belongs to the last
        self._probabilities = probabilities
        self._is_true = is_true
        gaps = np.bincount(
            documents * NUM_BINS + self._bins, probabilities - is_true, num_documents * NUM_BINS
        )
        self._gaps = gaps.reshape(num_documents, NUM_BINS)
        self._numbers = np.bincount(documents, minlength=num_documents)

    def error(self, weights: Floats) -> Floats:
        """Return the ECE."""
        return ratio(np.abs(weights @ self._gaps).sum(), weights @ self._numbers)

    def table(self, title: str) -> Table:
        """Return the bins that hold anything."""
        bins = self._bins
        counts = np.bincount(bins, minlength=NUM_BINS)
        means = ratio(np.bincount(bins, self._probabilities, NUM_BINS), counts)
        shares = ratio(np.bincount(bins, self._is_true, NUM_BINS), counts)
        rows: list[tuple[Cell, ...]] = [
            (
                index / NUM_BINS,
                (index + 1) / NUM_BINS,
                int(counts[index]),
                float(means[index]),
                float(shares[index]),
            )
            for index in np.flatnonzero(counts)
        ]
        return Table(title, ("from", "to", "answers", "mean confidence", "accuracy"), tuple(rows))


@dataclass(frozen=True, slots=True)
class Coverage:
    """Accuracy of the rows at or above a threshold of confidence, for every threshold.

    `confidences` of rows without an answer are -inf: no threshold reaches them.
    """

    thresholds: Floats
    shares: Floats
    accuracies: Floats

    @classmethod
    def of(cls, confidences: Floats, is_right: Bools) -> "Coverage":
        """Sort the rows by confidence; rows of the same confidence come together."""
        order = np.argsort(-confidences, kind="stable")
        confidences, hits = confidences[order], np.cumsum(is_right[order])
        is_last = np.append(confidences[1:] != confidences[:-1], True) & np.isfinite(confidences)
        counts = np.arange(1, len(order) + 1)
        return cls(confidences[is_last], (counts / len(order))[is_last], (hits / counts)[is_last])

    def curve(self) -> tuple[tuple[float, float], ...]:
        """Return points (coverage, accuracy), thinned out where there are many."""
        num_points = min(len(self.shares), MAX_CURVE_POINTS)
        chosen = np.linspace(0, len(self.shares) - 1, num_points).round().astype(int)
        return tuple((float(self.shares[i]), float(self.accuracies[i])) for i in chosen)

    def table(self) -> Table:
        """Return what answering only the surest rows would bring."""
        rows: list[tuple[Cell, ...]] = []
        for coverage in COVERAGES:
            reached = np.flatnonzero(self.shares <= coverage)
            if len(reached):
                i = reached[-1]
                row = (self.thresholds[i], self.shares[i], self.accuracies[i])
                rows.append(tuple(float(cell) for cell in row))
        columns = ("abstain_below", "coverage", "accuracy")
        title = "If only the surest rows were answered"
        return Table(title, columns, tuple(dict.fromkeys(rows)), num_shown=len(COVERAGES))
