"""Whether evidence says exactly where a value stands."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.evaluation.bootstrap import Bools, Floats, Integers, ratio


@dataclass(frozen=True, slots=True)
class EvidenceCounts:
    """Of each row: how many strings it has, how many were located, and how many exactly.

    `has_texts`: the texts were there, and exact means that the offsets give the value itself.
    """

    strings: Integers
    located: Integers
    exact: Integers
    has_texts: bool

    @property
    def abouts(self) -> dict[str, str]:
        """What the figures are."""
        return {
            "evidence_exact": "strings just at their offsets",
            "evidence_located": "strings found in the text",
        }

    def figures(self, weights: Floats) -> dict[str, Floats]:
        """Return the shares of the string values."""
        strings = weights @ self.strings
        return {
            "evidence_exact": ratio(weights @ self.exact, strings),
            "evidence_located": ratio(weights @ self.located, strings),
        }


def count_evidence(rows: pa.Table, text_column: str) -> EvidenceCounts:
    """Look at every piece of evidence."""
    lists = rows["evidence"].combine_chunks()
    entries = lists.flatten()
    documents = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    value, start, end = (pc.struct_field(entries, name) for name in ("value", "start", "end"))
    is_located = pc.is_valid(start).to_numpy(zero_copy_only=False)
    has_texts = text_column in rows.column_names and pa.types.is_string(rows[text_column].type)
    if has_texts:
        is_exact = _is_exact(rows[text_column], documents, value, start, end)
    else:
        lengths = pc.equal(pc.subtract(end, start), pc.utf8_length(value))
        is_exact = pc.fill_null(lengths, False).to_numpy(zero_copy_only=False)
    strings, located, exact = (
        np.bincount(some, minlength=rows.num_rows)
        for some in (documents, documents[is_located], documents[is_exact])
    )
    return EvidenceCounts(strings, located, exact, has_texts)


def _is_exact(
    column: pa.ChunkedArray, documents: Integers, value: pa.Array, start: pa.Array, end: pa.Array
) -> Bools:
    texts = column.to_pylist()
    spans = zip(documents, value.to_pylist(), start.to_pylist(), end.to_pylist(), strict=True)
    found = [
        first is not None and texts[row] is not None and texts[row][first:last] == wanted
        for row, wanted, first, last in spans
    ]
    return np.array(found, bool)
