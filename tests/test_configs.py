import importlib
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from granite_ray.config import ExtractConfig, load_config, load_server_config

CONFIGS_PATH = Path(__file__).parents[1] / "configs"
SERVER_CONFIGS = ("serve", "serve_deploy")
ALL_CONFIGS = sorted(CONFIGS_PATH.rglob("*.yaml"))
CONFIGS = [path for path in ALL_CONFIGS if path.stem not in SERVER_CONFIGS]
KINDS = {"summarize", "classify", "extract", "generate"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DOCUMENTS", "RESULTS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads(path: Path):
    config = load_config(path)
    if path.stem in KINDS:
        assert config.task.kind == path.stem


def test_there_is_an_example_of_every_task():
    assert {path.stem for path in CONFIGS} >= KINDS


def test_the_readme_lists_every_config_once():
    listed = re.findall(r"\((\w+)\.yaml\)", (CONFIGS_PATH / "README.md").read_text())
    assert sorted(listed) == [path.stem for path in ALL_CONFIGS]


def test_the_server_config_loads_and_the_deploy_file_names_what_there_is():
    served = load_server_config(CONFIGS_PATH / "serve.yaml")
    assert set(served.tasks) == {"sections", "short"}
    [application] = yaml.safe_load((CONFIGS_PATH / "serve_deploy.yaml").read_text())["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert set(application["args"]) == {"config"}


def test_examples_take_their_places_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DOCUMENTS", "in/")
    monkeypatch.setenv("RESULTS", "out/")
    config = load_config(CONFIGS_PATH / "summarize.yaml")
    assert (config.source.path, config.sink.path) == (("in/",), "out/")


def test_example_schema_accepts_an_invoice_and_refuses_an_unknown_field():
    task = load_config(CONFIGS_PATH / "extract.yaml").task
    assert isinstance(task, ExtractConfig)
    jsonschema.Draft202012Validator.check_schema(task.schema_)
    assert task.schema_ == json.loads((CONFIGS_PATH / "schemas" / "invoice.json").read_text())
    validator = jsonschema.Draft202012Validator(task.schema_)
    invoice = {
        "invoice_number": "R-1",
        "issued_on": None,
        "supplier": "ACME",
        "currency": "EUR",
        "total": 12.5,
        "line_items": [{"description": "bolt", "quantity": 5, "amount": 12.5}],
    }
    assert validator.is_valid(invoice)
    assert not validator.is_valid({**invoice, "mood": "good"})
