"""Which Arrow types a source's columns may have, and the type that two files' columns share."""

from collections.abc import Callable

import pyarrow as pa

LADDERS: tuple[tuple[pa.DataType, ...], ...] = (
    (pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    (pa.float16(), pa.float32(), pa.float64()),
)
"""Types whose values all fit the later ones of their row."""

TypeTest = Callable[[pa.DataType], bool]

STRING_TYPES: tuple[TypeTest, ...] = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
)
BINARY_TYPES: tuple[TypeTest, ...] = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
)
LIST_TYPES: tuple[TypeTest, ...] = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
)
JSON_TYPES: tuple[TypeTest, ...] = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_timestamp,
)


def is_string(column_type: pa.DataType) -> bool:
    """Tell whether values are text, however stored."""
    return any(is_type(column_type) for is_type in STRING_TYPES)


def is_binary(column_type: pa.DataType) -> bool:
    """Tell whether values are bytes, however stored."""
    return any(is_type(column_type) for is_type in BINARY_TYPES)


def plain_type(column_type: pa.DataType) -> pa.DataType:
    """Return a type without its storage form: no dictionary, one kind of string."""
    if pa.types.is_dictionary(column_type):
        return plain_type(column_type.value_type)
    return pa.string() if is_string(column_type) else column_type


def unified_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the smallest plain type that holds the values of both without loss, if any."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    for ladder in LADDERS:
        if one in ladder and other in ladder:
            return max(one, other, key=ladder.index)
    return None


def can_be_json(column_type: pa.DataType) -> bool:
    """Tell whether a prompt can show the values: no bytes, durations or unions."""
    plain = plain_type(column_type)
    if pa.types.is_struct(plain):
        return all(can_be_json(field.type) for field in plain)
    if pa.types.is_map(plain):
        return is_string(plain.key_type) and can_be_json(plain.item_type)
    if any(is_type(plain) for is_type in LIST_TYPES):
        return can_be_json(plain.value_type)
    return is_string(plain) or any(is_type(plain) for is_type in JSON_TYPES)
