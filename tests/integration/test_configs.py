"""Every config that the model cards ask for runs as a job, on what it reads, in small."""

from pathlib import Path

import pytest

from granite_ray import run_job
from granite_ray.config import load_config
from tests.invariants import check_output
from tests.samples import ROWS, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined_ray")]

CONFIGS_PATH = Path(__file__).parents[2] / "configs"
QUICK = ("answer_from_documents",)
"""Its rows have lists of objects; the others are left to the longer run."""


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROWS],
)
def test_a_config_runs_as_a_job(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCUMENTS", str(tmp_path / "in"))
    monkeypatch.setenv("RESULTS", str(tmp_path / "out"))
    small = ["model.path=quickstart", "engine.backend=fake", "task.max_tokens=16"]
    if name == "summarize_in_parts":
        small.append("chunking.max_tokens=300")
    config = load_config(CONFIGS_PATH / f"{name}.yaml", small)
    write_rows(tmp_path / "in", config.source.format, ROWS[name])
    assert run_job(config).exit_code == 0
    rows = check_output(tmp_path / "out", len(ROWS[name]))
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["num_chunks"] > 1 for row in rows} == {name == "summarize_in_parts"}
    id_column = config.source.id_column
    if id_column is not None:
        assert {row["document_id"] for row in rows} == {row[id_column] for row in ROWS[name]}
