"""One writer an output: a lease file with a heartbeat, watched on the observer's own clock."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from granite_ray.errors import LeaseError, StorageError
from granite_ray.io.storage import Storage

LEASE_PATH = "_granite/lease.json"
BEATS_PER_LEASE = 4


class Lease:
    """The right to write one output, from `acquire` to `release`.

    A thread of its own renews the heartbeat. No clock of another machine is ever read: a lease
    has expired when its heartbeat has not moved for `lease_s` on the observer's monotonic clock.
    """

    def __init__(self, storage: Storage, run_id: str, lease_s: float) -> None:
        self.storage = storage
        self.run_id = run_id
        self.lease_s = lease_s
        self._version: str | None = None
        self._beat = 0
        self._lost: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self, on_wait: Callable[[str], None] = lambda _: None) -> None:
        """Take the lease; wait up to `lease_s` to see whether another holder is alive.

        Raises:
            LeaseError: If another run holds it and its heartbeat moves.
        """
        holder, version = _read_lease(self.storage)
        if holder is not None and not _is_dead_here(holder):
            on_wait(_describe(holder))
            version = self._wait_until_expired(version)
        try:
            self._version = self.storage.replace(LEASE_PATH, self._body(), version)
        except FileExistsError as error:
            raise LeaseError(f"{self.storage.root}: another run took the lease first.") from error
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseError if the lease is known to be lost, or is not ours in the storage now."""
        if self._lost is not None:
            raise LeaseError(f"{self.storage.root}: {self._lost}") from self._lost
        check_lease(self.storage, self.run_id)

    @property
    def is_lost(self) -> bool:
        """Whether the heartbeat found another holder."""
        return self._lost is not None

    def release(self) -> None:
        """Stop the heartbeat and delete the lease if it is still ours."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        holder, _ = _read_lease(self.storage)
        if holder is not None and holder["run_id"] == self.run_id:
            self.storage.delete(LEASE_PATH)

    def _wait_until_expired(self, version: str | None) -> str | None:
        """Return the version to replace: the one that stood still, or None once it is released."""
        deadline = time.monotonic() + self.lease_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.lease_s / BEATS_PER_LEASE))
            holder, seen = _read_lease(self.storage)
            if holder is None:
                return None
            if seen != version:
                raise LeaseError(
                    f"{self.storage.root}: another run holds this output ({_describe(holder)}). "
                    "Wait for it to end, or stop it."
                )
        return version

    def _renew(self) -> None:
        """Renew until told to stop, or until the lease is found in other hands."""
        while not self._stop.wait(self.lease_s / BEATS_PER_LEASE):
            try:
                self._renew_once()
            except LeaseError as error:
                self._lost = error
                return
            except (StorageError, OSError):
                continue  # the next beat tries again; commits check the lease themselves

    def _renew_once(self) -> None:
        self._beat += 1
        try:
            self._version = self.storage.replace(LEASE_PATH, self._body(), self._version)
        except FileExistsError as error:
            holder, version = _read_lease(self.storage)
            if holder is None or holder["run_id"] != self.run_id:
                raise LeaseError("another run has taken this output over") from error
            self._version = version  # an earlier beat of our own, whose answer was lost

    def _body(self) -> bytes:
        values = {
            "run_id": self.run_id,
            "beat": self._beat,
            "lease_s": self.lease_s,
            **_this_process(),
        }
        return json.dumps(values).encode()


def check_lease(storage: Storage, run_id: str) -> None:
    """Raise LeaseError unless `run_id` holds the lease of this output."""
    holder, _ = _read_lease(storage)
    if holder is None or holder["run_id"] != run_id:
        raise LeaseError(f"{storage.root}: another run has taken this output over.")


def _read_lease(storage: Storage) -> tuple[dict[str, Any] | None, str | None]:
    try:
        data, version = storage.read(LEASE_PATH)
    except FileNotFoundError:
        return None, None
    values: dict[str, Any] = json.loads(data)
    return values, version


def _describe(holder: dict[str, Any]) -> str:
    return f"run {holder['run_id']} on {holder['host']}, process {holder['pid']}"


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": _host_identity(), "pid": pid, "started": _process_start(pid)}


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether the holder ran on this host and its process is gone."""
    if holder["host"] != _host_identity():
        return False
    return bool(_process_start(holder["pid"]) != holder["started"])


def _host_identity() -> str:
    """Host name and boot: a name alone can be given again to another machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()}/{boot[:8]}"


def _process_start(pid: int) -> str | None:
    """Return the start of a process in clock ticks since boot, None if there is none.

    With the process id it names one process for good. Field 22 of /proc/<pid>/stat, see proc(5).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else "unknown"
    fields = stat.rpartition(")")[2].split()
    state, start = fields[0], fields[19]
    return None if state == "Z" else start
