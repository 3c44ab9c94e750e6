"""Leftovers of dead writers go; what a living writer is about to put in place stays."""

import threading
from pathlib import Path

from granite_ray.io.local import LocalStorage
from granite_ray.io.storage import open_storage


def test_leftovers_of_dead_writers_go(tmp_path: Path) -> None:
    (tmp_path / ".results.parquet.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "results.parquet").write_bytes(b"whole")
    open_storage(str(tmp_path)).sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]


def test_a_sweep_takes_nothing_from_a_living_writer(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert isinstance(storage, LocalStorage)
    is_done = threading.Event()

    def sweep_all_the_time() -> None:
        while not is_done.is_set():
            storage.sweep()

    sweeper = threading.Thread(target=sweep_all_the_time)
    sweeper.start()
    try:
        version = None
        for number in range(100):
            version = storage.replace("lease.json", b"%d" % number, version)
            storage.put_if_absent(f"shard-{number}", b"rows")
    finally:
        is_done.set()
        sweeper.join()
    assert storage.read("lease.json")[0] == b"99"
