"""`granite-ray eval` on what jobs really wrote, with the fake engine."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from granite_ray import evaluate, load_config, read_results
from granite_ray.cli import main
from tests.corpus import job_values, make_text

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined_ray")]

RECORD = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "year": {"type": "integer"}},
    "required": ["title", "year"],
}


def write_job(folder: Path, task: dict[str, Any], truth: pa.Array | None, keep: list[str]) -> str:
    """Write a corpus of 30 documents, one of them without text, and a config."""
    (folder / "in").mkdir()
    texts = [make_text(seed) if seed != 13 else None for seed in range(30)]
    columns = {"id": [f"d{seed}" for seed in range(30)], "text": texts}
    if truth is not None:
        columns["truth"] = truth
    pq.write_table(pa.table(columns), folder / "in" / "part.parquet")
    values = job_values(folder / "in", folder / "out", source={"keep_columns": keep})
    values["task"] = task
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "job.yaml")


def evaluated(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def test_a_job_is_run_and_then_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["red", "green", "blue"]
    truth = pa.array([labels[seed % 3] for seed in range(30)])
    config = write_job(tmp_path, {"kind": "classify", "labels": labels}, truth, ["truth"])
    assert main(["eval", config, "--truth", "truth"]) == 2
    assert "holds no job. Run the config first" in capsys.readouterr().err
    assert main(["run", config, "--limit", "20"]) == 3
    assert main(["eval", config, "--truth", "truth", "--out", str(tmp_path / "first")]) == 0
    assert main(["run", config]) == 3
    capsys.readouterr()
    assert main(["eval", config, "--truth", "truth"]) == 0
    told = capsys.readouterr()
    partial, whole = evaluated(tmp_path / "first"), evaluated(tmp_path / "out" / "_granite")
    assert (partial["is_partial"], partial["rows"]["total"]) == (True, 20)
    assert (whole["is_partial"], whole["rows"]["total"], whole["rows"]["failed"]) == (False, 30, 1)
    rows = read_results(str(tmp_path / "out")).to_pylist()
    right = sum(row["label"] == row["truth"] for row in rows)
    assert whole["metrics"]["accuracy"]["value"] == pytest.approx(right / 30)
    assert f"accuracy               {right / 30:.3f}" in told.out
    assert f"written {tmp_path}/out/_granite/evaluation.html" in told.out
    assert told.err == ""
    assert (tmp_path / "out" / "_granite" / "evaluation.html").read_text().startswith("<!doctype")
    found = evaluate(load_config(config), "truth")
    assert found.metrics["accuracy"].value == pytest.approx(right / 30)


@pytest.mark.slow
def test_records_and_their_evidence_are_measured(tmp_path: Path) -> None:
    """The truth is what a first run extracted, but for one year."""
    (tmp_path / "first").mkdir()
    task = {"kind": "extract", "schema": RECORD}
    assert main(["run", write_job(tmp_path / "first", task, None, [])]) == 3
    answers = read_results(str(tmp_path / "first" / "out")).sort_by("source_row")["fields"]
    records = [record or {"title": "none", "year": 1} for record in answers.to_pylist()]
    records[5]["year"] = -(10**9)
    (tmp_path / "second").mkdir()
    config = write_job(tmp_path / "second", task, pa.array(records), ["truth"])
    assert main(["run", config]) == 3
    assert main(["eval", config, "--truth", "truth"]) == 0
    found = evaluated(tmp_path / "second" / "out" / "_granite")
    assert found["metrics"]["exact_records"]["value"] == pytest.approx(28 / 30)
    [title] = [row for row in found["tables"]["fields"] if row["field"] == "/title"]
    assert (title["true"], title["answered"], title["precision"]) == (30, 29, 1.0)
    assert 0 <= found["metrics"]["evidence_exact"]["value"] <= 1


@pytest.mark.slow
def test_summaries_are_measured_against_references(tmp_path: Path) -> None:
    truth = pa.array([make_text(seed) for seed in range(30)])
    config = write_job(tmp_path, {"kind": "summarize", "max_tokens": 24}, truth, ["truth"])
    assert main(["run", config]) == 3
    assert main(["eval", config, "--truth", "truth"]) == 0
    metrics = evaluated(tmp_path / "out" / "_granite")["metrics"]
    assert set(metrics) == {"rouge_1", "rouge_2", "rouge_l", "chrf"}
    for figures in metrics.values():
        assert 0 <= figures["low"] <= figures["value"] <= figures["high"] <= 1
