"""What a job on a cluster is called, and how the way it ended is read. No cluster is needed."""

import re
from datetime import date
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from granite_ray.errors import InfrastructureError
from granite_ray.submit import exit_code_of, submission_name
from tests.corpus import make_config

DAY = date(2026, 11, 21)


def details(status: JobStatus, code: int | None, message: str = "") -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION,
        submission_id="granite-x",
        status=status,
        entrypoint="run",
        message=message,
        driver_exit_code=code,
    )


def name(sink: str, day: date | None = None, **sections: dict[str, object]) -> str:
    return submission_name(make_config("in", sink, **sections), day)


def test_the_output_and_the_date_name_a_job_and_nothing_else_does(tmp_path: Path) -> None:
    assert name("s3://b/out", DAY) == name("s3://b/out", DAY, task={"length": "long"})
    names = {
        name("s3://b/out"),
        name("s3://b/out", DAY),
        name("s3://b/out", date(2026, 11, 22)),
        name("s3://b/out2", DAY),
        name("s3://b-out", DAY),
        name(str(tmp_path), DAY),
    }
    assert len(names) == 6
    for each in names:
        assert re.fullmatch(r"granite-[a-z0-9-]+", each), each
        assert len(each) < 100


def test_a_name_stays_short_and_plain_whatever_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("s3://bücket/" + "long/" * 60, "s3://b/ä ö/'x'", "out/"):
        assert re.fullmatch(r"granite-[a-z0-9-]{1,60}", name(path)), name(path)
    monkeypatch.chdir("/tmp")
    assert name("out") == name("/tmp/out")


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 75])
def test_a_runs_own_exit_code_comes_through(code: int) -> None:
    assert exit_code_of(details(JobStatus.FAILED, code)) == code


def test_what_ray_counts_as_success_or_stopped() -> None:
    assert exit_code_of(details(JobStatus.SUCCEEDED, 0)) == 0
    assert exit_code_of(details(JobStatus.STOPPED, None)) == 143


@pytest.mark.parametrize(
    ("code", "message", "told"),
    [
        (-9, "Job failed with exit code -9\nlogs of the run", "was killed by signal 9"),
        (None, "The node of the job has died\nmore", "left no exit code: The node of the job has"),
    ],
)
def test_a_run_that_was_killed_or_lost_can_be_tried_again(
    code: int | None, message: str, told: str
) -> None:
    with pytest.raises(InfrastructureError, match=told) as raised:
        exit_code_of(details(JobStatus.FAILED, code, message))
    assert raised.value.exit_code == 75
    assert "\n" not in str(raised.value)
