"""Precision, recall and F1 of values that belong to groups: labels, or the fields of a record.

F1 = 2 hits / (truths + answers), the harmonic mean of precision and recall.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from granite_ray.evaluation.bootstrap import (
    Bools,
    Estimate,
    Floats,
    Integers,
    mean_of_defined,
    ratio,
)
from granite_ray.evaluation.findings import Cell, Metric, Table, defined

MAX_GROUPS_SHOWN = 12
DENSITY = 4
"""Values are kept as a matrix where they fill at least one place in so many."""


class Values:
    """Some values: the document (a row number) and the group (an index) of each.

    Args:
        documents: Of each value.
        groups: Of each value.
        shape: How many documents and groups there are.
    """

    def __init__(self, documents: Integers, groups: Integers, shape: tuple[int, int]) -> None:
        self.documents = documents
        self.groups = groups
        self.shape = shape
        # Where most places are taken, as in records, a matrix product is many times quicker than
        # counting; where few are, as with one of many labels, the matrix would be large and empty.
        self._counts: Floats | None = None
        if len(documents) * DENSITY >= shape[0] * shape[1]:
            places = documents * shape[1] + groups
            counts = np.bincount(places, minlength=shape[0] * shape[1])
            self._counts = counts.reshape(shape).astype(np.float64)

    def by_group(self, weights: Floats) -> Floats:
        """Return the weighted number of values in each group."""
        if self._counts is not None:
            return weights @ self._counts
        return np.bincount(self.groups, weights[self.documents], minlength=self.shape[1]).astype(
            np.float64, copy=False
        )

    def by_document(self) -> Integers:
        """Return the number of values of each document."""
        return np.bincount(self.documents, minlength=self.shape[0])


@dataclass(frozen=True, slots=True)
class Agreement:
    """The true values, those answered, and the hits: those that are both."""

    truths: Values
    answers: Values
    hits: Values

    def figures(self, weights: Floats) -> dict[str, Floats]:
        """Measure each group, all values together (micro), and the mean of groups (macro).

        A group that has neither truths nor answers has no F1, and no part in the macro.
        """
        truths, answers, hits = (
            values.by_group(weights) for values in (self.truths, self.answers, self.hits)
        )
        f1 = ratio(2 * hits, truths + answers)
        return {
            "precision": ratio(hits, answers),
            "recall": ratio(hits, truths),
            "f1": f1,
            "micro_precision": ratio(hits.sum(), answers.sum()),
            "micro_recall": ratio(hits.sum(), truths.sum()),
            "micro_f1": ratio(2 * hits.sum(), truths.sum() + answers.sum()),
            "macro_f1": mean_of_defined(f1),
        }

    @property
    def num_seen(self) -> int:
        """How many groups have truths or answers."""
        return len(np.union1d(self.truths.groups, self.answers.groups))

    def is_exact(self) -> Bools:
        """Tell of each document whether its answers are its truths, no more and no less."""
        truths, answers, hits = (
            values.by_document() for values in (self.truths, self.answers, self.hits)
        )
        found: Bools = (truths == hits) & (answers == hits)
        return found

    def averages(
        self, estimates: Mapping[str, Estimate], values: str, groups: str
    ) -> dict[str, Metric]:
        """Return the micro and macro figures; `values` and `groups` say of what."""
        abouts = {
            "micro_f1": f"F1 over all {values}",
            "micro_precision": f"true among the {values} answered",
            "micro_recall": f"answered among the true {values}",
            "macro_f1": f"F1, mean over {self.num_seen} {groups}",
        }
        return {name: estimates[name].metric(about) for name, about in abouts.items()}

    def table(
        self, title: str, group: str, names: Sequence[str], estimates: Mapping[str, Estimate]
    ) -> Table:
        """Return the groups that were seen, those with most truths first."""
        everyone = np.ones(self.truths.shape[0])
        truths, answers = self.truths.by_group(everyone), self.answers.by_group(everyone)
        f1 = estimates["f1"]
        figures = (
            estimates["precision"].value,
            estimates["recall"].value,
            f1.value,
            f1.low,
            f1.high,
        )
        rows: list[tuple[Cell, ...]] = [
            (
                names[index],
                int(truths[index]),
                int(answers[index]),
                *(defined(float(figure[index])) for figure in figures),
            )
            for index in np.argsort(-truths, kind="stable")
            if truths[index] or answers[index]
        ]
        columns = (group, "true", "answered", "precision", "recall", "F1", "F1 low", "F1 high")
        return Table(title, columns, tuple(rows), num_shown=MAX_GROUPS_SHOWN)
