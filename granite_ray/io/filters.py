"""`source.filter`: which rows are documents of this job. A null never meets a condition."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.config import FilterCondition

ARROW_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
PYTHON_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def filter_mask(table: pa.Table, conditions: Sequence[FilterCondition]) -> "pa.ChunkedArray[Any]":
    """Return which rows of a table meet all conditions.

    Raises:
        pa.ArrowException: A column cannot be compared with its value.
    """
    mask = _constant(True, table)
    for condition in conditions:
        mask = pc.and_(mask, _condition_mask(table[condition.column], condition))
    return mask


def row_passes(row: Mapping[str, Any], conditions: Sequence[FilterCondition]) -> bool:
    """Tell whether a JSON object meets all conditions; a value of another type only meets "not"."""
    return all(_value_passes(row.get(condition.column), condition) for condition in conditions)


def _condition_mask(
    column: "pa.ChunkedArray[Any]", condition: FilterCondition
) -> "pa.ChunkedArray[Any]":
    if pa.types.is_null(column.type):
        return _constant(False, column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if isinstance(condition.value, list):
        mask = _constant(False, column)
        for value in condition.value:
            mask = pc.or_(mask, _compare(column, "==", value))
        if condition.operator == "not in":
            mask = pc.invert(mask)
    else:
        mask = _compare(column, condition.operator, condition.value)
    no: pa.Scalar[Any] = pa.scalar(False)
    return pc.fill_null(pc.and_(mask, pc.is_valid(column)), no)


def _constant(value: bool, like: "pa.Table | pa.ChunkedArray[Any]") -> "pa.ChunkedArray[Any]":
    return pa.chunked_array([pa.repeat(value, len(like))])


def _compare(column: "pa.ChunkedArray[Any]", comparison: str, value: Any) -> "pa.ChunkedArray[Any]":
    scalar: pa.Scalar[Any] = pa.scalar(value)
    if isinstance(value, str):
        scalar = scalar.cast(column.type)  # a date in quotes is compared as a date
    is_met: pa.ChunkedArray[Any] = ARROW_COMPARISONS[comparison](column, scalar)
    return is_met


def _value_passes(value: object, condition: FilterCondition) -> bool:
    if value is None:
        return False
    if isinstance(condition.value, list):
        is_member = any(_same_kind(value, member) and value == member for member in condition.value)
        return is_member == (condition.operator == "in")
    if not _same_kind(value, condition.value):
        return condition.operator == "!="
    return PYTHON_COMPARISONS[condition.operator](value, condition.value)


def _same_kind(value: object, other: object) -> bool:
    """Tell whether two JSON values can be ordered; Python's True == 1 is not JSON's."""
    if isinstance(value, bool) or isinstance(other, bool):
        return isinstance(value, bool) and isinstance(other, bool)
    numbers = isinstance(value, int | float) and isinstance(other, int | float)
    return numbers or (isinstance(value, str) and isinstance(other, str))
