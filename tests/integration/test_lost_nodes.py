"""Nodes and control stores that die under a run, on clusters of the test's own."""

import signal
import time
from pathlib import Path

import pytest

from tests.clusters import loopback_cluster
from tests.corpus import job_values, write_corpus
from tests.faults import TracedEngines, driver, is_gone, result_files, wait_until
from tests.invariants import check_output, report_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_DOCUMENTS = 100
SLOW = {"fake_tokens_per_s": 1000, "num_replicas": 2}
HEAD_DEATH_S = 60.0
"""A driver that lost its head is gone after this time, with what it takes to end."""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_shards_of_a_dead_node_run_elsewhere_and_no_document_is_blamed(
    tmp_path: Path, how: signal.Signals
) -> None:
    source, sink, trace = write_corpus(tmp_path / "in"), tmp_path / "out", tmp_path / "trace"
    trace.mkdir()
    engines = TracedEngines(str(trace))
    # Ray needs a minute and a half to give up a daemon that stands still.
    patient = {"scheduling_timeout_s": 200}
    job = {"config": job_values(source, sink, engine=SLOW, job=patient), "trace": str(trace)}
    with (
        loopback_cluster(2, 3, 3) as cluster,
        driver(tmp_path / "driver", job, cluster.address) as run,
    ):
        wait_until(lambda: len(engines.replicas()) == 2 and len(result_files(sink)) > 1, run)
        nodes = {cluster.node_of(pid) for pid, _ in engines.replicas()}
        doomed = max(node for node in nodes if node is not None)
        assert doomed > 0, "a replica is on a node without the driver"
        lost = [pid for pid, _ in engines.replicas() if cluster.node_of(pid) == doomed]
        cluster.kill(doomed, "raylet", how)
        assert run.wait(600) == 0, run.output()
        # Whoever waits for a daemon that stands still would wait for ever.
        wait_until(lambda: all(map(is_gone, lost)), timeout_s=60)
    check_output(sink, NUM_DOCUMENTS)
    assert len(engines.replicas()) > 2, "no replica was lost"
    assert report_of(sink)["worker_deaths"] == 0


def test_a_run_without_its_head_ends_in_time_and_another_cluster_resumes_it(
    tmp_path: Path,
) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    config = job_values(source, sink, engine=SLOW)
    with (
        loopback_cluster(4) as cluster,
        driver(tmp_path / "driver", {"config": config}, cluster.address) as run,
    ):
        wait_until(lambda: result_files(sink), run)
        cluster.kill(0, "gcs_server")
        killed_at = time.monotonic()
        assert run.wait(200) == 75, run.output()
        assert time.monotonic() - killed_at < HEAD_DEATH_S
        assert "head" in run.output()
    assert report_of(sink)["exit_code"] == 75
    num_committed = len(result_files(sink))
    assert num_committed
    with (
        loopback_cluster(4) as cluster,
        driver(tmp_path / "again", {"config": config}, cluster.address) as run,
    ):
        assert run.wait(200) == 0, run.output()
    check_output(sink, NUM_DOCUMENTS)
    assert report_of(sink)["shards"]["reused"] == num_committed


def test_a_job_spreads_over_its_nodes_while_one_comes_and_one_goes(tmp_path: Path) -> None:
    source, sink, trace = write_corpus(tmp_path / "in"), tmp_path / "out", tmp_path / "trace"
    trace.mkdir()
    engines = TracedEngines(str(trace))
    slow = {"fake_tokens_per_s": 60, "num_replicas": 5}
    patient = {"scheduling_timeout_s": 300}  # whole nodes start meanwhile
    config = job_values(source, sink, engine=slow, job=patient)
    job = {"config": config, "trace": str(trace)}
    with (
        loopback_cluster(1, 3, 3) as cluster,
        driver(tmp_path / "driver", job, cluster.address) as run,
    ):
        wait_until(lambda: len(engines.replicas()) == 5 and result_files(sink), run, timeout_s=400)
        places = {cluster.node_of(pid) for pid, _ in engines.replicas()}
        assert {1, 2} <= places, "the replicas are spread over the nodes"
        added = cluster.start_node(3)  # without it there would be room for four
        cluster.kill(2, "raylet")  # the driver is on another
        wait_until(lambda: added in {cluster.node_of(pid) for pid, _ in engines.replicas()}, run)
        assert run.wait(600) == 0, run.output()
    check_output(sink, NUM_DOCUMENTS)
    assert report_of(sink)["worker_deaths"] == 0, "no document is blamed"
