"""Jobs whose replicas have several ranks: the same rows, and nothing of a dead replica stays."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from granite_ray import run_job
from granite_ray.errors import ConfigError, InfrastructureError
from tests.clusters import IMPATIENCE, LoopbackCluster, loopback_cluster
from tests.corpus import job_values, make_config, write_corpus
from tests.faults import TracedRanks, driver, is_gone, result_files, wait_until
from tests.invariants import check_output, rows_of
from tests.tiny_models import write_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.ranks, pytest.mark.timeout(900)]

RANK_TIMEOUT_S = 10.0
"""Far longer than a step of a tiny model takes on a busy machine."""
NUM_DOCUMENTS = 50
MANY_TOKENS = 200
"""Of each answer, where something is to happen before all are written: the work of a minute."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "granitemoehybrid")


@pytest.fixture
def trace(tmp_path: Path) -> TracedRanks:
    (tmp_path / "trace").mkdir()
    return TracedRanks(str(tmp_path / "trace"))


def sections(checkpoint: Path, max_tokens: int = 16, **engine: Any) -> dict[str, dict[str, Any]]:
    """A job of a minute's work at most on one rank: one sequence after the other."""
    return {
        "model": {"path": str(checkpoint)},
        "engine": {
            "backend": "native",
            "device": "cpu",
            "cache_gib": 0.05,
            "max_num_seqs": 1,
            "rank_timeout_s": RANK_TIMEOUT_S,
            **engine,
        },
        "task": {"max_tokens": max_tokens},
        "job": {"scheduling_timeout_s": 200},
    }


def placement_states() -> list[str]:
    """The states of all placement groups that Ray knows, of the cluster that is joined."""
    return [group["state"] for group in ray.util.placement_group_table().values()]


def check_nothing_is_left(trace: TracedRanks) -> None:
    """No process of any rank, no placement group, no file in shared memory but Ray's own."""
    ranks = [rank.process_id for rank in trace.ranks()]
    wait_until(lambda: all(map(is_gone, ranks)), timeout_s=30)
    wait_until(lambda: set(placement_states()) <= {"REMOVED"}, timeout_s=30)
    shared = [path.name for path in Path("/dev/shm").iterdir()]
    assert not [name for name in shared if "gloo" in name or "torch" in name]


@pytest.mark.usefixtures("joined_ray")
def test_rows_are_those_of_replicas_of_one_rank(
    tmp_path: Path, checkpoint: Path, trace: TracedRanks
) -> None:
    source = write_corpus(tmp_path / "in", num_files=1)
    found: dict[int, Any] = {}
    for size in (1, 2):
        sink = tmp_path / f"out-{size}"
        values = sections(checkpoint, expert_parallel_size=size, max_num_seqs=8)
        report = run_job(make_config(source, sink, **values), make_engine=trace)
        assert (report.exit_code, report.worker_deaths) == (0, 0)
        found[size] = check_output(sink, 25)
    assert found[1] == found[2]
    assert len({row["summary"] for row in found[1]}) == 25
    assert [rank.rank for rank in sorted(trace.ranks(), key=lambda rank: rank.rank)] == [0, 1]
    check_nothing_is_left(trace)


def test_more_ranks_than_the_checkpoint_has_experts_are_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    source = write_corpus(tmp_path / "in", num_files=1, rows_per_file=1)
    engine = {"backend": "native", "expert_parallel_size": 9}
    config = make_config(source, tmp_path / "out", engine=engine)
    with pytest.raises(ConfigError, match=r"size is 9, .* has 8 experts .* at most 8") as stop:
        run_job(config)
    assert stop.value.exit_code == 2
    assert not (tmp_path / "out").exists()


# faults ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Any:
    """A corpus, and its rows from a replica of one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write_corpus(folder / "in", num_files=2)
    with loopback_cluster(4) as cluster:
        values = sections(checkpoint, MANY_TOKENS)
        job = {"config": job_values(source, folder / "out", **values)}
        with driver(folder / "driver", job, cluster.address) as run:
            assert run.wait(300) == 0, run.output()
    return source, rows_of(folder / "out")


@pytest.fixture
def cluster() -> Iterator[LoopbackCluster]:
    """Three nodes, joined by the test itself, which looks at what is left on them."""
    with loopback_cluster(2, 4, 4, environment=IMPATIENCE) as started:
        ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
        yield started
        ray.shutdown()


RunDisturbed = Callable[[Callable[[TracedRanks], None]], None]


@pytest.fixture
def run_disturbed(
    tmp_path: Path,
    checkpoint: Path,
    undisturbed: Any,
    cluster: LoopbackCluster,
    trace: TracedRanks,
) -> RunDisturbed:
    """Runs a job on two replicas of two ranks, and disturbs it once it has committed a shard."""
    source, expected = undisturbed
    values = sections(checkpoint, MANY_TOKENS, expert_parallel_size=2, num_replicas=2)
    values["source"] = {"documents_per_shard": 5}
    job = {
        "config": job_values(source, tmp_path / "out", **values),
        "trace_ranks": trace.folder,
    }

    def run_it(disturb: Callable[[TracedRanks], None]) -> None:
        with driver(tmp_path / "driver", job, cluster.address) as run:
            wait_until(lambda: len(trace.ranks()) >= 4, run, timeout_s=200)
            wait_until(lambda: len(result_files(tmp_path / "out")) > 0, run, timeout_s=200)
            disturb(trace)
            assert run.wait(600) == 0, run.output()
        assert check_output(tmp_path / "out", NUM_DOCUMENTS) == expected
        assert len(trace.ranks()) > 4, "no replica was lost"
        check_nothing_is_left(trace)

    return run_it


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1], ids=["leader", "follower"])
def test_a_rank_that_dies_or_stops_takes_its_replica_down_and_the_shard_is_done_again(
    run_disturbed: RunDisturbed, rank: int, how: signal.Signals
) -> None:
    def disturb(trace: TracedRanks) -> None:
        doomed = next(one for one in trace.ranks() if one.rank == rank)
        fellows = [one for one in trace.ranks() if one.replica_id == doomed.replica_id]
        os.kill(doomed.process_id, how)
        # Stated: at once where it dies, else after the time-out; here with much room to notice.
        for one in fellows:
            wait_until(partial(is_gone, one.process_id), timeout_s=RANK_TIMEOUT_S + 30)

    run_disturbed(disturb)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_shards_of_ranks_on_a_lost_node_are_done_elsewhere(
    run_disturbed: RunDisturbed, cluster: LoopbackCluster, how: signal.Signals
) -> None:
    def disturb(trace: TracedRanks) -> None:
        nodes = [cluster.node_of(one.process_id) for one in trace.ranks()]
        doomed = max(node for node in nodes if node is not None)
        assert doomed > 0, "ranks are on a node without the driver"
        cluster.kill(doomed, "raylet", how)

    run_disturbed(disturb)


@pytest.mark.slow
def test_a_killed_driver_leaves_no_rank(
    tmp_path: Path, checkpoint: Path, cluster: LoopbackCluster, trace: TracedRanks
) -> None:
    source = write_corpus(tmp_path / "in", num_files=2)
    values = sections(checkpoint, expert_parallel_size=2)
    job = {
        "config": job_values(source, tmp_path / "out", **values),
        "trace_ranks": trace.folder,
    }
    with driver(tmp_path / "driver", job, cluster.address) as run:
        wait_until(lambda: len(trace.ranks()) == 2, run, timeout_s=200)
        run.send(signal.SIGKILL)
        run.wait()
    check_nothing_is_left(trace)


# placing ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_command_line_gives_the_same_rows_on_two_nodes(tmp_path: Path) -> None:
    """The quickstart's job, two replicas of two ranks each."""
    rows = {}
    with loopback_cluster(4, 4) as cluster:
        for size in (1, 2):
            config = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
            config["sink"] = {"path": str(tmp_path / f"out-{size}")}
            config.setdefault("engine", {}).update(
                expert_parallel_size=size, num_replicas=2, device="cpu", cache_gib=0.5
            )
            config.setdefault("model", {})["dtype"] = "float32"
            config["job"] = {"ray_address": cluster.address}
            path = tmp_path / f"job-{size}.yaml"
            path.write_text(yaml.safe_dump(config))
            command = [sys.executable, "-m", "granite_ray.cli", "run", str(path), "--limit", "60"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
            assert done.returncode == 0, done.stderr
            rows[size] = rows_of(tmp_path / f"out-{size}")
    assert len(rows[1]) == 60
    assert [unscored(row) for row in rows[1]] == [unscored(row) for row in rows[2]]
    for one, two in zip(rows[1], rows[2], strict=True):
        assert one["confidence"] == pytest.approx(two["confidence"], abs=1e-3)


def unscored(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what float rounding may move."""
    return {name: value for name, value in row.items() if name not in ("scores", "confidence")}


@pytest.fixture
def eight_gpus() -> Iterator[str]:
    with loopback_cluster(8, 8, num_gpus=4) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster.address
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("num_replicas", [4, [4, 8]], ids=["fixed", "ranged"])
def test_replicas_that_need_all_devices_start_at_once(
    tmp_path: Path, checkpoint: Path, trace: TracedRanks, num_replicas: Any
) -> None:
    """Devices on paper: torch finds none, and runs on the CPU."""
    values = sections(checkpoint, expert_parallel_size=2, num_replicas=num_replicas, device="auto")
    source = write_corpus(tmp_path / "in", num_files=2)
    config = make_config(source, tmp_path / "out", **values, source={"documents_per_shard": 5})
    assert run_job(config, make_engine=trace).exit_code == 0
    check_output(tmp_path / "out", NUM_DOCUMENTS)
    assert len(trace.ranks()) == 8, "of a range, as many as there is room for"
    check_nothing_is_left(trace)


@pytest.mark.slow
@pytest.mark.usefixtures("eight_gpus")
def test_more_replicas_than_there_are_devices_for_are_refused_in_time(
    tmp_path: Path, checkpoint: Path
) -> None:
    values = sections(checkpoint, expert_parallel_size=3, num_replicas=3, device="auto")
    values["job"] = {"scheduling_timeout_s": 5}
    source = write_corpus(tmp_path / "in", num_files=1)
    with pytest.raises(InfrastructureError, match=r"3 replicas want 9 GPUs .*on 3 ranks") as stop:
        run_job(make_config(source, tmp_path / "out", **values))
    assert "it has 8 GPUs" in str(stop.value)
    assert placement_states() == []
