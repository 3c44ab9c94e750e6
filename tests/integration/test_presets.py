"""A preset as a job uses it: shapes from configs/models, random weights, the embedded tokenizer."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from granite_ray import run_job
from tests.corpus import make_config, write_corpus
from tests.invariants import check_output

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined_ray")]

PRESETS_PATH = Path(__file__).parents[2] / "configs" / "models"


def run_preset(
    tmp_path: Path, name: str, num_documents: int, **sections: dict[str, Any]
) -> tuple[str, list[dict[str, Any]]]:
    """Run a job in the shapes of a preset; return what the console said, and the rows."""
    documents = write_corpus(tmp_path / "in", num_files=1, rows_per_file=num_documents)
    model = {"path": str(PRESETS_PATH / name), "load_format": "dummy"}
    config = make_config(documents, tmp_path / "out", model=model, **sections)
    said = io.StringIO()
    report = run_job(config, console=Console(file=said, width=200))
    assert report.exit_code == 0, report.failures
    return said.getvalue(), check_output(tmp_path / "out", num_documents)


def test_a_job_in_the_shapes_of_a_preset_says_whose_tokenizer_it_takes(tmp_path: Path) -> None:
    said, rows = run_preset(tmp_path, "granite-4.0-h-small", 12)
    assert said.count("has no tokenizer: the embedded one stands in") == 1
    assert {row["checkpoint"] for row in rows} == {"granite-4.0-h-small"}
    assert {row["status"] for row in rows} == {"ok"}


@pytest.mark.slow
def test_a_job_runs_a_preset_in_its_real_shapes(tmp_path: Path) -> None:
    task = {"kind": "classify", "labels": ["river", "stone"]}
    engine = {"backend": "transformers", "device": "cpu"}
    _, rows = run_preset(tmp_path, "granite-4.0-h-350m", 3, task=task, engine=engine)
    assert {row["label"] for row in rows} <= {"river", "stone"}
    assert len({row["confidence"] for row in rows}) == 3
