"""What Ray Serve is told: replicas, autoscaling, draining, room for all that limits allow."""

from pathlib import Path

import pytest

from granite_ray.cluster import ReplicaResources
from granite_ray.errors import ConfigError
from granite_ray.serving.app import build, check_server, engine_options, with_absolute_paths
from tests.unit.serving.conftest import server_config

RESOURCES = ReplicaResources(1.0, 0.5, 1, 4, 2)


def test_a_number_of_replicas_is_fixed_and_a_range_follows_the_requests() -> None:
    fixed = engine_options(server_config({"engine": {"num_replicas": 3}}), RESOURCES)
    assert fixed["num_replicas"] == 3
    assert "autoscaling_config" not in fixed
    ranged = engine_options(
        server_config({"engine": {"num_replicas": [1, 4], "max_num_seqs": 32}}), RESOURCES
    )
    assert ranged["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 32,
    }
    assert "num_replicas" not in ranged
    assert ranged["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5}


def test_a_replica_takes_all_that_limits_admit_and_drains_as_told() -> None:
    config = server_config({"serve": {"max_in_flight": 7, "max_batch_in_flight": 5, "drain_s": 3}})
    options = engine_options(config, RESOURCES)
    assert options["max_ongoing_requests"] > 7 + 5
    assert options["graceful_shutdown_timeout_s"] == 3


@pytest.mark.parametrize("args", [{}, {"config": "a", "other": "b"}, {"configs": "a"}])
def test_the_import_path_takes_one_argument(args: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="args must be exactly config"):
        build(args)


def test_paths_mean_the_same_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = server_config(
        {"model": {"path": "model"}, "serve": {"store_path": "store", "keys_path": "keys.yaml"}}
    )
    found = with_absolute_paths(config)
    assert found.model.path == str(tmp_path / "model")
    assert found.serve.store_path == str(tmp_path / "store")
    assert found.serve.keys_path == str(tmp_path / "keys.yaml")
    assert with_absolute_paths(server_config({})).model.path == "quickstart"


def test_every_task_is_made_before_anything_starts() -> None:
    tasks = {"good": {"kind": "summarize"}, "bad": {"kind": "summarize", "max_tokens": 10**6}}
    with pytest.raises(ConfigError, match=r"Task 'bad': model\.max_model_len"):
        check_server(server_config({"serve": {"tasks": tasks}}))
