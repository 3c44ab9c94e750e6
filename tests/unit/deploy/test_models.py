"""The job that fills the model cache: nothing appears there that is not what was asked for."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.deployments import DEPLOY

specification = importlib.util.spec_from_file_location("fill", DEPLOY / "base/models/fill.py")
assert specification
assert specification.loader
fill: Any = importlib.util.module_from_spec(specification)
specification.loader.exec_module(fill)

WEIGHTS = b"weights"


class Hub:
    """Downloads one file, and counts."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[tuple[str, str, list[str]]] = []

    def __call__(self, repository: str, revision: str, names: list[str], folder: Path) -> None:
        self.asked.append((repository, revision, names))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(self.data)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    model = {"repository": "o/m", "revision": "abc", "sha256": {"model.safetensors": digest}}
    (tmp_path / "models.json").write_text(json.dumps({"models": [model]}))
    (tmp_path / "models").mkdir()
    return [str(tmp_path / "models.json"), str(tmp_path / "models")]


def test_a_checkpoint_appears_whole_and_is_downloaded_once(
    arguments: list[str], tmp_path: Path
) -> None:
    hub = Hub(WEIGHTS)
    assert fill.main(arguments, hub) == 0
    assert fill.main(arguments, hub) == 0
    assert hub.asked == [("o/m", "abc", ["model.safetensors"])]
    assert (tmp_path / "models" / "m" / "model.safetensors").read_bytes() == WEIGHTS


def test_other_bytes_than_asked_for_never_appear(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fill.main(arguments, Hub(b"others")) == 1
    assert not (tmp_path / "models" / "m").exists()
    assert "models.json says" in capsys.readouterr().err


def test_a_checkpoint_that_was_changed_is_told(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill.main(arguments, Hub(WEIGHTS))
    (tmp_path / "models" / "m" / "model.safetensors").write_bytes(b"changed")
    assert fill.main(arguments, Hub(WEIGHTS)) == 1
    assert "its SHA-256 is" in capsys.readouterr().err


def test_the_list_that_is_shipped_is_read() -> None:
    assert json.loads((DEPLOY / "base/models/models.json").read_text()) == {"models": []}
