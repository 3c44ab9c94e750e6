"""The endpoints of the overlay `service`: the keys of Serve's config, and of ours."""

import importlib
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from granite_ray.config import load_server_config
from tests.deployments import pick, pod_specs, render


def test_serve_knows_every_key_and_finds_the_application() -> None:
    service = pick(render("service"), "RayService", "granite")["spec"]
    serve = yaml.safe_load(service["serveConfigV2"])
    assert set(serve) <= set(ServeDeploySchema.model_fields), "Serve ignores misspelt keys"
    [application] = serve["applications"]
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    assert set(serve["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert set(application["args"]) == {"config"}


def test_the_servers_config_loads_and_what_it_names_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = render("service")
    places = pick(documents, "ConfigMap", "granite-env")["data"]
    for variable, value in places.items():
        monkeypatch.setenv(variable, value)
    path = tmp_path / "service.yaml"
    path.write_text(pick(documents, "ConfigMap", "granite-service")["data"]["service.yaml"])
    config = load_server_config(path)
    assert config.serve.keys_path == "/etc/granite/keys/keys.yaml"
    assert config.serve.store_path == f"{places['RESULTS']}/serve"
    for spec in pod_specs(pick(documents, "RayService", "granite")):
        mounts = {m["mountPath"] for c in spec["containers"] for m in c["volumeMounts"]}
        assert {"/etc/granite/keys", "/etc/granite/service", "/models"} <= mounts
