from typing import Any

import pytest

from granite_ray.tasks.fields import RecordSchema
from granite_ray.tasks.merge import Conflict, MergedRecord, merge_records

SCHEMA = RecordSchema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "note": {"type": ["string", "null"]},
            "year": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
            "ids": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
            "place": {"type": "object", "properties": {"city": {"type": "string"}}},
            "free": {"type": "object"},
        },
    }
)


def merge(*records: dict[str, Any]) -> MergedRecord:
    return merge_records(list(enumerate(records)), SCHEMA.shape)


def test_the_most_frequent_value_wins_and_the_others_are_conflicts() -> None:
    merged = merge({"name": "A"}, {"name": "B"}, {"name": "B"}, {"name": "C"})
    assert merged.values["name"] == "B"
    assert merged.conflicts == [Conflict("/name", ("A", "C"), (0, 3))]
    assert merged.chunk_index("/name") == 1


def test_of_equally_frequent_values_the_earliest_wins() -> None:
    merged = merge({"year": 1}, {"year": 2}, {"year": 2}, {"year": 1})
    assert merged.values["year"] == 1
    assert merged.conflicts == [Conflict("/year", ("2",), (1,))]


def test_null_is_no_value_and_no_conflict() -> None:
    merged = merge({"name": None}, {"name": "A"}, {"name": None})
    assert merged.values["name"] == "A"
    assert merged.conflicts == []
    assert merged.chunk_index("/name") == 1


def test_what_no_chunk_knows_is_null_where_the_schema_allows_it_and_else_missing() -> None:
    assert merge({"name": None, "note": None}, {}).values == {"note": None}


def test_lists_are_joined_in_order_without_what_an_earlier_chunk_gave() -> None:
    merged = merge({"tags": ["a", "b", "a"]}, {"tags": ["b", "c", "a"]})
    assert merged.values["tags"] == ["a", "b", "a", "c"]
    assert [merged.chunk_index(f"/tags/{index}") for index in range(4)] == [0, 0, 0, 1]
    assert merged.conflicts == []


def test_a_list_ends_at_its_longest() -> None:
    assert merge({"tags": ["a", "b", "c"]}, {"tags": ["d", "e"]}).values["tags"] == list("abcd")


def test_unique_items_are_unique_also_within_a_chunk() -> None:
    assert merge({"ids": [1, 1, 2]}).values["ids"] == [1, 2]


def test_objects_are_merged_property_by_property() -> None:
    merged = merge({"place": None}, {"place": {"city": "Wien"}}, {"place": {"city": "Graz"}})
    assert merged.values["place"] == {"city": "Wien"}
    assert merged.conflicts == [Conflict("/place/city", ("Graz",), (2,))]


def test_free_json_is_taken_whole() -> None:
    merged = merge({"free": {"a": 1, "b": 2}}, {"free": {"b": 2, "a": 1}}, {"free": {"a": 3}})
    assert merged.values["free"] == {"a": 1, "b": 2}
    assert merged.conflicts == [Conflict("/free", ('{"a": 3}',), (2,))]


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_the_same_record_any_number_of_times_is_that_record(copies: int) -> None:
    record = {
        "name": "A",
        "note": None,
        "year": 3,
        "tags": ["x"],
        "ids": [1],
        "place": {"city": "Wien"},
        "free": {},
    }
    merged = merge(*[record] * copies)
    assert merged.values == record
    assert merged.conflicts == []
