"""Workers, nodes, heads and inputs that go while a run needs them."""

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from granite_ray import (
    GraniteRayError,
    RunOptions,
    read_results,
    redrive_job,
    run_job,
)
from tests.corpus import make_config, make_text, write_corpus, write_file
from tests.faults import (
    POISON,
    Death,
    Deaths,
    Replacement,
    ReplacingEngines,
    TracedEngines,
    open_faulty,
)
from tests.invariants import check_output, report_of, rows_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("joined_ray"),
    pytest.mark.timeout(300),  # on a busy machine each of several runs takes a minute
]

NUM_DOCUMENTS = 100
SLOW = {"fake_tokens_per_s": 4000}


@pytest.fixture
def engines(tmp_path: Path) -> TracedEngines:
    """Engines whose processes and calls the test can see."""
    (tmp_path / "trace").mkdir()
    return TracedEngines(str(tmp_path / "trace"))


# workers ─────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def replicas_killed(engines: TracedEngines, seed: int, num_kills: int) -> Iterator[None]:
    """Meanwhile kill -9 the process of the latest replica at random moments."""
    chooser, ended = random.Random(seed), threading.Event()

    def kill() -> None:
        killed: set[int] = set()
        while len(killed) < num_kills and not ended.wait(chooser.uniform(0.1, 1.0)):
            alive = [pid for pid, _ in engines.replicas() if pid not in killed]
            if alive:
                with suppress(ProcessLookupError):
                    os.kill(alive[-1], signal.SIGKILL)
                killed.add(alive[-1])

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def random_seeds() -> list[Any]:
    """One seed by default, twenty under `slow`."""
    return [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 1 else []) for seed in range(20)]


@pytest.mark.parametrize("seed", random_seeds())
def test_the_shards_of_a_killed_replica_are_done_again(
    tmp_path: Path, engines: TracedEngines, seed: int
) -> None:
    source = write_corpus(tmp_path / "in")
    run_job(make_config(source, tmp_path / "undisturbed"))
    config = make_config(source, tmp_path / "out", engine=SLOW | {"num_replicas": 2})
    with replicas_killed(engines, seed, num_kills=3):
        report = run_job(config, make_engine=engines)
    assert report.exit_code == 0
    assert len(engines.replicas()) > 2, "no replica died"
    assert check_output(tmp_path / "out", NUM_DOCUMENTS) == rows_of(tmp_path / "undisturbed")


@pytest.mark.slow
def test_killed_readers_and_committers_are_replaced(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    run_job(make_config(source, tmp_path / "undisturbed"))
    places = [("open", "part-001", "after"), ("put_if_absent", "part-", "before")]
    places.append(("put_if_absent", "results/", "after"))
    deaths = [
        Death(*place, once=str(tmp_path / f"{index}.died")) for index, place in enumerate(places)
    ]
    opener = partial(open_faulty, on_call=Deaths(deaths, spare=os.getpid()))
    report = run_job(make_config(source, sink), open_storage=opener)
    assert all(Path(death.once or "").exists() for death in deaths), "not every fault struck"
    assert report.exit_code == 0
    assert check_output(sink, NUM_DOCUMENTS) == rows_of(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_document_that_kills_its_worker_costs_its_own_row_alone(
    tmp_path: Path, engines: TracedEngines
) -> None:
    source, clean = write_corpus(tmp_path / "in"), write_corpus(tmp_path / "clean")
    poisoned, seeds = {30, 44}, range(25, 50)
    texts = [
        f"{make_text(seed)} {POISON}" if seed in poisoned else make_text(seed) for seed in seeds
    ]
    write_file(source / "part-001.parquet", seeds, texts)
    run_job(make_config(clean, tmp_path / "undisturbed"))
    report = run_job(make_config(source, tmp_path / "out"), make_engine=engines)
    rows = {row["document_id"]: row for row in check_output(tmp_path / "out", NUM_DOCUMENTS)}
    expected = {row["document_id"]: row for row in rows_of(tmp_path / "undisturbed")}
    assert report.exit_code == 3
    assert report.failures == {"worker_death": len(poisoned)}
    assert {name for name, row in rows.items() if row["error_type"] == "worker_death"} == {
        f"d{seed}" for seed in poisoned
    }
    assert all(rows[name] == expected[name] for name in rows if int(name[1:]) not in poisoned)
    asked = Counter(engines.asked())
    assert all(asked[seed] <= 4 for seed in poisoned), "together, alone, and twice by itself"
    assert len(engines.replicas()) <= 1 + sum(asked[seed] for seed in poisoned)


# a reader all along ──────────────────────────────────────────────────────────────────────────────


class Reader:
    """Reads the results over and over in a thread, and keeps what it saw wrong."""

    def __init__(self, sink: Path) -> None:
        self._sink = sink
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.num_reads = 0
        self.doubled: list[list[str]] = []
        self.seen: set[frozenset[str]] = set()

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._ended.wait(0.01):
            has_snapshot = (self._sink / "_SUCCESS.json").exists()
            try:
                ids = read_results(str(self._sink))["document_id"].to_pylist()
            except GraniteRayError:
                assert not has_snapshot
                continue
            self.num_reads += 1
            if len(set(ids)) < len(ids):
                self.doubled.append(sorted(name for name in set(ids) if ids.count(name) > 1))
            if has_snapshot:
                self.seen.add(frozenset(ids))


def names(*numbers: int) -> frozenset[str]:
    return frozenset(f"d{number}" for number in numbers)


@pytest.mark.slow
def test_a_reader_never_sees_a_document_twice_nor_misses_one(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    config = make_config(source, sink, engine=SLOW | {"fake_tokens_per_s": 20_000})
    with Reader(sink) as reader:
        run_job(config, RunOptions(limit=17))
        run_job(config)
        write_file(source / "part-001.parquet", [*range(20, 40), 777])
        write_file(source / "part-000.parquet", range(20))
        (source / "part-002.parquet").unlink()
        run_job(config)
        run_job(config, RunOptions(restart=True))
    assert not reader.doubled
    assert reader.num_reads > 10
    assert reader.seen <= {names(*range(100)), names(*range(40), *range(75, 100), 777)}


@pytest.mark.slow
def test_a_reader_sees_every_document_once_while_failed_rows_are_done_again(
    tmp_path: Path, engines: TracedEngines
) -> None:
    source, sink = write_corpus(tmp_path / "in", num_files=2), tmp_path / "out"
    seeds = range(25)
    texts = [f"{make_text(seed)} {POISON}" if seed == 7 else make_text(seed) for seed in seeds]
    write_file(source / "part-000.parquet", seeds, texts)
    assert run_job(make_config(source, sink), make_engine=engines).exit_code == 3
    with Reader(sink) as reader:
        assert redrive_job(str(sink)).exit_code == 0, "the poison does not hurt the plain engine"
    assert not reader.doubled
    assert reader.seen == {names(*range(50))}
    assert any(".r1." in path.name for path in (sink / "results").iterdir())


# input and resources ─────────────────────────────────────────────────────────────────────────────


def test_an_input_file_replaced_during_the_run_stops_it_and_the_next_run_takes_the_new_one(
    tmp_path: Path,
) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    new_file = tmp_path / "new.parquet"
    write_file(new_file, range(500, 530))
    old_file = source / "part-002.parquet"
    replace = Replacement("part-002.parquet", str(new_file), str(old_file), os.getpid())
    config = make_config(source, sink)
    with pytest.raises(GraniteRayError, match=r"part-002\.parquet") as stop:
        run_job(config, open_storage=partial(open_faulty, on_call=replace))
    assert stop.value.exit_code == 75
    assert report_of(sink)["exit_code"] == 75
    assert not (sink / "_SUCCESS.json").exists()
    assert run_job(config).exit_code == 0
    rows = check_output(sink, 105)
    assert names(*range(500, 530)) <= {row["document_id"] for row in rows}


@pytest.mark.slow
def test_an_input_file_replaced_while_it_is_answered_is_not_committed(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in", num_files=1, rows_per_file=5), tmp_path / "out"
    new_file = tmp_path / "new.parquet"
    write_file(new_file, range(500, 503))
    engines = ReplacingEngines(str(new_file), str(source / "part-000.parquet"))
    config = make_config(source, sink)
    with pytest.raises(GraniteRayError, match=r"part-000\.parquet has changed") as stop:
        run_job(config, make_engine=engines)
    assert stop.value.exit_code == 75
    assert not (sink / "results").exists()
    assert run_job(config).exit_code == 0
    assert {row["document_id"] for row in check_output(sink, 3)} == names(500, 501, 502)


def test_a_cluster_without_a_gpu_is_named_in_the_error(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in", num_files=1), tmp_path / "out"
    config = make_config(
        source,
        sink,
        engine={"backend": "transformers", "device": "cuda", "num_replicas": 2},
        job={"scheduling_timeout_s": 2},
    )
    with pytest.raises(GraniteRayError, match=r"want 2 GPUs.* has 0 GPUs and 6 CPUs") as refusal:
        run_job(config)
    assert refusal.value.exit_code == 75
    assert not (sink / "results").exists()
