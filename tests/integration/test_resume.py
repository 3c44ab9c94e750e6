"""Kill the driver wherever it hurts, run again, and compare with a run that nobody disturbed."""

import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from granite_ray import GraniteRayError, run_job
from granite_ray.config import parse_config
from tests.corpus import job_values, make_text, write_corpus, write_file
from tests.faults import TracedEngines, driver, result_files, wait_until
from tests.invariants import check_output, report_of, rows_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("joined_ray"),
    pytest.mark.timeout(300),  # on a busy machine each of several runs takes a minute
]

NUM_DOCUMENTS = 100
SHARD = 10
SLOW = {"fake_tokens_per_s": 4000}
"""Some seconds for the whole corpus, so that there is a middle to be killed in."""
SLOWER = {"fake_tokens_per_s": 500}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "in")


@pytest.fixture(scope="session")
def undisturbed(joined_ray: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:  # noqa: ARG001 - it is there, that is all
    """The rows of a run that nobody disturbed."""
    sink = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_job(parse_config(job_values(corpus, sink))).exit_code == 0
    return check_output(sink, NUM_DOCUMENTS)


# at named points ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "crash",
    [
        pytest.param("after replace lease.json", marks=pytest.mark.slow),
        pytest.param("after put_if_absent probe", marks=pytest.mark.slow),
        "after replace job.json",
        pytest.param("before replace _SUCCESS.json", marks=pytest.mark.slow),
        pytest.param("after replace _SUCCESS.json", marks=pytest.mark.slow),
        pytest.param("before replace lease.json", marks=pytest.mark.slow),
        pytest.param("before replace job.json", marks=pytest.mark.slow),
        pytest.param("before replace progress.json", marks=pytest.mark.slow),
        pytest.param("before replace report.json", marks=pytest.mark.slow),
        pytest.param("before delete lease.json", marks=pytest.mark.slow),
    ],
)
def test_a_driver_killed_between_two_storage_calls_is_resumed(
    corpus: Path, undisturbed: Rows, ray_address: str, tmp_path: Path, crash: str
) -> None:
    sink = tmp_path / "out"
    values = job_values(corpus, sink)
    when, call, path = crash.split()
    job = {"config": values, "crash": {"call": call, "path": path, "when": when}}
    with driver(tmp_path / "driver", job, ray_address) as killed:
        assert killed.wait() == 128 + signal.SIGKILL, killed.output()
    is_after_the_last_shard = path in ("_SUCCESS.json", "report.json") or call == "delete"
    report = run_job(parse_config(values))
    assert report.exit_code == 0
    assert check_output(sink, NUM_DOCUMENTS) == undisturbed
    if is_after_the_last_shard:
        assert report.model_calls == 0
    assert {p.name for p in (sink / "_granite").iterdir() if not p.name.startswith(".")} == {
        "job.json",
        "progress.json",
        "report.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize(("when", "nth"), [("after", 1), ("before", 1), ("after", 2)])
def test_a_driver_killed_while_it_deletes_what_is_superseded_is_resumed(
    ray_address: str, tmp_path: Path, when: str, nth: int
) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    values = job_values(source, sink)
    run_job(parse_config(values))
    seeds = range(25, 50)
    write_file(
        source / "part-001.parquet", seeds, [make_text(seed + 1000 * (seed > 40)) for seed in seeds]
    )
    crash = {"call": "delete", "path": "results/", "when": when, "nth": nth}
    with driver(tmp_path / "driver", {"config": values, "crash": crash}, ray_address) as killed:
        assert killed.wait() == 128 + signal.SIGKILL, killed.output()
    assert len(rows_of(sink)) == NUM_DOCUMENTS, "the snapshot is complete before the first delete"
    report = run_job(parse_config(values))
    assert (report.exit_code, report.model_calls) == (0, 0)
    rows = check_output(sink, NUM_DOCUMENTS)
    run_job(parse_config(job_values(source, tmp_path / "fresh")))
    assert rows == rows_of(tmp_path / "fresh")


# at random moments ───────────────────────────────────────────────────────────────────────────────


def seeds() -> list[Any]:
    """One seed by default, all fifty under `slow`."""
    return [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 1 else []) for seed in range(50)]


@pytest.mark.parametrize("seed", seeds())
def test_a_driver_killed_at_a_random_moment_is_resumed(
    corpus: Path, undisturbed: Rows, ray_address: str, tmp_path: Path, seed: int
) -> None:
    sink, trace = tmp_path / "out", tmp_path / "trace"
    trace.mkdir()
    engines = TracedEngines(str(trace))
    values = job_values(corpus, sink, engine=SLOW)
    job = {"config": values, "trace": str(trace)}
    with driver(tmp_path / "driver", job, ray_address) as killed:
        wait_until(engines.replicas, killed)
        time.sleep(random.Random(seed).uniform(0.0, 4.0))
        killed.send(signal.SIGKILL)
        killed.wait()
    committed = {
        (row["source_file"], row["source_row"]): row["document_id"]
        for row in (rows_of(sink) if result_files(sink) else [])
    }
    asked = engines.asked()
    report = run_job(parse_config(job_values(corpus, sink)), make_engine=engines)
    assert report.exit_code == 0
    assert check_output(sink, NUM_DOCUMENTS) == undisturbed
    again = Counter(engines.asked()[len(asked) :])
    assert not {f"d{number}" for number in again} & set(committed.values()), (
        "committed, asked again"
    )


@pytest.mark.slow
def test_a_driver_killed_again_and_again_ends_with_the_same_rows(
    corpus: Path, undisturbed: Rows, ray_address: str, tmp_path: Path
) -> None:
    sink, trace = tmp_path / "out", tmp_path / "trace"
    trace.mkdir()
    values = job_values(corpus, sink, engine=SLOW)
    job = {"config": values, "trace": str(trace)}
    for round_index in range(2):
        num_files = len(result_files(sink))
        with driver(tmp_path / f"driver-{round_index}", job, ray_address) as killed:
            wait_until(lambda n=num_files: len(result_files(sink)) > n, killed)
            killed.send(signal.SIGKILL)
            killed.wait()
    run_job(parse_config(values))
    assert check_output(sink, NUM_DOCUMENTS) == undisturbed


# signals ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_lets_the_shards_in_flight_finish_and_releases_the_lease(
    corpus: Path, undisturbed: Rows, ray_address: str, tmp_path: Path, number: signal.Signals
) -> None:
    sink, trace = tmp_path / "out", tmp_path / "trace"
    trace.mkdir()
    engines = TracedEngines(str(trace))
    # Far more shards than a replica takes at once: some have not begun when the signal comes.
    small = {"documents_per_shard": 4}
    values = job_values(corpus, sink, engine=SLOWER, source=small, job={"grace_s": 60})
    with driver(tmp_path / "driver", {"config": values, "trace": str(trace)}, ray_address) as told:
        wait_until(lambda: result_files(sink), told)
        told.send(number)
        assert told.wait() == 128 + number, told.output()
    assert not (sink / "_granite" / "lease.json").exists()
    assert not (sink / "_SUCCESS.json").exists()
    assert report_of(sink)["exit_code"] == 128 + number
    rows = rows_of(sink)
    assert len(rows) < NUM_DOCUMENTS
    finished = {int(row["document_id"][1:]) for row in rows}
    assert set(engines.asked()) == finished, "what had begun was finished"
    again = parse_config(job_values(corpus, sink, source=small))
    report = run_job(again, make_engine=engines)
    assert report.exit_code == 0
    assert check_output(sink, NUM_DOCUMENTS) == undisturbed
    assert max(Counter(engines.asked()).values()) == 1, "nothing is asked twice"


@pytest.mark.slow
def test_a_signal_drops_the_shards_in_flight_when_the_grace_is_over(
    corpus: Path, undisturbed: Rows, ray_address: str, tmp_path: Path
) -> None:
    sink, trace = tmp_path / "out", tmp_path / "trace"
    trace.mkdir()
    hours = job_values(corpus, sink, engine={"fake_tokens_per_s": 1}, job={"grace_s": 1})
    with driver(tmp_path / "driver", {"config": hours, "trace": str(trace)}, ray_address) as told:
        wait_until(TracedEngines(str(trace)).asked, told)
        told.send(signal.SIGTERM)
        assert told.wait() == 143, told.output()
    assert not (sink / "_granite" / "lease.json").exists()
    run_job(parse_config(job_values(corpus, sink)))
    assert check_output(sink, NUM_DOCUMENTS) == undisturbed


def test_a_signal_ends_a_run_that_waits_for_a_larger_cluster(
    corpus: Path, ray_address: str, tmp_path: Path
) -> None:
    sink = tmp_path / "out"
    values = job_values(
        corpus, sink, engine={"num_replicas": 1000}, job={"scheduling_timeout_s": 3600}
    )
    with driver(tmp_path / "driver", {"config": values}, ray_address) as told:
        wait_until((sink / "_granite" / "progress.json").exists, told)
        time.sleep(1.0)
        told.send(signal.SIGTERM)
        assert told.wait() == 143, told.output()
    assert report_of(sink)["exit_code"] == 143
    assert not (sink / "_granite" / "lease.json").exists()


# one writer ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_of_two_runs_at_once_one_works_and_the_other_writes_nothing(
    corpus: Path, undisturbed: Rows, ray_address: str, tmp_path: Path
) -> None:
    sink = tmp_path / "out"
    values = job_values(corpus, sink, engine=SLOW)
    with driver(tmp_path / "driver", {"config": values}, ray_address) as first:
        wait_until((sink / "_granite" / "job.json").exists, first)
        with pytest.raises(GraniteRayError, match="another run holds") as refusal:
            run_job(parse_config(values))
        assert refusal.value.exit_code == 6
        assert first.wait() == 0, first.output()
    assert check_output(sink, NUM_DOCUMENTS) == undisturbed
    assert report_of(sink)["documents"]["generated"] == NUM_DOCUMENTS


@pytest.mark.slow
def test_a_run_that_slept_past_its_lease_stops_and_leaves_nothing_behind(
    corpus: Path, undisturbed: Rows, ray_address: str, tmp_path: Path
) -> None:
    sink = tmp_path / "out"
    values = job_values(corpus, sink, engine=SLOW, job={"lease_s": 2})
    with driver(tmp_path / "driver", {"config": values}, ray_address) as sleeper:
        wait_until(lambda: len(result_files(sink)) >= 2, sleeper)
        sleeper.send(signal.SIGSTOP)
        successor = run_job(parse_config(values))
        assert successor.exit_code == 0
        assert successor.documents.already_committed > 0
        snapshot = (sink / "_SUCCESS.json").read_bytes()
        sleeper.send(signal.SIGCONT)
        assert sleeper.wait() == 6, sleeper.output()
    assert (sink / "_SUCCESS.json").read_bytes() == snapshot
    assert report_of(sink)["run_id"] == successor.run_id
    assert check_output(sink, NUM_DOCUMENTS) == undisturbed


@pytest.mark.slow
def test_the_lease_of_a_dead_process_on_this_host_is_taken_over_at_once(
    corpus: Path, undisturbed: Rows, ray_address: str, tmp_path: Path
) -> None:
    sink = tmp_path / "out"
    hour = {"lease_s": 3600}
    values = job_values(corpus, sink, job=hour)
    crash = {"call": "replace", "path": "job.json", "when": "after"}
    with driver(tmp_path / "driver", {"config": values, "crash": crash}, ray_address) as killed:
        assert killed.wait() == 128 + signal.SIGKILL
    assert (sink / "_granite" / "lease.json").exists()
    assert run_job(parse_config(values)).exit_code == 0, "or this test would last an hour"
    assert check_output(sink, NUM_DOCUMENTS) == undisturbed
