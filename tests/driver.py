"""A driver in a process of its own, so that a test can kill it.

    python -m tests.driver JOB.json

JOB.json: {"config": …, "options": {…}, "crash": {"call": "replace", "path": "_SUCCESS.json",
"when": "before" | "after", "nth": 1} | null}. Ends with the run's exit code.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from granite_ray import GraniteRayError, RunOptions, run_job
from granite_ray.cli import leave
from granite_ray.config import parse_config
from granite_ray.io.storage import Storage, open_storage


class CrashingStorage:
    """A storage whose driver dies at one of its calls; other processes see no difference."""

    def __init__(self, inner: Storage, crash: dict[str, Any], driver_pid: int) -> None:
        self._inner = inner
        self._crash = crash
        self._driver_pid = driver_pid
        self._seen = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self._inner, name)
        return partial(self._call, name, found) if callable(found) else found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _call(self, name: str, method: Any, *arguments: Any, **options: Any) -> Any:
        path = arguments[0] if arguments else ""
        is_it = name == self._crash["call"] and self._crash["path"] in path
        self._seen += is_it
        dies = is_it and self._seen == self._crash.get("nth", 1) and os.getpid() == self._driver_pid
        if dies and self._crash["when"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*arguments, **options)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def open_crashing(path: str, crash: dict[str, Any], driver_pid: int) -> CrashingStorage:
    return CrashingStorage(open_storage(path), crash, driver_pid)


def main(job: dict[str, Any]) -> int:
    crash = job.get("crash")
    opener = partial(open_crashing, crash=crash, driver_pid=os.getpid()) if crash else open_storage
    try:
        options = RunOptions(**job.get("options", {}))
        return run_job(parse_config(job["config"]), options, open_storage=opener).exit_code
    except GraniteRayError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    leave(main(json.loads(Path(sys.argv[1]).read_text())))
