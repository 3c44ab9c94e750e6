"""Shards cover the input, keep their limits, and stay the same while others change."""

import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.config import SourceConfig
from granite_ray.io.input_files import InputFile
from granite_ray.io.lines import Stretch
from granite_ray.io.shards import cut_shards, plan_shards
from granite_ray.records import Shard

STRETCHES = st.lists(
    st.builds(Stretch, st.integers(0, 40), st.integers(0, 4_000), st.integers(0, 9)), max_size=6
)


@st.composite
def corpora(draw: st.DrawFn) -> list[InputFile]:
    paths = draw(st.lists(st.text("abc/._", min_size=1, max_size=8), unique=True, max_size=30))
    return [InputFile(path, "v1", tuple(draw(STRETCHES))) for path in paths]


def make_source(**options: object) -> SourceConfig:
    return SourceConfig.model_validate({"path": "corpus"} | options)


def make_file(name: object, num_rows: int = 1, identity: str = "v1") -> InputFile:
    return InputFile(f"docs/{name}.txt", identity, (Stretch(num_rows, 100 * num_rows),))


def rows_of(shards: list[Shard]) -> Counter[tuple[str, int]]:
    return Counter(
        (part.path, row)
        for shard in shards
        for part in shard.parts
        for row in range(part.start_row, part.stop_row or 0)
    )


@settings(max_examples=150, deadline=None)
@given(corpora(), st.integers(1, 30), st.integers(1, 3_000), st.randoms())
def test_each_row_is_in_one_shard(
    files: list[InputFile], max_rows: int, max_bytes: int, rng: random.Random
) -> None:
    source = make_source(documents_per_shard=max_rows, bytes_per_shard=max_bytes)
    shards = plan_shards(files, source)
    expected = {(file.path, row) for file in files for row in range(file.num_rows)}
    assert rows_of(shards) == Counter(expected)
    assert len({shard.shard_id for shard in shards}) == len(shards)
    for shard in shards:
        assert 1 <= sum((part.stop_row or 0) - part.start_row for part in shard.parts) <= max_rows
    places = [(shard.parts[0].path, shard.parts[0].start_row) for shard in shards]
    assert places == sorted(places)
    rng.shuffle(files)
    assert plan_shards(files, source) == shards


@settings(max_examples=100, deadline=None)
@given(corpora(), st.integers(1, 30), st.integers(0, 300))
def test_cut_shards_are_the_first_rows_of_the_plan(
    files: list[InputFile], max_rows: int, num_rows: int
) -> None:
    source = make_source(documents_per_shard=max_rows)
    shards = plan_shards(files, source)
    cut = cut_shards(shards, num_rows, source)
    assert list(rows_of(cut)) == list(rows_of(shards))[:num_rows]
    whole = {shard.shard_id: shard.parts for shard in shards}
    assert sum(shard.shard_id not in whole for shard in cut) <= 1
    assert all(whole.get(shard.shard_id, shard.parts) == shard.parts for shard in cut)


def test_bytes_bound_a_shard() -> None:
    file = InputFile("big", "v1", (Stretch(1_000, 100_000), Stretch(10, 1_000), Stretch(10, 1_000)))
    shards = plan_shards([file], make_source(bytes_per_shard=20_000))
    assert [(part.start_row, part.stop_row) for shard in shards for part in shard.parts] == [
        (0, 200),
        (200, 400),
        (400, 600),
        (600, 800),
        (800, 1_000),
        (1_000, 1_020),
    ]


def test_a_row_larger_than_a_shard_is_a_shard() -> None:
    shards = plan_shards([InputFile("a", "v", (Stretch(1, 10**9),))], make_source())
    assert rows_of(shards) == Counter([("a", 0)])


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("x/a b/report (1).parquet", "report-1-.parquet"),
        ("_private/.hidden", "hidden"),
        ("..._-", "shard"),
        ("文書", "shard"),
        ("n" * 99, "n" * 40),
    ],
)
def test_a_shard_id_can_be_a_visible_file_name(path: str, stem: str) -> None:
    (shard,) = plan_shards([InputFile(path, "v", (Stretch(1, 1),))], make_source())
    assert shard.shard_id.rpartition("-")[0] == stem
    assert len(shard.shard_id.rpartition("-")[2]) == 16


def test_a_shard_id_tells_what_is_read() -> None:
    plans = [
        plan_shards([make_file("a")], make_source()),
        plan_shards([make_file("b")], make_source()),
        plan_shards([make_file("a", identity="v2")], make_source()),
        plan_shards([make_file("a", 2)], make_source()),
        plan_shards([make_file("a")], make_source(filter=[["lang", "==", "en"]])),
    ]
    assert len({shard.shard_id for plan in plans for shard in plan}) == len(plans)


def test_a_file_added_or_taken_away_alters_few_shards() -> None:
    rng = random.Random(7)
    source = make_source(documents_per_shard=50)
    files = [make_file(rng.random()) for _ in range(1_500)]
    before = {shard.shard_id for shard in plan_shards(files, source)}
    altered = []
    for index in range(50):
        added = [*files, make_file(rng.random())]
        without = files[:index] + files[index + 1 :]
        for changed in (added, without):
            now = {shard.shard_id for shard in plan_shards(changed, source)}
            altered.append(len(before - now))
    assert sum(number <= 2 for number in altered) >= 97
    assert max(altered) <= 4


def test_a_small_corpus_of_small_files_is_one_shard() -> None:
    assert len(plan_shards([make_file(number) for number in range(500)], make_source())) == 1


def test_a_hundred_thousand_files_are_planned_in_seconds() -> None:
    files = [make_file(number) for number in range(100_000)]
    started_s = time.monotonic()
    shards = plan_shards(files, make_source())
    assert time.monotonic() - started_s < 10
    assert sum(rows_of(shards).values()) == 100_000
