"""Log lines as JSON: one object a line, and no words that are not ours."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from granite_ray.config import JobSection
from granite_ray.errors import InfrastructureError
from granite_ray.logs import ROOT, set_up_logging, writes_json

CANARY = "canary-of-a-document"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the package's loggers write; they are as before in the end."""
    logger = logging.getLogger(ROOT)
    before = logger.handlers[:], logger.level, logger.propagate
    stream = io.StringIO()
    yield stream
    logger.handlers[:], logger.level, logger.propagate = before[0], before[1], before[2]


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_an_object_that_says_what_happened_to_which_shard(written: io.StringIO) -> None:
    set_up_logging(JobSection(log_format="json"), written)
    extra = {"job": "r1", "shard": "part-0", "attempt": 2, "secret": "not listed"}
    logging.getLogger("granite_ray.workers").info("shard begins rows=%d", 7, extra=extra)
    [line] = lines(written)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "granite_ray.workers",
        "message": "shard begins rows=7",
        "job": "r1",
        "shard": "part-0",
        "attempt": 2,
    }


def test_lines_stay_whole_whatever_is_in_them(written: io.StringIO) -> None:
    set_up_logging(JobSection(log_format="json"), written)
    logging.getLogger("granite_ray").info("a\nb\u2028 \x00 ü")
    assert lines(written)[0]["message"] == "a\nb\u2028 \x00 ü"


def test_of_a_foreign_exception_only_class_and_place_are_told(written: io.StringIO) -> None:
    set_up_logging(JobSection(log_format="json"), written)
    for error in (ValueError(CANARY), InfrastructureError("no room is left")):
        try:
            raise error
        except (ValueError, InfrastructureError):
            logging.getLogger("granite_ray").exception("it broke")
    foreign, own = lines(written)
    assert CANARY not in json.dumps(foreign)
    assert foreign["error"] == "ValueError"
    assert "test_logs.py" in foreign["stack"][-1]
    assert own["reason"] == "no room is left"


def test_text_stays_as_it_is_and_setting_up_twice_writes_once(written: io.StringIO) -> None:
    set_up_logging(JobSection(), written)
    assert not writes_json()
    for _ in range(2):
        set_up_logging(JobSection(log_format="json"), written)
    logging.getLogger("granite_ray").info("once")
    assert writes_json()
    assert len(lines(written)) == 1
