"""The Ray of a job as it starts: what a signal does then."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from granite_ray import cluster as cluster_module
from granite_ray.cluster import Cluster, stop_ray
from granite_ray.interrupts import InterruptedRunError
from tests.corpus import make_config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_ray_takes_while_it_starts_ends_the_run_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def start(**_: Any) -> None:
        raise SystemExit(int(number))  # as Ray's own handler does

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    # Other tests in this process have joined a Ray, and go on with it.
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = make_config(tmp_path, tmp_path / "out")
    with pytest.raises(InterruptedRunError) as ended, Cluster(config.job, config.engine) as cluster:
        cluster.start()
    assert ended.value.exit_code == 128 + number


@pytest.mark.parametrize("name", ["StreamingExecutor-dataset_1_0", "granite-ray-stream"])
def test_ray_is_not_left_while_a_thread_may_call_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    left: list[bool] = []
    ended = threading.Event()
    monkeypatch.setattr(ray, "shutdown", lambda: left.append(ended.is_set()))
    monkeypatch.setattr(cluster_module, "STOP_TIMEOUT_S", 0.2)
    calling = threading.Thread(target=ended.wait, name=name, daemon=True)
    calling.start()
    assert not stop_ray()
    assert not left, "the call to come would end the process by exit code 1"
    threading.Timer(0.05, ended.set).start()
    assert stop_ray()
    assert left == [True]
