"""What stands for a night of several jobs, and which dates are caught up on."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path

import pytest

from granite_ray import EndedJob, RunOptions, RunReport
from granite_ray.config import JobConfig
from granite_ray.errors import ConfigError, ConflictError, InfrastructureError, LeaseError
from granite_ray.io.commit import SNAPSHOT_PATH
from granite_ray.nightly import earlier_dates, is_complete, run_night, worst_code
from tests.corpus import make_config

DAY = date(2026, 3, 2)


def ended(code: int) -> EndedJob:
    return EndedJob(RunReport("r", "summarize", "c", "out", exit_code=code))


@pytest.mark.parametrize(
    ("codes", "worst"),
    [([0], 0), ([0, 3], 3), ([75, 3, 0], 75), ([75, 4], 4), ([4, 2, 5, 6], 2), ([2, 143, 1], 143)],
)
def test_the_worst_exit_code_stands_for_all(codes: Sequence[int], worst: int) -> None:
    assert worst_code([ended(code) for code in codes]) == worst


def test_a_job_that_was_refused_counts_by_its_error() -> None:
    report = ended(0).report
    errors = [LeaseError("x"), ConflictError("x"), InfrastructureError("x")]
    assert [EndedJob(report, error).exit_code for error in errors] == [6, 5, 75]


def test_earlier_dates_come_oldest_first_over_the_end_of_a_month() -> None:
    assert earlier_dates(DAY, 3) == [date(2026, 2, 27), date(2026, 2, 28), date(2026, 3, 1)]
    assert earlier_dates(DAY, 0) == []


def test_a_job_is_complete_once_it_has_a_snapshot(tmp_path: Path) -> None:
    config = make_config("in", tmp_path / "out")
    assert not is_complete(config)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SNAPSHOT_PATH).write_text(
        '{"run_id": "r", "fingerprint": "f", "generation": 0, "source_root": "/", "files": []}'
    )
    assert is_complete(config)


def test_catching_up_needs_an_output_for_each_date(tmp_path: Path) -> None:
    def load(_: date) -> list[JobConfig]:
        return [make_config("in", tmp_path / "out")]

    with pytest.raises(ConfigError, match=r"Put \{date\} into every sink.path"):
        run_night(load, DAY, RunOptions(), catch_up=1)
