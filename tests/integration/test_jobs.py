"""Several jobs over one corpus: one pass, the same rows as alone, and no job that harms another."""

import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from granite_ray import EndedJob, run_job, run_jobs
from granite_ray.config import JobConfig
from granite_ray.errors import ConfigError
from granite_ray.io.lease import Lease
from granite_ray.io.storage import open_storage
from tests.corpus import job_values, make_config, make_text, write_corpus, write_file
from tests.faults import POISON, TracedEngines
from tests.invariants import check_output, report_of, rows_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(600)]

TASKS: dict[str, dict[str, Any]] = {
    "summaries": {"kind": "summarize", "max_tokens": 24},
    "classes": {"kind": "classify", "labels": ["good", "bad"]},
    "long": {"kind": "summarize", "length": "long", "max_tokens": 40},
}


def jobs(source: Path, out: Path, **sections: dict[str, Any]) -> list[JobConfig]:
    """Three jobs that ask of the same chunks."""
    chunking = {"chunking": {"max_tokens": 200}}
    return [
        make_config(source, out / name, task=task, **{**chunking, **sections})
        for name, task in TASKS.items()
    ]


def codes(ended: list[EndedJob]) -> list[int]:
    return [job.exit_code for job in ended]


def test_jobs_that_share_a_pass_give_the_rows_that_each_gives_alone(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", num_files=2)
    write_file(source / "bad.parquet", [900, 901], [None, "  "])
    together, alone = tmp_path / "together", tmp_path / "alone"
    assert codes(run_jobs(jobs(source, together))) == [3, 3, 3]
    for config in jobs(source, alone):
        run_job(config)
    for name in TASKS:
        assert check_output(together / name, 52) == rows_of(alone / name)
        engine = report_of(together / name)["engine"]
        assert engine["jobs"] == 3
        assert report_of(together / name)["model_calls"] == report_of(alone / name)["model_calls"]
        assert engine["prompt_tokens"] == sum(
            report_of(alone / other)["tokens"]["prompt"] for other in TASKS
        )


@pytest.mark.slow
def test_each_job_of_a_pass_resumes_from_its_own_rows(tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "in", num_files=2), tmp_path / "out"
    first, *_ = configs = jobs(source, out)
    run_job(first)
    write_file(source / "part-000.parquet", range(25), [f"new {make_text(n)}" for n in range(25)])
    seeds = range(100, 110)
    write_file(source / "part-009.parquet", seeds)
    run_jobs(configs[:2])
    trace = tmp_path / "trace"
    trace.mkdir()
    texts = [make_text(n) if n != 30 else "Document 30. changed" for n in range(25, 50)]
    write_file(source / "part-001.parquet", range(25, 50), texts)
    ended = run_jobs(configs, make_engine=TracedEngines(str(trace)))
    assert codes(ended) == [0, 0, 0]
    assert [job.report.documents.generated for job in ended] == [1, 1, 60]
    for name in TASKS:
        check_output(out / name, 60)
    asked = Counter(TracedEngines(str(trace)).asked())
    assert asked[30] == 2, "summaries and long summaries; classes are scored"
    assert asked[31] == 1, "long summaries alone"


def test_a_job_that_fails_for_its_own_reasons_leaves_the_others_alone(tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "in", num_files=2), tmp_path / "out"
    configs = jobs(source, out)
    changed = make_config(
        source, out / "classes", task={"kind": "classify", "labels": ["x", "y"]},
        chunking={"max_tokens": 200},
    )  # fmt: skip
    run_job(changed)
    holder = Lease(open_storage(str(out / "long")), "another", lease_s=1.0)
    holder.acquire()
    try:
        ended = run_jobs(configs)
    finally:
        holder.release()
    assert codes(ended) == [0, 5, 6]
    check_output(out / "summaries", 50)
    assert not (out / "long" / "results").exists()


@pytest.mark.slow
def test_a_job_of_which_too_many_fail_ends_and_the_others_go_on(tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "in", num_files=12, rows_per_file=20), tmp_path / "out"
    schema = {"type": "object", "properties": {"n": {"type": "string", "minLength": 200}}}
    failing = make_config(
        source, out / "failing", task={"kind": "extract", "schema": schema, "max_tokens": 4},
        chunking={"max_tokens": 200},
    )  # fmt: skip
    ended = run_jobs([*jobs(source, out)[:1], failing])
    assert codes(ended) == [0, 4]
    check_output(out / "summaries", 240)
    assert not (out / "failing" / "_SUCCESS.json").exists()


@pytest.mark.slow
def test_a_document_that_kills_its_worker_costs_each_job_its_own_row(tmp_path: Path) -> None:
    source, out, trace = tmp_path / "in", tmp_path / "out", tmp_path / "trace"
    trace.mkdir()
    texts = [make_text(n) if n != 7 else f"Document 7. {POISON}" for n in range(20)]
    write_file(source / "a.parquet", range(20), texts)
    summaries, _, long = jobs(source, out)
    ended = run_jobs([summaries, long], make_engine=TracedEngines(str(trace)))
    assert codes(ended) == [3, 3]
    for name in ("summaries", "long"):
        rows = check_output(out / name, 20)
        assert [row["error_type"] for row in rows] == [
            "worker_death" if n == 7 else None for n in range(20)
        ]


@pytest.mark.slow
def test_jobs_that_do_not_ask_the_same_follow_one_another(tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "in", num_files=1), tmp_path / "out"
    one, two, _ = jobs(source, out)
    other = make_config(source, out / "other", chunking={"max_tokens": 100})
    written = io.StringIO()
    console = Console(file=written, width=200)
    ended = run_jobs([one, other, two], console=console)
    assert codes(ended) == [0, 0, 0]
    assert "out/other follows: its pass is another, by chunking, the room" in written.getvalue()
    assert [job.report.engine["jobs"] for job in ended] == [2, 1, 2]


def test_two_jobs_with_one_output_are_refused(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", num_files=1)
    config = make_config(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="is that of two jobs"):
        run_jobs([config, config])


@pytest.mark.slow
def test_a_night_catches_up_on_dates_that_were_missed_and_shares_each_pass(
    tmp_path: Path, ray_address: str
) -> None:
    for day in ("2026-02-27", "2026-02-28", "2026-03-01"):
        write_corpus(tmp_path / "in" / day, num_files=1, rows_per_file=12)
    out = tmp_path / "out"
    words = []
    for name, task in TASKS.items():
        values = job_values(tmp_path / "in" / "{date}", out / name / "{date}", task=task)
        values["chunking"] = {"max_tokens": 200}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        words += ["--config", str(tmp_path / f"{name}.yaml")]

    def run_script(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "pipelines/nightly.py", *words, *more],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"RAY_ADDRESS": ray_address},
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )

    ended = run_script("--date", "2026-02-27")
    assert ended.returncode == 0, ended.stderr
    first = {name: (out / name / "2026-02-27" / "_SUCCESS.json").stat() for name in TASKS}
    ended = run_script("--date", "2026-03-01", "--catch-up", "2")
    assert ended.returncode == 0, ended.stderr
    for name in TASKS:
        for day in ("2026-02-28", "2026-03-01"):
            check_output(out / name / day, 12)
            assert report_of(out / name / day)["engine"]["jobs"] == 3
        again = (out / name / "2026-02-27" / "_SUCCESS.json").stat()
        assert again.st_mtime_ns == first[name].st_mtime_ns, "it was complete"
    assert run_script("--date", "2026-03-02").returncode == 2, "there is no such input"
