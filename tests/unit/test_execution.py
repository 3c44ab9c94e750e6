"""How an error of a stage, of a replica or of Ray itself reaches the driver, on a real Ray."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from granite_ray import run_job
from granite_ray.attempts import close_journal, start_journal
from granite_ray.checkpoint import Checkpoint
from granite_ray.cluster import Cluster
from granite_ray.config import EngineConfig, JobSection, ModelConfig
from granite_ray.engine.factory import Engine
from granite_ray.errors import (
    ConfigError,
    CorruptInputError,
    GraniteRayError,
    InfrastructureError,
    InputChangedError,
    LeaseError,
    StorageError,
)
from granite_ray.execution import Watchdog
from granite_ray.io.storage import Storage, open_storage
from granite_ray.ray_errors import first_line, own_error
from tests.corpus import make_config, write_corpus
from tests.invariants import report_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined_ray")]

WORDS = "in/part-000.parquet: [1] what is wrong\nand a second line."


def raise_it(block: pa.Table, error: Exception) -> pa.Table:
    """A stage that breaks, for a reason of its own."""
    try:
        raise OSError(f"what lies below, {block.num_rows} rows")
    except OSError as below:
        raise error from below


def error_of_stage(error: Exception) -> BaseException:
    """What arrives at the driver of an error that a stage raises."""
    Cluster(JobSection(), EngineConfig()).start()
    rows = ray.data.from_items([{"row": 1}], override_num_blocks=1)
    stage: Any = raise_it
    broken = rows.map_batches(stage, fn_kwargs={"error": error}, batch_format="pyarrow")
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one it is, is the question
        list(broken.iter_batches())
    return own_error(caught.value)


@pytest.mark.parametrize(
    "kind", [ConfigError, CorruptInputError, LeaseError, InputChangedError, StorageError]
)
def test_what_a_stage_raises_arrives_with_its_class_words_and_exit_code(
    kind: type[GraniteRayError],
) -> None:
    arrived = error_of_stage(kind(WORDS))
    assert type(arrived) is kind
    assert str(arrived) == WORDS
    assert arrived.exit_code == kind("").exit_code


@pytest.mark.parametrize("kind", [ValueError, AssertionError, KeyError])
def test_a_bug_in_a_stage_stays_what_it_is(kind: type[Exception]) -> None:
    arrived = error_of_stage(kind("a bug"))
    assert type(arrived) is kind
    assert arrived.args == ("a bug",)


def test_an_error_that_crosses_two_processes_is_still_itself() -> None:
    @ray.remote(num_cpus=0)
    def inner() -> None:
        raise LeaseError(WORDS)

    @ray.remote(num_cpus=0)
    def outer() -> None:
        ray.get(inner.remote())

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(outer.remote())
    arrived = own_error(caught.value)
    assert (type(arrived), str(arrived)) == (LeaseError, WORDS)


def test_a_process_that_dies_is_infrastructure_named_in_one_plain_line() -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def die() -> None:
        os._exit(1)

    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(die.remote())
    arrived = own_error(caught.value)
    assert isinstance(arrived, InfrastructureError)
    assert arrived.exit_code == 75
    assert str(arrived).startswith("Ray could not go on: ")
    assert "\n" not in str(arrived)
    assert "\x1b" not in str(arrived)


def test_a_first_line_is_free_of_colors_and_never_empty() -> None:
    assert first_line(ValueError("\x1b[36mray::stage()\x1b[39m broke\n  at line 3")) == (
        "ray::stage() broke"
    )
    assert first_line(TimeoutError()) == "TimeoutError"


# silence ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def journal() -> Iterator[Any]:
    started = start_journal()
    yield started
    close_journal(started)


def report(journal: Any) -> None:
    """A replica reports that it has done nothing new."""
    counts = {"documents": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0}
    journal.report.remote("idle", "process", counts, 0)


def watch(journal: Any, timeout_s: float, for_s: float, *, with_reports: bool) -> None:
    watchdog, started = Watchdog(journal, timeout_s), time.monotonic()
    while time.monotonic() - started < for_s:
        if with_reports:
            report(journal)
        watchdog.look()
        time.sleep(0.02)


def end_of_watch(journal: Any, *, with_reports: bool) -> str:
    """What a watchdog says in the end, that waits for half a second."""
    with pytest.raises(InfrastructureError) as stop:
        watch(journal, 0.5, 60, with_reports=with_reports)
    words = str(stop.value)
    assert "job.scheduling_timeout_s" in words
    assert "The cluster has 6 CPU" in words
    assert "run again to resume" in words
    return words


def test_a_run_without_a_replica_says_that_none_was_placed(journal: Any) -> None:
    assert end_of_watch(journal, with_reports=False).startswith(
        "No replica has been placed for 0.5 s"
    )


def test_a_run_whose_replicas_fall_silent_says_so(journal: Any) -> None:
    report(journal)
    assert end_of_watch(journal, with_reports=False).startswith(
        "No replica has shown a sign of life for 0.5 s"
    )


def test_a_shard_that_stands_still_in_an_engine_ends_the_run_though_another_replica_reports(
    journal: Any,
) -> None:
    journal.begin.remote("s", "node")
    journal.enter.remote("s")
    started = time.monotonic()
    words = end_of_watch(journal, with_reports=True)
    assert time.monotonic() - started > 1.0
    assert words.startswith("No progress for 1 s (twice job.scheduling_timeout_s), with shards in")
    assert "(1): a replica hangs" in words


def test_replicas_that_report_may_wait_for_shards_and_for_uploads(journal: Any) -> None:
    watch(journal, 0.5, 1.5, with_reports=True)
    journal.begin.remote("s", "node")
    journal.enter.remote("s")
    journal.leave.remote("s")
    watch(journal, 0.5, 1.5, with_reports=True)


# whole jobs ──────────────────────────────────────────────────────────────────────────────────────


class LosesLease:
    """A storage that a worker finds in the hands of another run."""

    def __init__(self, inner: Storage, driver_pid: int) -> None:
        self._inner = inner
        self._driver_pid = driver_pid

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def read(self, path: str) -> tuple[bytes, str]:
        if path.endswith("lease.json") and os.getpid() != self._driver_pid:
            raise FileNotFoundError(path)
        return self._inner.read(path)


def open_losing(path: str, driver_pid: int) -> LosesLease:
    return LosesLease(open_storage(path), driver_pid)


def test_a_worker_that_finds_the_lease_gone_commits_nothing_and_ends_the_run_with_6(
    tmp_path: Path,
) -> None:
    config = make_config(write_corpus(tmp_path / "in", num_files=1), tmp_path / "out")
    with pytest.raises(LeaseError, match="taken this output over") as stop:
        run_job(config, open_storage=partial(open_losing, driver_pid=os.getpid()))
    assert stop.value.exit_code == 6
    assert not list((tmp_path / "out").glob("results/*"))
    assert report_of(tmp_path / "out")["exit_code"] == 6


def refuse_to_start(error: Exception) -> Any:
    return partial(_refuse, error=error)


def _refuse(
    _: Checkpoint,
    __: ModelConfig,
    ___: EngineConfig,
    ____: int | None = None,
    *,
    error: Exception,
) -> Engine:
    raise error


def test_a_config_that_no_replica_can_start_with_is_told_in_its_own_words(tmp_path: Path) -> None:
    config = make_config(write_corpus(tmp_path / "in", num_files=1), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^engine.device is cuda, but") as stop:
        run_job(config, make_engine=refuse_to_start(ConfigError("engine.device is cuda, but")))
    assert stop.value.exit_code == 2


@pytest.mark.slow
def test_a_replica_that_breaks_at_start_is_tried_again_and_its_cause_named(tmp_path: Path) -> None:
    config = make_config(write_corpus(tmp_path / "in", num_files=1), tmp_path / "out")
    with pytest.raises(InfrastructureError, match=r"could not start: RuntimeError.*bus error"):
        run_job(config, make_engine=refuse_to_start(RuntimeError("bus error")))
