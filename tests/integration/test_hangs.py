"""Engines that hang in a replica that lives, and what is only slow and must not be taken for it."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from granite_ray import run_job
from granite_ray.errors import InfrastructureError
from tests.corpus import job_values, make_config, write_corpus
from tests.faults import driver, open_faulty, wait_until
from tests.hangs import HangingEngines, SlowUpload
from tests.invariants import check_output, report_of, rows_of

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TIMEOUT_S = 20.0
"""Far longer than a replica takes to start on a busy machine."""
BOUND = {"scheduling_timeout_s": TIMEOUT_S}


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """A folder in which engines note what happens to them."""
    (tmp_path / "trace").mkdir()
    return str(tmp_path / "trace")


@pytest.mark.usefixtures("joined_ray")
@pytest.mark.slow
def test_a_replica_whose_engine_hangs_is_replaced_and_every_document_answered(
    tmp_path: Path, trace: str
) -> None:
    source = write_corpus(tmp_path / "in", num_files=1)
    run_job(make_config(source, tmp_path / "undisturbed"))
    engines = HangingEngines(trace, num_hanging=1)
    # Shorter than elsewhere, for a test that runs by default: all that starts has just run before.
    config = make_config(source, tmp_path / "out", job={"scheduling_timeout_s": 10})
    report = run_job(config, make_engine=engines)
    assert report.exit_code == 0
    assert report.worker_deaths >= 1
    assert len(engines.traced.replicas()) == 2
    assert check_output(tmp_path / "out", 25) == rows_of(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.usefixtures("joined_ray")
def test_a_call_that_takes_longer_than_the_time_out_but_makes_steps_is_no_hang(
    tmp_path: Path,
) -> None:
    source = write_corpus(tmp_path / "in", num_files=1, rows_per_file=1)
    num_tokens = tokens_of_first_document(source, tmp_path)
    slow = {"fake_tokens_per_s": num_tokens / (2 * TIMEOUT_S + 3)}
    config = make_config(source, tmp_path / "out", engine=slow, job=BOUND)
    started = time.monotonic()
    report = run_job(config)
    assert time.monotonic() - started > 2 * TIMEOUT_S
    assert (report.exit_code, report.worker_deaths) == (0, 0)
    check_output(tmp_path / "out", 1)


def tokens_of_first_document(source: Path, tmp_path: Path) -> int:
    """Prompt and answer tokens of a corpus of one document with one call."""
    run_job(make_config(source, tmp_path / "measured"))
    [row] = rows_of(tmp_path / "measured")
    assert row["num_chunks"] == 1
    return int(row["num_prompt_tokens"] + row["num_completion_tokens"])


@pytest.mark.slow
@pytest.mark.usefixtures("joined_ray")
def test_an_upload_that_takes_long_is_no_hang(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", num_files=1, rows_per_file=5)
    config = make_config(source, tmp_path / "out", job=BOUND)
    opener = partial(open_faulty, on_call=SlowUpload(2 * TIMEOUT_S + 3))
    report = run_job(config, open_storage=opener)
    assert (report.exit_code, report.worker_deaths) == (0, 0)
    check_output(tmp_path / "out", 5)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("joined_ray")
def test_engines_that_always_hang_end_the_run_after_bounded_deaths_with_the_cause(
    tmp_path: Path, trace: str
) -> None:
    config = make_config(
        write_corpus(tmp_path / "in"),
        tmp_path / "out",
        source={"documents_per_shard": 5},  # 12 shards are inside three replicas at once
        engine={"num_replicas": 3},
        job=BOUND,
    )
    engines = HangingEngines(trace, num_hanging=10**6)
    with pytest.raises(InfrastructureError, match=r"died 21 times .* The engine hangs: ") as stop:
        run_job(config, make_engine=engines)
    assert "no step for 20 s (job.scheduling_timeout_s). Look" in str(stop.value)
    assert stop.value.exit_code == 75
    assert report_of(tmp_path / "out")["exit_code"] == 75


@pytest.mark.slow
def test_a_process_that_stands_still_altogether_does_not_hide_behind_an_idle_replica(
    tmp_path: Path, trace: str, ray_address: str
) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    hanging: dict[str, Any] = {"folder": trace, "num_hanging": 1, "how": "holds_process"}
    config = job_values(source, sink, engine={"num_replicas": 2}, job=BOUND)
    job = {"config": config, "hanging": hanging}
    engines = HangingEngines(**hanging)
    with driver(tmp_path / "driver", job, ray_address) as run:
        wait_until(lambda: len(engines.traced.replicas()) == 2, run)
        assert run.wait(6 * TIMEOUT_S) == 75, run.output()
        assert (
            "No progress for 40 s (twice job.scheduling_timeout_s), with shards in an engine"
            in (run.output())
        )
    wait_until(lambda: not psutil.pid_exists(engines.traced.replicas()[0][0]), timeout_s=30)
    assert report_of(sink)["exit_code"] == 75
    run_job(make_config(source, sink), make_engine=engines)
    check_output(sink, 100)
