"""Labels as codes, so that a hundred thousand rows are counted as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.config import ClassifyConfig
from granite_ray.errors import ConfigError
from granite_ray.evaluation.bootstrap import Bools, Floats, Integers
from granite_ray.tasks.taxonomy import label_levels, leaf_paths

NO_LABEL = -1


@dataclass(frozen=True, slots=True)
class LabelNames:
    """The labels by code: the task's own (leaves of a tree) first, then others of the truth."""

    names: tuple[str, ...]
    num_own: int
    depths: Integers  # of each label in the task's tree; 1 in a list

    @classmethod
    def of(cls, config: ClassifyConfig, truths: pa.Array, truth: str) -> "LabelNames":
        """Gather the labels of the task and of the truths.

        Raises:
            ConfigError: No truth is a label of the task.
        """
        paths = leaf_paths(label_levels(config.labels))
        own = {"/".join(path): len(path) for path in paths}
        held = pc.unique(truths).to_pylist()
        others = sorted(name for name in held if name not in own)
        if held and len(others) == len(held):
            raise ConfigError(
                f"--truth {truth}: none of the column's {len(held):,} distinct values is one of "
                "task.labels. Name the column that holds the labels as the task spells them "
                "(in a tree: the whole path, with '/' between the levels)."
            )
        depths = np.array([*own.values(), *(1 for _ in others)])
        return cls((*own, *others), len(own), depths)

    def codes(self, labels: pa.Array | pa.ChunkedArray) -> Integers:
        """Return the code of each label; null, or a label above the leaves, has none."""
        found = pc.index_in(labels, value_set=pa.array(self.names, pa.string()))
        codes: Integers = pc.fill_null(found, NO_LABEL).to_numpy().astype(np.int64)
        return codes

    def notes(self, truth_codes: Integers) -> tuple[str, ...]:
        """Say how many truths can never be answered."""
        number = int((truth_codes >= self.num_own).sum())
        if not number:
            return ()
        return (f"{number:,} true labels are none of task.labels; they count, as missed.",)


@dataclass(frozen=True, slots=True)
class Scores:
    """The labels that were scored, by row; of a row, the likeliest first."""

    rows: Integers
    codes: Integers
    probabilities: Floats
    ranks: Integers

    @classmethod
    def of(cls, column: pa.ChunkedArray, names: LabelNames) -> "Scores":
        """Read the column `scores`; labels above the leaves of a tree are passed over."""
        lists = column.combine_chunks()
        entries = lists.flatten()
        codes = names.codes(pc.struct_field(entries, "label"))
        is_leaf = (codes != NO_LABEL) & (codes < names.num_own)
        rows = pc.list_parent_indices(lists).to_numpy().astype(np.int64)[is_leaf]
        probabilities = pc.struct_field(entries, "probability").to_numpy()[is_leaf]
        ranks = np.arange(len(rows)) - np.searchsorted(rows, rows)
        return cls(rows, codes[is_leaf], probabilities.astype(np.float64), ranks)

    def best(self, num_rows: int, depths: Integers) -> Integers:
        """Return the label that each row would have without abstaining.

        In a tree that is the likeliest of the deepest level: only the chosen path is followed
        down, and a leaf beside it may be likelier than what the path ends with.
        """
        order = np.lexsort((self.ranks, -depths[self.codes], self.rows))
        rows, firsts = np.unique(self.rows[order], return_index=True)
        best = np.full(num_rows, NO_LABEL)
        best[rows] = self.codes[order][firsts]
        return best

    def is_in_top(self, truths: Integers, size: int) -> Bools:
        """Tell whether the truth is among the first so many labels of its row."""
        is_hit = (self.codes == truths[self.rows]) & (self.ranks < size)
        found = np.zeros(len(truths), bool)
        found[self.rows[is_hit]] = True
        return found


def pairs(lists: pa.ListArray, names: LabelNames) -> Integers:
    """Return the labels of lists, each as row * number of names + code, sorted."""
    rows = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    found: Integers = np.unique(rows * len(names.names) + names.codes(lists.flatten()))
    return found


def most_confused(
    truths: Integers, answers: Integers, names: Sequence[str], num_shown: int
) -> list[tuple[str, str, int, float]]:
    """Return the pairs (true, answered) that are taken for each other most often.

    With each comes how often, and in what share of the rows of that truth.
    """
    is_wrong = (answers != truths) & (answers != NO_LABEL)
    keys = truths[is_wrong] * len(names) + answers[is_wrong]
    found, counts = np.unique(keys, return_counts=True)
    totals = np.bincount(truths, minlength=len(names))
    return [
        (
            names[found[i] // len(names)],
            names[found[i] % len(names)],
            int(counts[i]),
            float(counts[i] / totals[found[i] // len(names)]),
        )
        for i in np.argsort(-counts, kind="stable")[:num_shown]
    ]
