"""Who may make an output its own, and what is left of a run however it ends."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from granite_ray.config import JobConfig
from granite_ray.errors import ConfigError, ConflictError, LeaseError, StorageError
from granite_ray.io.commit import JOB_PATH, SNAPSHOT_PATH, SnapshotFile, read_snapshot
from granite_ray.io.lease import LEASE_PATH
from granite_ray.output import HeldOutput, hold_output, read_job
from granite_ray.report import REPORT_PATH, RunReport
from tests.corpus import make_config
from tests.faulty_storage import FaultyStorage, MemoryStorage

ONE, OTHER = "ab" * 32, "cd" * 32
CONFIG = make_config("in", "out")


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@contextmanager
def hold(storage: Any, run_id: str = "run") -> Iterator[HeldOutput]:
    report = RunReport(run_id, "t", "c", storage.root, versions={})
    with hold_output(storage, report, 3600, lambda _: None) as output:
        yield output
        report.exit_code = 0


def claim(storage: Any, fingerprint: str, config: JobConfig = CONFIG, **options: Any) -> None:
    with hold(storage) as output:
        output.look(config, fingerprint, **options)
        output.claim(config)


def test_a_new_output_is_claimed_with_the_resolved_config(storage: MemoryStorage) -> None:
    claim(storage, ONE)
    assert read_job(storage) == {"fingerprint": ONE, "generation": 0, "config": CONFIG.dump()}


def test_another_fingerprint_is_refused_naming_what_changed_and_nothing_is_written(
    storage: MemoryStorage,
) -> None:
    claim(storage, ONE)
    before = dict(storage.files)
    other = make_config("in", "out", task={"length": "long"}, chunking={"max_tokens": 64})
    with pytest.raises(ConflictError, match=r"task\.length, chunking\.max_tokens changed"):
        claim(storage, OTHER, other)
    assert storage.files == before


def test_what_cannot_change_answers_may_differ_and_is_stored(storage: MemoryStorage) -> None:
    claim(storage, ONE)
    other = make_config("in", "out", engine={"num_replicas": 3})
    claim(storage, ONE, other)
    stored = read_job(storage)
    assert stored is not None
    assert stored["config"]["engine"]["num_replicas"] == 3


def test_each_restart_is_a_generation_of_its_own(storage: MemoryStorage) -> None:
    tags = []
    for fingerprint, restart in ((ONE, False), (ONE, True), (OTHER, True), (OTHER, False)):
        with hold(storage) as output:
            output.look(CONFIG, fingerprint, restart=restart)
            output.claim(CONFIG)
            tags.append((output.generation.number, output.generation.tag))
    assert tags == [(0, "abababab"), (1, "abababac"), (2, "cdcdcdcf"), (2, "cdcdcdcf")]


def test_a_refused_run_leaves_the_last_runs_report(storage: MemoryStorage) -> None:
    claim(storage, ONE)
    report = storage.files[REPORT_PATH]
    with pytest.raises(ConflictError):
        claim(storage, OTHER)
    assert storage.files[REPORT_PATH] == report


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (StorageError("The disk is full."), 75, "The disk is full."),
        (LeaseError("taken over"), 6, "taken over"),
        (ValueError("a document's text"), 1, "ValueError"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
    ],
)
def test_however_a_run_ends_its_report_says_so_and_the_lease_is_gone(
    storage: MemoryStorage, error: BaseException, code: int, words: str
) -> None:
    def run() -> None:
        with hold(storage) as output:
            output.look(CONFIG, ONE)
            output.claim(CONFIG)
            raise error

    with pytest.raises(type(error)):
        run()
    report = json.loads(storage.files[REPORT_PATH][0])
    assert (report["exit_code"], report["error"]) == (code, words)
    assert LEASE_PATH not in storage.files


def test_a_run_that_lost_its_lease_touches_neither_report_nor_lease(storage: MemoryStorage) -> None:
    def run() -> None:
        with hold(storage) as output:
            output.look(CONFIG, ONE)
            output.claim(CONFIG)
            storage.files[LEASE_PATH] = (json.dumps({"run_id": "successor"}).encode(), "x")
            output.lease.check()

    with pytest.raises(LeaseError):
        run()
    assert json.loads(storage.files[LEASE_PATH][0])["run_id"] == "successor"
    assert REPORT_PATH not in storage.files


def test_a_report_that_cannot_be_written_ends_the_heartbeat_and_lets_go(
    storage: MemoryStorage,
) -> None:
    class NoReports(MemoryStorage):
        def replace(self, path: str, data: bytes, expected_version: str | None) -> str:
            if path == REPORT_PATH:
                raise StorageError("The disk is full.")
            return super().replace(path, data, expected_version)

    full = NoReports()
    with pytest.raises(StorageError, match="full"):
        claim(full, ONE)
    assert LEASE_PATH not in full.files
    claim(storage, ONE)


def test_the_same_results_again_do_not_replace_the_snapshot(storage: MemoryStorage) -> None:
    files = [SnapshotFile("results/b", 1, 0, 5, 5), SnapshotFile("results/a", 2, 0, 5, 5)]
    versions = []
    for given in (files, list(reversed(files)), files[:1]):
        with hold(storage) as output:
            output.look(CONFIG, ONE)
            output.claim(CONFIG)
            output.complete(given, "in")
        versions.append(storage.files[SNAPSHOT_PATH][1])
    assert versions[0] == versions[1] != versions[2]
    snapshot = read_snapshot(storage)
    assert snapshot is not None
    assert snapshot.paths == {"results/b"}


def test_a_claim_that_is_interrupted_anywhere_can_be_made_again(storage: MemoryStorage) -> None:
    for at in range(30):
        fresh = MemoryStorage()
        try:
            claim(FaultyStorage(fresh, at, "answer_lost"), ONE)
        except (StorageError, ConfigError):
            fresh.delete(LEASE_PATH)  # its process is gone
        claim(fresh, ONE)
        stored = read_job(fresh)
        assert stored is not None
        assert (stored["fingerprint"], stored["generation"]) == (ONE, 0)
        assert JOB_PATH in fresh.files
    claim(storage, ONE)
