"""What a run tells: the facts as JSON, and the closing words for a person."""

import io
import json
import re

import pytest
from rich.console import Console

from granite_ray.io.commit import SnapshotFile
from granite_ray.report import (
    RunReport,
    closing_words,
    read_report,
    replace_always,
    write_report,
)
from tests.faulty_storage import MemoryStorage

KEYS = {
    "exit_code",
    "run_id",
    "fingerprint",
    "model_calls",
    "shards",
    "documents",
    "failures",
    "tokens",
    "seconds",
    "versions",
}


def make_report() -> RunReport:
    """Three files: 1,240 ok, 7 failed, one input file that cannot be read."""
    report = RunReport("run1", "summarize", "granite-tiny", "/data/o'ut put", exit_code=3)
    report.add_file(SnapshotFile("a", 1200, 5, 10_000, 300, {"too_long": 4, "null_text": 1}))
    report.add_file(SnapshotFile("b", 40, 2, 500, 20, {"null_text": 2}, {"x.parquet": "[red]cut"}))
    report.shards.planned, report.shards.committed, report.shards.reused = 3, 2, 1
    report.documents.input, report.documents.generated = 1247, 1000
    report.documents.reused, report.documents.already_committed = 7, 240
    report.model_calls = 1100
    report.seconds["generate"] = 50.0
    return report


def words_of(report: RunReport, *, is_terminal: bool = False, width: int = 60) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=width)
    console.print(closing_words(report), highlight=False, soft_wrap=True)
    return file.getvalue()


def test_the_json_has_the_documented_keys_and_counts() -> None:
    values = json.loads(make_report().to_json())
    assert set(values) >= KEYS
    assert values["documents"] == {
        "input": 1247,
        "ok": 1240,
        "failed": 7,
        "generated": 1000,
        "reused": 7,
        "already_committed": 240,
    }
    assert values["shards"] == {"planned": 3, "committed": 2, "reused": 1, "superseded": 0}
    assert values["failures"] == {"null_text": 3, "too_long": 4}
    assert values["tokens"] == {"prompt": 10_500, "completion": 320}
    assert values["bad_files"] == {"x.parquet": "[red]cut"}
    assert values["seconds"]["total"] >= 0
    assert set(values["versions"]) >= {"granite-ray", "ray", "torch"}
    assert "started" not in values


def test_a_ledger_balances_only_where_both_sums_are_the_input() -> None:
    documents = make_report().documents
    assert documents.is_balanced
    for name in ("input", "ok", "failed", "generated", "reused", "already_committed"):
        broken = make_report().documents
        setattr(broken, name, getattr(broken, name) + 1)
        assert not broken.is_balanced, name


def test_a_report_replaces_the_last_runs_and_is_read_back() -> None:
    storage = MemoryStorage()
    assert read_report(storage) is None
    write_report(storage, make_report())
    second = make_report()
    second.run_id = "run2"
    write_report(storage, second)
    found = read_report(storage)
    assert found is not None
    assert found["run_id"] == "run2"


def test_a_file_is_replaced_whatever_it_was() -> None:
    storage = MemoryStorage()
    for data in (b"1", b"2", b"3"):
        replace_always(storage, "a", data)
        assert storage.read("a")[0] == data


def test_time_that_something_took_is_noted_also_where_it_breaks() -> None:
    report = make_report()
    with pytest.raises(ValueError, match="broken"), report.timed("plan"):
        raise ValueError("broken")
    assert report.seconds["plan"] >= 0


def test_closing_words_have_the_numbers_and_how_to_read_the_results() -> None:
    words = words_of(make_report())
    for fact in (
        "1,247 in = 1,240 ok + 7 failed",
        "1,000 answered now (20.0 a second), 7 reused, 240 there already",
        "4 too_long",
        "3 null_text",
        "x.parquet: [red]cut",
        "3, 2 committed now",
        "10,500 in prompts, 320 written",
        "granite-tiny, 1,100 calls",
        "SELECT * FROM '/data/o''ut put/results/*.parquet'",
        "granite-ray redrive '/data/o'\"'\"'ut put'",
    ):
        assert fact in words, fact
    assert words.index("too_long") < words.index("null_text"), "the most frequent first"
    assert "\x1b" not in words
    assert max(map(len, words.splitlines())) > 60, "a query broken in two cannot be copied"


def test_closing_words_in_a_terminal_differ_in_color_only() -> None:
    report = make_report()
    plain, colored = words_of(report), words_of(report, is_terminal=True)
    assert "\x1b[" in colored
    stripped = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    without_time = [line for line in plain.splitlines() if "Time" not in line]
    assert [line for line in stripped.splitlines() if "Time" not in line] == without_time


def test_closing_words_leave_out_what_did_not_happen() -> None:
    report = RunReport("run1", "summarize", "granite-tiny", "/out", exit_code=0)
    words = words_of(report)
    assert "Done: every document has its row." in words
    for nothing in ("Failed", "Skipped", "Workers", "Storage", "redrive", "a second"):
        assert nothing not in words, nothing


def test_many_unreadable_files_are_counted_not_listed() -> None:
    report = make_report()
    report.bad_files = {f"{number:02d}.parquet": "cut" for number in range(12)}
    words = words_of(report)
    assert "04.parquet: cut" in words
    assert "05.parquet" not in words
    assert "and 7 more files" in words


def test_a_run_that_was_stopped_says_why() -> None:
    report = make_report()
    report.exit_code, report.error = 75, "The disk is full."
    assert words_of(report).startswith("The disk is full.")
