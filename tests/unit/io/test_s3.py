"""What a bucket does beyond the common interface: a server that errs, stalls and forgets."""

import io
import multiprocessing
import time
from typing import Any

import pytest

from granite_ray.errors import InputChangedError, StorageDeniedError, StorageError
from granite_ray.io.s3 import RetryPolicy, S3Storage


@pytest.mark.parametrize("fault", ["slow_down", "conflict", "stall", "cut"])
def test_a_passing_fault_is_retried_and_counted(
    s3_server: Any, s3_storage: S3Storage, fault: str
) -> None:
    s3_storage.put_if_absent("a", b"content")
    s3_server.faults.extend([fault, fault])
    assert s3_storage.read("a")[0] == b"content"
    assert s3_storage.num_retries == 2


def test_a_put_is_retried_until_it_is_taken(s3_server: Any, s3_storage: S3Storage) -> None:
    s3_server.faults.extend(["slow_down", "conflict"])
    s3_storage.put_if_absent("a", b"content")
    assert s3_storage.num_retries == 2
    assert s3_storage.read("a")[0] == b"content"


def test_a_fault_that_stays_is_given_up_by_name(s3_server: Any, s3_storage: S3Storage) -> None:
    s3_server.always = "slow_down"
    before = s3_server.num_requests
    with pytest.raises(StorageError, match=rf"{s3_storage.root}/a: no success in 4 attempts"):
        s3_storage.read("a")
    assert s3_server.num_requests - before == 4


@pytest.mark.parametrize("fault", ["lose_answer", "hang"])
def test_a_put_whose_answer_was_lost_meets_its_own_file(
    s3_server: Any, s3_storage: S3Storage, fault: str
) -> None:
    s3_server.faults.append(fault)
    with pytest.raises(FileExistsError):
        s3_storage.put_if_absent("a", b"mine")
    assert s3_storage.read("a")[0] == b"mine"


@pytest.mark.parametrize("fault", ["lose_answer", "hang"])
def test_a_replacement_whose_answer_was_lost_is_known_as_its_own(
    s3_server: Any, s3_storage: S3Storage, fault: str
) -> None:
    s3_server.faults.append(fault)
    first = s3_storage.replace("a", b"first", None)
    assert s3_storage.read("a") == (b"first", first)
    s3_server.faults.append(fault)
    second = s3_storage.replace("a", b"second", first)
    assert s3_storage.read("a") == (b"second", second)
    with pytest.raises(FileExistsError):
        s3_storage.replace("a", b"third", first)


@pytest.mark.parametrize("call", ["list", "read", "put"])
def test_denied_access_is_told_at_once(s3_server: Any, s3_storage: S3Storage, call: str) -> None:
    s3_server.always = "denied"
    calls = {
        "list": lambda: s3_storage.list(),
        "read": lambda: s3_storage.read("a"),
        "put": lambda: s3_storage.put_if_absent("a", b""),
    }
    with pytest.raises(StorageDeniedError, match=s3_storage.root):
        calls[call]()
    assert s3_storage.num_retries == 0


def test_a_missing_bucket_is_denied_by_name(bucket: str) -> None:
    storage = S3Storage(f"{bucket}-missing/folder")
    for call in (storage.list, lambda: storage.put_if_absent("a", b"")):
        with pytest.raises(StorageDeniedError, match="NoSuchBucket"):
            call()


def test_missing_credentials_are_denied_access(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(StorageDeniedError, match="credentials"):
        S3Storage(bucket, RetryPolicy(max_attempts=3)).list()  # its own connection


def test_a_server_that_is_away_is_given_up(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage = S3Storage(bucket, RetryPolicy(max_attempts=2, first_wait_s=0.01))
    started_s = time.monotonic()
    with pytest.raises(StorageError, match="no success in 2 attempts"):
        storage.list()
    assert time.monotonic() - started_s < 10


def test_a_file_replaced_while_it_is_read_is_noticed(s3_storage: S3Storage) -> None:
    version = s3_storage.replace("a", bytes(8_000_000), None)
    with s3_storage.open("a") as file:
        file.read(1)
        s3_storage.replace("a", bytes(7_000_000), version)
        file.seek(6_000_000)
        with pytest.raises(InputChangedError, match="a was replaced"):
            file.read(1)


def test_listing_goes_on_over_several_pages(
    s3_storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    for number in range(25):
        s3_storage.put_if_absent(f"{number:02}", b"")
    assert [info.path for info in s3_storage.list()] == [f"{number:02}" for number in range(25)]


def read_in_child(storage: S3Storage, connection: Any) -> None:
    connection.send(storage.read("a")[0])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_connects_anew(s3_storage: S3Storage) -> None:
    s3_storage.put_if_absent("a", b"content")
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(
        target=read_in_child, args=(s3_storage, there)
    )
    child.start()
    assert here.poll(20)
    assert here.recv() == b"content"
    child.join()


def test_a_file_read_in_small_steps_takes_few_requests(
    s3_server: Any, s3_storage: S3Storage
) -> None:
    lines = b"".join(b"%07d\n" % number for number in range(500_000))
    s3_storage.put_if_absent("lines", lines)
    before = s3_server.num_requests
    with s3_storage.open("lines") as file:
        assert isinstance(file, io.BufferedReader)
        assert b"".join(file) == lines
    assert s3_server.num_requests - before < 6
