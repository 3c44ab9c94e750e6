"""One writer an output: who may take the lease, who loses it, and how both come to know."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from granite_ray.errors import LeaseError, StorageError
from granite_ray.io.lease import LEASE_PATH, Lease, check_lease
from tests.faulty_storage import MemoryStorage

SHORT_S = 0.4
LONG_S = 3600.0


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def acquire(storage: MemoryStorage) -> Iterator[Callable[..., Lease]]:
    """Take a lease that is let go when the test ends."""
    leases = []

    def take(run_id: str, lease_s: float = LONG_S, at: Any = storage) -> Lease:
        lease = Lease(at, run_id, lease_s)
        leases.append(lease)
        lease.acquire()
        return lease

    yield take
    for lease in leases:
        lease.release()


def holder_of(storage: MemoryStorage) -> dict[str, Any]:
    return json.loads(storage.read(LEASE_PATH)[0])


def write_lease(storage: MemoryStorage, **changes: Any) -> None:
    """Put a lease of another run there, as it would be with these values."""
    try:
        version = storage.read(LEASE_PATH)[1]
    except FileNotFoundError:
        version = None
    values = {"run_id": "other", "beat": 0, "lease_s": LONG_S, "host": "elsewhere/0", "pid": 1}
    values |= {"started": "1"} | changes
    storage.replace(LEASE_PATH, json.dumps(values).encode(), version)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def test_a_lease_is_there_while_it_is_held_and_gone_after(storage: MemoryStorage) -> None:
    lease = Lease(storage, "mine", LONG_S)
    lease.acquire()
    check_lease(storage, "mine")
    lease.check()
    with pytest.raises(LeaseError):
        check_lease(storage, "other")
    lease.release()
    assert LEASE_PATH not in storage.files
    with pytest.raises(LeaseError, match="memory: another run"):
        check_lease(storage, "mine")


def test_a_heartbeat_moves_and_keeps_others_out(
    storage: MemoryStorage, acquire: Callable[..., Lease]
) -> None:
    mine = acquire("mine", SHORT_S)
    wait_until(lambda: holder_of(storage)["beat"] >= 2)
    waited_for = []
    other = Lease(storage, "other", LONG_S / 100)
    with pytest.raises(LeaseError, match=f"run mine on .*process {os.getpid()}") as refusal:
        other.acquire(waited_for.append)
    assert refusal.value.exit_code == 6
    assert len(waited_for) == 1
    mine.check()


def test_a_heartbeat_that_stands_still_has_expired_whatever_its_host_and_clock(
    storage: MemoryStorage, acquire: Callable[..., Lease]
) -> None:
    write_lease(storage)
    started = time.monotonic()
    acquire("mine", SHORT_S)
    assert time.monotonic() - started >= SHORT_S
    assert holder_of(storage)["run_id"] == "mine"


def test_a_holder_that_lets_go_is_followed_without_waiting_to_the_end(
    storage: MemoryStorage, acquire: Callable[..., Lease]
) -> None:
    write_lease(storage)
    threading.Timer(0.1, storage.delete, [LEASE_PATH]).start()
    started = time.monotonic()
    acquire("mine", 60.0)
    assert time.monotonic() - started < 50


def test_a_dead_process_of_this_host_is_followed_at_once(
    storage: MemoryStorage, acquire: Callable[..., Lease]
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    acquire("mine").release()
    here = Lease(storage, "other", LONG_S)
    here.acquire()
    values = holder_of(storage)
    here.release()
    write_lease(storage, **values | {"pid": dead.pid})
    acquire("next")  # with LONG_S: to wait for it would end the test
    assert holder_of(storage)["run_id"] == "next"


def test_a_process_id_given_again_is_not_the_holder(
    storage: MemoryStorage, acquire: Callable[..., Lease]
) -> None:
    first = Lease(storage, "first", LONG_S)
    first.acquire()
    values = holder_of(storage)
    first.release()
    write_lease(storage, **values | {"started": "0"})
    acquire("next")
    assert holder_of(storage)["run_id"] == "next"


def test_a_live_process_of_another_boot_or_host_is_not_taken_for_dead(
    storage: MemoryStorage,
) -> None:
    write_lease(storage, host="another-host/12345678", pid=2**30)
    waited_for: list[str] = []
    beats = threading.Timer(0.3, write_lease, [storage], {"beat": 1, "host": "another-host/1"})
    beats.start()
    with pytest.raises(LeaseError, match="another-host"):
        Lease(storage, "mine", LONG_S / 100).acquire(waited_for.append)
    beats.join()
    assert waited_for == ["run other on another-host/12345678, process 1073741824"]


def test_a_lease_taken_over_is_seen_by_the_next_check_and_by_the_heartbeat(
    storage: MemoryStorage, acquire: Callable[..., Lease]
) -> None:
    lease = acquire("mine", SHORT_S)
    write_lease(storage)
    with pytest.raises(LeaseError):
        lease.check()
    wait_until(lambda: lease.is_lost)
    storage.delete(LEASE_PATH)
    with pytest.raises(LeaseError, match="taken this output over"):
        lease.check()
    assert LEASE_PATH not in storage.files, "a lost lease must not be renewed"


def test_who_lost_the_lease_leaves_the_successors_alone(storage: MemoryStorage) -> None:
    lease = Lease(storage, "mine", LONG_S)
    lease.acquire()
    write_lease(storage, run_id="successor")
    lease.release()
    assert holder_of(storage)["run_id"] == "successor"


def test_of_many_that_come_at_once_one_gets_it(storage: MemoryStorage) -> None:
    outcomes: dict[str, str] = {}
    leases = [Lease(storage, f"run-{number}", SHORT_S * 4) for number in range(6)]
    together = threading.Barrier(len(leases))

    def come(lease: Lease) -> None:
        together.wait()
        try:
            lease.acquire()
            outcomes[lease.run_id] = "holds"
        except LeaseError:
            outcomes[lease.run_id] = "refused"

    threads = [threading.Thread(target=come, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    holders = [run_id for run_id, outcome in outcomes.items() if outcome == "holds"]
    assert holders == [holder_of(storage)["run_id"]]
    for lease in leases:
        lease.release()


class Moody:
    """A storage whose `replace` fails, or does its work and loses the answer, while told to."""

    root = "moody"

    def __init__(self, inner: MemoryStorage) -> None:
        self._inner = inner
        self.mood: str | None = None
        self.num_failed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def replace(self, path: str, data: bytes, expected_version: str | None) -> str:
        if self.mood == "down":
            self.num_failed += 1
            raise StorageError("no answer")
        version = self._inner.replace(path, data, expected_version)
        if self.mood == "loses answers":
            self.num_failed += 1
            raise StorageError("no answer")
        return version


def test_a_heartbeat_survives_a_storage_that_was_away(
    storage: MemoryStorage, acquire: Callable[..., Lease]
) -> None:
    moody = Moody(storage)
    lease = acquire("mine", SHORT_S, moody)
    moody.mood = "down"
    wait_until(lambda: moody.num_failed >= 2)
    moody.mood = None
    beat = holder_of(storage)["beat"]
    wait_until(lambda: holder_of(storage)["beat"] > beat)
    assert not lease.is_lost


def test_a_beat_whose_answer_was_lost_is_not_taken_for_another_run(
    storage: MemoryStorage, acquire: Callable[..., Lease]
) -> None:
    moody = Moody(storage)
    lease = acquire("mine", SHORT_S, moody)
    moody.mood = "loses answers"
    wait_until(lambda: moody.num_failed >= 1)
    moody.mood = None
    beat = holder_of(storage)["beat"]
    wait_until(lambda: holder_of(storage)["beat"] > beat or lease.is_lost)
    assert not lease.is_lost
    lease.check()


def test_a_release_after_a_beat_whose_answer_was_lost_still_lets_go(
    storage: MemoryStorage,
) -> None:
    moody = Moody(storage)
    lease = Lease(moody, "mine", SHORT_S)
    lease.acquire()
    moody.mood = "loses answers"
    wait_until(lambda: moody.num_failed >= 1)
    lease.release()
    assert LEASE_PATH not in storage.files
