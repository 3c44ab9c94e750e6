"""`python -m granite_ray.quickstart`: all three jobs, each on a few of its documents."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from granite_ray import read_results
from granite_ray.job import EMBEDDED_SOURCES
from granite_ray.quickstart.__main__ import main

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("joined_ray")]

CONFIGS_PATH = Path(__file__).parents[2] / "configs"


def write_config(name: str, folder: Path, few: list[Any]) -> str:
    """Copy one of the quickstart's configs, for a few documents and another output."""
    values = yaml.safe_load((CONFIGS_PATH / f"{name}.yaml").read_text())
    values["source"]["filter"] = [few]
    values["sink"]["path"] = str(folder / name)
    if "schema" in values["task"]:
        values["task"]["schema"] = str(CONFIGS_PATH / values["task"]["schema"])
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def shortest(source: str, text_column: str, id_column: str) -> list[str]:
    rows = pq.read_table(EMBEDDED_SOURCES[source]).to_pylist()
    rows.sort(key=lambda row: len(row[text_column]))
    return [row[id_column] for row in rows[:5]]


def test_all_jobs_run_and_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packages = ["package", "in", shortest("quickstart", "text", "package")]
    entries = ["entry", "in", shortest("quickstart-changelogs", "changelog", "entry")]
    few = {
        "quickstart": packages,
        "quickstart_synopses": packages,
        "quickstart_changelogs": entries,
    }
    assert main([write_config(name, tmp_path, few[name]) for name in few]) == 0
    told = capsys.readouterr().err
    for name, figure in zip(few, ("accuracy", "ROUGE-L", "micro F1"), strict=True):
        rows = read_results(str(tmp_path / name)).to_pylist()
        assert {row["document_id"] for row in rows} == set(few[name][2])
        assert figure in told
        page = tmp_path / name / "_granite" / "evaluation.html"
        assert f"All figures, with plots: {page}" in told
        assert page.read_text().startswith("<!doctype")
    row = read_results(str(tmp_path / "quickstart")).to_pylist()[0]
    assert row["section"] in told
    assert f"{row['scores'][0]['label']} {row['scores'][0]['probability']:.2f}" in told
