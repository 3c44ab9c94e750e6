"""Whole jobs from source to sink on a local Ray, with the fake engine unless said otherwise."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from granite_ray import GraniteRayError, RunOptions, read_results, redrive_job, run_job
from granite_ray.config import JobConfig
from granite_ray.io.commit import read_snapshot, write_snapshot
from granite_ray.io.sinks import count_rows, encode_shard, read_commit_record
from granite_ray.io.storage import open_storage
from tests.corpus import make_config, make_text, write_corpus, write_file
from tests.invariants import check_output, report_of, rows_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined_ray")]


def test_every_document_gets_one_row_and_the_ledger_balances(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    config = make_config(source, sink, source={"keep_columns": ["year"]})
    report = run_job(config)
    rows = check_output(sink, 100)
    assert report.exit_code == 0
    assert [row["document_id"] for row in rows] == [f"d{index}" for index in range(100)]
    assert [row["year"] for row in rows] == [2000 + index % 20 for index in range(100)]
    assert len({row["summary"] for row in rows}) > 90


def test_a_finished_job_run_again_makes_no_model_call_and_writes_nothing(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in", num_files=2), tmp_path / "out"
    write_file(source / "bad.parquet", [900, 901], [None, "  "])
    config = make_config(source, sink)
    first = run_job(config)
    before = {path: path.stat().st_mtime_ns for path in (sink / "results").iterdir()}
    snapshot = (sink / "_SUCCESS.json").read_bytes()
    again = run_job(config)
    assert (first.exit_code, again.exit_code) == (3, 3)
    assert first.failures == {"null_text": 1, "empty_text": 1}
    assert again.model_calls == 0
    assert again.documents.already_committed == 52
    assert {path: path.stat().st_mtime_ns for path in (sink / "results").iterdir()} == before
    assert (sink / "_SUCCESS.json").read_bytes() == snapshot


def test_of_a_changed_file_only_the_changed_rows_are_generated(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    config = make_config(source, sink)
    run_job(config)
    before = {row["document_id"]: row for row in rows_of(sink)}
    seeds = [*range(25, 50), 777]
    texts = [f"changed {seed}" if seed in (30, 40) else None for seed in seeds]
    write_file(
        source / "part-001.parquet",
        seeds,
        [text or make_text(seed) for text, seed in zip(texts, seeds, strict=True)],
    )
    report = run_job(config)
    after = {row["document_id"]: row for row in check_output(sink, 101)}
    assert report.documents.generated == 3
    assert report.documents.reused == 23
    assert report.documents.already_committed == 75
    changed = {name for name, row in after.items() if before.get(name) != row}
    assert changed == {"d30", "d40", "d777"}


def test_rows_of_a_vanished_file_go_with_it(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    config = make_config(source, sink)
    run_job(config)
    (source / "part-002.parquet").unlink()
    report = run_job(config)
    rows = check_output(sink, 75)
    assert report.model_calls == 0
    assert not any(row["source_file"] == "part-002.parquet" for row in rows)


@pytest.mark.slow
def test_more_than_half_vanished_is_refused_unless_allowed(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    config = make_config(source, sink)
    run_job(config)
    for index in (0, 1, 2):
        (source / f"part-{index:03d}.parquet").unlink()
    with pytest.raises(GraniteRayError, match="max_vanished_fraction") as refusal:
        run_job(config)
    assert refusal.value.exit_code == 5
    assert len(rows_of(sink)) == 100
    run_job(config, RunOptions(allow_vanished=True))
    check_output(sink, 25)


@pytest.mark.slow
def test_another_source_root_is_refused_unless_allowed(tmp_path: Path) -> None:
    sink = tmp_path / "out"
    run_job(make_config(write_corpus(tmp_path / "in", num_files=1), sink))
    other = make_config(write_corpus(tmp_path / "other", num_files=1), sink)
    with pytest.raises(GraniteRayError, match="root") as refusal:
        run_job(other)
    assert refusal.value.exit_code == 5
    job = json.loads((sink / "_granite" / "job.json").read_text())
    assert job["config"]["source"]["path"] == [str(tmp_path / "in")], "a redrive would read it"
    run_job(other, RunOptions(allow_vanished=True))
    check_output(sink, 25)


@pytest.mark.slow
def test_another_question_is_refused_and_restart_replaces_the_answers(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in", num_files=2), tmp_path / "out"
    run_job(make_config(source, sink))
    old = rows_of(sink)
    other = make_config(source, sink, task={"length": "long"})
    files = sorted(path.name for path in sink.rglob("*"))
    with pytest.raises(GraniteRayError, match=r"task\.length") as refusal:
        run_job(other)
    assert refusal.value.exit_code == 5
    assert sorted(path.name for path in sink.rglob("*")) == files
    run_job(other, RunOptions(restart=True))
    new = check_output(sink, 50)
    assert {row["summary"] for row in old}.isdisjoint(row["summary"] for row in new)
    again = run_job(other, RunOptions(restart=True))
    assert again.documents.generated == 50
    check_output(sink, 50)


@pytest.mark.slow
def test_limit_does_the_first_documents_and_leaves_no_snapshot(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in", num_files=2), tmp_path / "out"
    config = make_config(source, sink)
    report = run_job(config, RunOptions(limit=17))
    assert report.documents.input == 17
    assert not (sink / "_SUCCESS.json").exists()
    assert [row["document_id"] for row in rows_of(sink)] == [f"d{index}" for index in range(17)]
    whole = run_job(config)
    assert whole.documents.generated == 33
    check_output(sink, 50)


@pytest.mark.slow
def test_limit_on_a_finished_output_changes_nothing(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in"), tmp_path / "out"
    config = make_config(source, sink)
    run_job(config)
    before = rows_of(sink)
    report = run_job(config, RunOptions(limit=20))
    assert (report.exit_code, report.documents.input, report.model_calls) == (0, 20, 0)
    assert rows_of(sink) == before


def test_redrive_runs_the_failed_rows_again_and_copies_the_others(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in", num_files=2), tmp_path / "out"
    config = make_config(source, sink, job={"max_failed_fraction": 1.0})
    make_the_first_rows_fail(config, sink)
    before = {row["document_id"]: row for row in rows_of(sink)}
    failed = {name for name, row in before.items() if row["status"] == "failed"}
    report = redrive_job(str(sink))
    after = {row["document_id"]: row for row in check_output(sink, 50)}
    assert len(failed) == 3
    assert report.exit_code == 0
    assert report.documents.generated == 3
    assert {name for name in after if after[name] != before[name]} == failed
    assert any(path.name.endswith(".r1.parquet") for path in (sink / "results").iterdir())
    assert run_job(config).model_calls == 0


def make_the_first_rows_fail(config: JobConfig, sink: Path) -> None:
    """Run, then turn three committed rows into failed ones, as a passing fault leaves them."""
    run_job(config)
    path = min((sink / "results").iterdir())
    rows = pq.read_table(path)
    with path.open("rb") as file:
        record = read_commit_record(file, str(path))
    values = rows.to_pylist()
    for row in values[:3]:
        row |= {
            "status": "failed",
            "error_type": "worker_death",
            "error_message": "died",
            "summary": None,
        }
    schema = pq.read_schema(path)
    table = pa.Table.from_pylist(values, schema=schema)
    record = replace(record, **count_rows(table))
    path.write_bytes(encode_shard(table, record))
    storage = open_storage(str(sink))
    snapshot = read_snapshot(storage)
    assert snapshot is not None
    files = tuple(
        replace(file, num_ok=record.num_ok, num_failed=record.num_failed, failures=record.failures)
        if file.path == f"results/{path.name}"
        else file
        for file in snapshot.files
    )
    write_snapshot(storage, replace(snapshot, files=files), lambda: None)


@pytest.mark.slow
def test_the_same_rows_come_out_whatever_the_number_of_replicas(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in")
    run_job(make_config(source, tmp_path / "one"))
    run_job(make_config(source, tmp_path / "three", engine={"num_replicas": 3}))
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "three")
    names = [sorted(p.name for p in (tmp_path / n / "results").iterdir()) for n in ("one", "three")]
    assert names[0] == names[1]


def test_too_many_failed_documents_stop_the_job_early(tmp_path: Path) -> None:
    source, sink = tmp_path / "in", tmp_path / "out"
    for index in range(40):
        write_file(source / f"{index:03d}.parquet", range(50), [" "] * 50)
    with pytest.raises(GraniteRayError, match="max_failed_fraction") as stop:
        run_job(make_config(source, sink))
    assert stop.value.exit_code == 4
    assert not (sink / "_SUCCESS.json").exists()
    assert report_of(sink)["exit_code"] == 4
    assert report_of(sink)["documents"]["generated"] < 2000


def test_an_empty_shard_is_committed_and_costs_no_rows(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in", num_files=1), tmp_path / "out"
    config = make_config(source, sink, source={"filter": [["year", "==", 2003]]})
    report = run_job(config)
    assert report.exit_code == 0
    assert [row["document_id"] for row in check_output(sink, 2)] == ["d3", "d23"]
    assert report.shards.planned == 3


def test_reports_say_what_was_asked_of_them(tmp_path: Path) -> None:
    source, sink = write_corpus(tmp_path / "in", num_files=1), tmp_path / "out"
    run_job(make_config(source, sink))
    report = report_of(sink)
    wanted = {
        "exit_code",
        "run_id",
        "fingerprint",
        "model_calls",
        "shards",
        "documents",
        "failures",
    }
    assert wanted | {"tokens", "seconds", "versions"} <= set(report)
    assert report["tokens"]["prompt"] > 0
    progress = json.loads((sink / "_granite" / "progress.json").read_text())
    assert (progress["state"], progress["committed"]) == ("done", 25)
    assert read_results(str(sink)).num_rows == 25


def test_input_without_rows_is_done_at_once(tmp_path: Path) -> None:
    source, sink = tmp_path / "in", tmp_path / "out"
    write_file(source / "empty.parquet", [])
    report = run_job(make_config(source, sink))
    assert (report.exit_code, report.documents.input) == (0, 0)
    assert read_results(str(sink)).num_rows == 0
