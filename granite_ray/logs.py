"""Log lines as JSON objects, for those who collect them: what happened, to which job and shard.

No text of a document is ever in them: of an exception that is not ours only its class and place.
"""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

from granite_ray.config import JobSection
from granite_ray.errors import GraniteRayError

ROOT = "granite_ray"
FIELDS = ("job", "shard", "attempt", "exit_code", "counts", "reason")
"""What a log call may add by `extra`, and a line then has."""


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info and record.exc_info[1] is not None:
            line |= _described(record.exc_info[1])
        return json.dumps(line)


def set_up_logging(job: JobSection, stream: TextIO | None = None) -> None:
    """Let the loggers of this package write as the config says; safe to call again."""
    if job.log_format != "json":
        return
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        if isinstance(handler.formatter, JsonLines):
            logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def writes_json() -> bool:
    """Tell whether the loggers of this package write JSON lines in this process."""
    handlers = logging.getLogger(ROOT).handlers
    return any(isinstance(handler.formatter, JsonLines) for handler in handlers)


def _described(error: BaseException) -> dict[str, Any]:
    """Say what an exception was and where, and its words only where they are our own."""
    frames = traceback.extract_tb(error.__traceback__)
    described: dict[str, Any] = {
        "error": type(error).__name__,
        "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
    if isinstance(error, GraniteRayError):
        described["reason"] = str(error)
    return described
