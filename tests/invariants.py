"""What must hold after every run and every fault: the promises, checked on the files themselves."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from granite_ray import read_results

UNSTABLE_COLUMNS: tuple[str, ...] = ()
"""Columns that may differ between two runs of one config: none."""


def rows_of(sink: Path | str) -> list[dict[str, Any]]:
    """All rows of an output in the order of the input."""
    rows = read_results(str(sink)).to_pylist()
    return sorted(rows, key=lambda row: (row["source_file"], row["source_row"]))


def report_of(sink: Path) -> dict[str, Any]:
    """The report of the last run."""
    return json.loads((sink / "_granite" / "report.json").read_text())


def check_output(sink: Path, num_documents: int) -> list[dict[str, Any]]:
    """Check a completed output on a local disk, and return its rows."""
    rows = rows_of(sink)
    places = Counter((row["source_file"], row["source_row"]) for row in rows)
    assert len(rows) == num_documents, f"{len(rows)} rows for {num_documents} documents"
    assert max(places.values(), default=1) == 1, "a document has two rows"
    assert all((row["status"] == "failed") == (row["error_type"] is not None) for row in rows)
    check_files(sink)
    check_ledger(report_of(sink), num_documents)
    return rows


def check_files(sink: Path) -> None:
    """Only the snapshot's files are there, and each footer agrees with its rows."""
    snapshot = json.loads((sink / "_SUCCESS.json").read_text())
    listed = {file["path"] for file in snapshot["files"]}
    found = {f"results/{path.name}" for path in (sink / "results").iterdir()}
    assert found == listed, "the folder and the snapshot differ"
    for file in snapshot["files"]:
        table = pq.read_table(sink / file["path"])
        record = json.loads(pq.read_metadata(sink / file["path"]).metadata[b"granite_ray"])
        statuses = Counter(table["status"].to_pylist())
        assert (statuses["ok"], statuses["failed"]) == (record["num_ok"], record["num_failed"])
        assert (file["num_ok"], file["num_failed"]) == (record["num_ok"], record["num_failed"])
    hidden = [path for path in sink.rglob(".*") if path.suffix == ".tmp"]
    assert not hidden, f"left behind: {hidden}"


def check_ledger(report: dict[str, Any], num_documents: int) -> None:
    """The counts of a report balance."""
    counts = report["documents"]
    assert counts["input"] == num_documents
    assert counts["input"] == counts["ok"] + counts["failed"]
    assert counts["input"] == counts["generated"] + counts["reused"] + counts["already_committed"]
