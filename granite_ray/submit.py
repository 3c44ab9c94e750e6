"""The same job on a cluster, through the Ray Jobs API: submit, follow, stop.

The cluster gets the resolved config and a command, nothing else: it has the package already.
Nothing of the job runs here.
"""

import asyncio
import hashlib
import logging
import math
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import ray
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from granite_ray.config import JobConfig, write_config
from granite_ray.errors import ConfigError, InfrastructureError
from granite_ray.job import RunOptions, absolute_paths

CONFIG_NAME = "job.yaml"
STOPPED = 143
"""How a run that was told to stop ends; Ray keeps no exit code of it."""
POLL_S = 1.0
TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray that tell a user of every upload and socket."""
SILENCE_S = 60.0
"""How long the cluster may not answer those who follow: a head that restarts takes less."""
STOP_SPARE_S = 30
"""What a driver gets beyond `job.grace_s` to let go of its output, before Ray kills it."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A job on a cluster; `is_joined` says that it ran there already."""

    submission_id: str
    is_joined: bool


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the Jobs API at `address`, or where Ray's own variables say.

    Raises:
        ConfigError: If the cluster refuses us.
        InfrastructureError: If it cannot be reached.
    """
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(
            f"The cluster at {address or 'the default address'} refuses the token. Set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that holds the cluster's."
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InfrastructureError(
            f"No Ray answers at --address {address or '(default)'}: {error} Give the address of "
            "its dashboard, such as http://head:8265."
        ) from error


def submission_name(config: JobConfig, logical_date: date | None) -> str:
    """Name a job by its output and the day it is for: the same job has the same name anywhere."""
    path = absolute_paths(config).sink.path
    stem = re.sub(r"[^a-z0-9]+", "-", path.lower().split("://")[-1]).strip("-")[-40:].strip("-")
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    day = f"-{logical_date.isoformat()}" if logical_date else ""
    return f"granite-{stem}-{digest}{day}"


def submit_job(
    client: JobSubmissionClient,
    config: JobConfig,
    options: RunOptions,
    logical_date: date | None = None,
) -> Submission:
    """Start a job on the cluster, or join it where it is on.

    One that has ended is started again under the same name and the next number: it resumes.

    Raises:
        InfrastructureError: If the cluster does not take it.
    """
    name = submission_name(config, logical_date)
    running, next_id = _attempts(client, name)
    if running is not None:
        return Submission(running, is_joined=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_NAME).write_text(write_config(absolute_paths(config)))
        try:
            client.submit_job(
                submission_id=next_id,
                entrypoint=f"exec python -m granite_ray.cli run {shlex.join(_words(options))}",
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_stop_wait_s(config))},
                },
                metadata={"sink": config.sink.path, "logical_date": str(logical_date or "")},
            )
        except (RuntimeError, OSError) as error:
            running, _ = _attempts(client, name)
            if running == next_id:  # somebody else was quicker
                return Submission(next_id, is_joined=True)
            raise InfrastructureError(f"The cluster did not take the job: {error}") from error
    return Submission(next_id, is_joined=False)


def follow_job(client: JobSubmissionClient, submission_id: str, show: Callable[[str], None]) -> int:
    """Hand on what a job writes until it ends; return the run's own exit code.

    Raises:
        InfrastructureError: If the cluster does not answer, or lost the job.
    """
    tail = _LogTail(client, submission_id, show)
    answered_at = time.monotonic()
    while True:
        try:
            asyncio.run(tail.follow())
            details = client.get_job_info(submission_id)
            if details.status.is_terminal():
                return exit_code_of(details)
            answered_at = time.monotonic()
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if time.monotonic() - answered_at > SILENCE_S:
                raise InfrastructureError(
                    f"The cluster has not answered for {SILENCE_S:g} s: {error}. Job "
                    f"{submission_id} may go on; the same command joins or resumes it."
                ) from error
        time.sleep(POLL_S)


def stop_job(
    client: JobSubmissionClient, config: JobConfig, logical_date: date | None = None
) -> str | None:
    """Tell a job to stop and wait until it has; return its id, or None where it is not on.

    The job gets `job.grace_s` for the shards in flight.

    Raises:
        InfrastructureError: If it does not stop in time.
    """
    submission_id, _ = _attempts(client, submission_name(config, logical_date))
    if submission_id is None:
        return None
    client.stop_job(submission_id)
    deadline = time.monotonic() + _stop_wait_s(config) + SILENCE_S
    while not client.get_job_status(submission_id).is_terminal():
        if time.monotonic() > deadline:
            raise InfrastructureError(
                f"Job {submission_id} was told to stop and is still on. Look at its logs with "
                f"`ray job logs {submission_id}`."
            )
        time.sleep(POLL_S)
    return submission_id


def exit_code_of(details: JobDetails) -> int:
    """Return how the run itself ended, which Ray's status does not show.

    Raises:
        InfrastructureError: If it was killed, or lost with its node: it can be tried again.
    """
    code = details.driver_exit_code
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    if code is None or code < 0:
        _raise_lost(details)
    return int(code)


def _raise_lost(details: JobDetails) -> NoReturn:
    code, reason = details.driver_exit_code, (details.message or "").partition("\n")[0]
    how = f"was killed by signal {-code}" if code else f"left no exit code: {reason}"
    raise InfrastructureError(
        f"Job {details.submission_id} {how}. What is committed stays; submit it again to resume."
    )


def _attempts(client: JobSubmissionClient, name: str) -> tuple[str | None, str]:
    """Return the submission of this name that is on, if any, and the id that the next one gets."""
    pattern = re.compile(rf"{re.escape(name)}(?:\.(\d+))?")
    found: dict[int, Any] = {}
    for details in client.list_jobs():
        match = pattern.fullmatch(details.submission_id or "")
        if match:
            found[int(match[1] or 1)] = details
    for details in found.values():
        if not details.status.is_terminal():
            return details.submission_id, details.submission_id
    number = max(found, default=0) + 1
    return None, name if number == 1 else f"{name}.{number}"


def _words(options: RunOptions) -> Sequence[str]:
    """Spell the options of a run as the command line does."""
    words = [CONFIG_NAME]
    words += ["--limit", str(options.limit)] if options.limit is not None else []
    for name in ("restart", "allow_failed", "allow_vanished"):
        words += [f"--{name.replace('_', '-')}"] if getattr(options, name) else []
    return words


def _stop_wait_s(config: JobConfig) -> int:
    return math.ceil(config.job.grace_s) + STOP_SPARE_S


class _LogTail:
    """Reads a job's log to its end; taken up again, it goes on where it was."""

    def __init__(
        self, client: JobSubmissionClient, submission_id: str, show: Callable[[str], None]
    ) -> None:
        self._client = client
        self._submission_id = submission_id
        self._show = show
        self._num_shown = 0

    async def follow(self) -> None:
        position = 0
        async for text in self._client.tail_job_logs(self._submission_id):
            fresh = text[max(0, self._num_shown - position) :]
            position += len(text)
            if fresh:
                self._show(fresh)
                self._num_shown = position
