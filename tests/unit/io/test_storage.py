"""What every storage promises, asked of a folder and of a bucket."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from granite_ray.errors import ConfigError
from granite_ray.io.storage import Storage, open_storage


def test_a_file_put_is_read_back_with_its_version(storage: Storage) -> None:
    storage.put_if_absent("a/b.bin", memoryview(b"content"))
    content, version = storage.read("a/b.bin")
    assert content == b"content"
    info = storage.info("a/b.bin")
    assert (info.path, info.size, info.version) == ("a/b.bin", 7, version)
    assert storage.list() == [info]


def test_a_file_that_exists_is_not_put_again(storage: Storage) -> None:
    storage.put_if_absent("a.bin", b"first")
    with pytest.raises(FileExistsError):
        storage.put_if_absent("a.bin", b"second")
    assert storage.read("a.bin")[0] == b"first"
    assert [info.path for info in storage.list()] == ["a.bin"]


def test_one_of_many_puts_at_once_wins_and_is_whole(storage: Storage) -> None:
    gate = threading.Barrier(8)

    def put(number: int) -> int | None:
        gate.wait()
        try:
            storage.put_if_absent("race.bin", bytes([number]) * 100_000)
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(put, range(8)) if number is not None]
    assert len(winners) == 1
    assert storage.read("race.bin")[0] == bytes(winners) * 100_000


def test_replace_swaps_only_the_version_it_expects(storage: Storage) -> None:
    first = storage.replace("job.json", b"1", None)
    assert storage.info("job.json").version == first
    second = storage.replace("job.json", b"2", first)
    assert second != first
    for stale in (first, None, "no-such-version"):
        with pytest.raises(FileExistsError):
            storage.replace("job.json", b"3", stale)
    assert storage.read("job.json") == (b"2", second)


def test_replace_of_a_missing_file_needs_no_version(storage: Storage) -> None:
    with pytest.raises(FileExistsError):
        storage.replace("missing.json", b"1", "1-1")
    with pytest.raises(FileNotFoundError):
        storage.info("missing.json")


def test_one_of_many_replacements_at_once_wins(storage: Storage) -> None:
    version = storage.replace("counter", b"0", None)
    gate = threading.Barrier(8)

    def swap(number: int) -> bool:
        gate.wait()
        try:
            storage.replace("counter", b"%d" % number, version)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(swap, range(1, 9))) == 1


@pytest.mark.parametrize("path", ["missing", "folder", "folder/file/below"])
def test_a_missing_file_is_not_found(storage: Storage, path: str) -> None:
    storage.put_if_absent("folder/file", b"")
    for read in (storage.info, storage.read, storage.open):
        with pytest.raises(FileNotFoundError, match=path):
            read(path)


def test_delete_takes_a_file_away_and_forgives_a_missing_one(storage: Storage) -> None:
    storage.put_if_absent("a", b"1")
    storage.delete("a")
    storage.delete("a")
    assert storage.list() == []


def test_listing_is_sorted_and_passes_over_hidden_names(storage: Storage) -> None:
    for path in ["b/2", "a", "b/1", "b-c", "_SUCCESS.json", ".x", "_meta/x", "b/.git/x", "b/_y"]:
        storage.put_if_absent(path, b"")
    assert [info.path for info in storage.list()] == ["a", "b-c", "b/1", "b/2"]
    assert [info.path for info in storage.list(recursive=False)] == ["a", "b-c"]
    assert [info.path for info in storage.list("b")] == ["b/1", "b/2"]
    assert storage.read("_SUCCESS.json")[0] == b""


def test_a_hidden_folder_is_listed_when_named(storage: Storage) -> None:
    storage.put_if_absent("_granite/job.json", b"{}")
    storage.put_if_absent("_granite/.hidden", b"")
    storage.replace("_granite/lease.json", b"{}", None)
    listed = [info.path for info in storage.list("_granite", recursive=False)]
    assert listed == ["_granite/job.json", "_granite/lease.json"]


def test_listing_a_missing_folder_is_empty(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.list("nowhere") == []


def test_an_open_file_gives_any_bytes_of_it(storage: Storage) -> None:
    content = bytes(range(256)) * 20_000
    storage.put_if_absent("data", content)
    with storage.open("data") as file:
        assert file.read(10) == content[:10]
        file.seek(-5, 2)
        assert file.read() == content[-5:]
        assert file.read() == b""
        file.seek(123_456)
        assert file.read(4_000_000) == content[123_456:4_123_456]


def test_a_storage_can_be_pickled(storage: Storage) -> None:
    storage.put_if_absent("a", b"1")
    copy: Storage = pickle.loads(pickle.dumps(storage))
    assert copy.root == storage.root
    assert copy.read("a") == storage.read("a")


def test_a_storage_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="gs://bucket"):
        open_storage("gs://bucket/x")
