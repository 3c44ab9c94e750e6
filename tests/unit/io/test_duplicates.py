"""An id that occurs twice is found, in a file or across files, and both places are named."""

from typing import Any

import numpy as np
import pyarrow as pa

from granite_ray.io.duplicates import find_duplicates, id_hashes


def duplicates(corpus: Any, **options: Any) -> tuple[str, str] | None:
    source = corpus.source(id_column="id", on_duplicate="error", **options)
    files = corpus.describe(source)
    columns = corpus.columns(source)
    hashes = [id_hashes(corpus.storage, file, columns, source) for file in files]
    assert all(own.dtype == np.uint64 for own in hashes)
    return find_duplicates(corpus.storage, files, hashes, columns, source)


def put_ids(corpus: Any, path: str, ids: list[Any]) -> None:
    corpus.put(path, pa.table({"text": ["t"] * len(ids), "id": ids, "lang": ["en"] * len(ids)}))


def test_distinct_ids_and_nulls_are_no_duplicates(corpus: Any) -> None:
    put_ids(corpus, "a.parquet", [*range(5_000), None, None])
    put_ids(corpus, "b.parquet", [*range(5_000, 9_000), None])
    assert duplicates(corpus) is None


def test_two_places_across_files_are_named(corpus: Any) -> None:
    put_ids(corpus, "a.parquet", [1, 2, 3])
    put_ids(corpus, "b.parquet", ["7", "8"])
    put_ids(corpus, "c.parquet", ["x", None, "2"])
    assert duplicates(corpus) == ("a.parquet#1", "c.parquet#2")


def test_two_places_in_one_file_are_named(corpus: Any) -> None:
    corpus.put("a.jsonl", b'{"id": "x", "text": ""}\n\n{"id": 1, "text": ""}\n{"id": "x"}\n')
    assert duplicates(corpus, format="jsonl") == ("a.jsonl#0", "a.jsonl#2")


def test_rows_that_are_filtered_out_do_not_count(corpus: Any) -> None:
    put_ids(corpus, "a.parquet", [1, 1])
    assert duplicates(corpus, filter=[["lang", "!=", "en"]]) is None


def test_equal_hashes_of_other_ids_are_no_duplicate(corpus: Any) -> None:
    put_ids(corpus, "a.parquet", [1])
    put_ids(corpus, "b.parquet", [2])
    source = corpus.source(id_column="id")
    files = corpus.describe(source)
    columns = corpus.columns(source)
    same = [id_hashes(corpus.storage, files[0], columns, source)] * 2
    assert find_duplicates(corpus.storage, files, same, columns, source) is None
