"""The Airflow example: what it runs, and what it makes of each exit code.

Airflow itself is too heavy for a test; what the example takes from it stands here.
"""

import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.deployments import DEPLOY


class AirflowException(Exception):  # noqa: N818 - Airflow's name
    """A task that may be tried again."""


class AirflowFailException(Exception):  # noqa: N818 - Airflow's name
    """A task that may not."""


class Task:
    """A task as Airflow's decorator makes it: called, it is only noted."""

    def __init__(self, function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> None:
        self.function, self.calls = function, calls

    def override(self, **_: str) -> "Task":
        return self

    def __call__(self, *arguments: str) -> "Task":
        self.calls.append((self.function, *arguments))
        return self

    def __rshift__(self, _: "Task") -> None:
        """One after the other."""


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The function and the config of every task of the example."""
    calls: list[tuple[Any, ...]] = []
    exceptions, sdk = types.ModuleType("airflow.exceptions"), types.ModuleType("airflow.sdk")
    exceptions.AirflowException = AirflowException  # type: ignore[attr-defined]
    exceptions.AirflowFailException = AirflowFailException  # type: ignore[attr-defined]
    sdk.dag = lambda **_: lambda function: function  # type: ignore[attr-defined]
    sdk.task = lambda function: Task(function, calls)  # type: ignore[attr-defined]
    for module in (types.ModuleType("airflow"), exceptions, sdk):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    runpy.run_path(str(DEPLOY / "airflow" / "granite_night.py"))
    return calls


def put_command(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `granite-ray` that notes what it was asked, and ends with a code."""
    script, asked = folder / "granite-ray", folder / "asked"
    script.write_text(f'#!/bin/sh\necho "$@" > {asked}\nexit {code}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return asked


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        (0, None),
        (3, None),
        (75, AirflowException),
        *((code, AirflowFailException) for code in (1, 2, 4, 5, 6, 143)),
    ],
)
def test_exit_codes_become_what_airflow_does_next(
    tasks: list[tuple[Any, ...]],
    code: int,
    raised: type[Exception] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [config for _, config in tasks] == ["summaries.yaml", "classes.yaml"]
    asked = put_command(tmp_path, code, monkeypatch)
    submit, config = tasks[0]
    if raised is None:
        assert submit(config, ds="2026-11-21") == code
    else:
        with pytest.raises(raised, match=config):
            submit(config, ds="2026-11-21")
    words = asked.read_text().split()
    assert words[0] == "submit"
    assert words[1].endswith("/summaries.yaml")
    assert words[2:] == ["--follow", "--logical-date", "2026-11-21"]
