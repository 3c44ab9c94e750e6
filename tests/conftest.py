"""What all tests share: an isolated home, and one Ray cluster for those that need one."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RAY = str(Path(sys.executable).parent / "ray")
LOOPBACK = "127.0.0.2"
"""Ray replaces 127.0.0.1 by an address that others can reach; it leaves this one alone."""


@pytest.fixture(scope="session", autouse=True)
def isolated_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing a test starts reads or writes the developer's own home, credentials or proxies."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "240")  # a busy machine is no failure
        # Ray's workers give way to all else by default, and the tests beside them never rest.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        patch.delenv("RAY_ADDRESS", raising=False)
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        yield home


@pytest.fixture(scope="session")
def ray_address(isolated_home: Path) -> Iterator[str]:
    """The address of a Ray on loopback that drivers join and leave; far quicker than one each."""
    started = subprocess.run(
        [
            *(RAY, "start", "--head", "--port=0", f"--node-ip-address={LOOPBACK}"),
            *("--include-dashboard=false", "--num-cpus=6", "--disable-usage-stats"),
            f"--object-store-memory={300 * 1024**2}",
            f"--temp-dir={short_temporary_folder(isolated_home)}",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    address = re.search(rf"{re.escape(LOOPBACK)}:\d+", started.stdout)
    assert address, started.stdout
    yield address[0]
    stop_ray_processes(isolated_home, address[0])


@pytest.fixture(scope="session")
def joined_ray(ray_address: str) -> Iterator[None]:
    """Ray joined once by the test process: jobs run in it share their worker processes."""
    import ray

    ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
    yield
    assert ray.is_initialized(), "a test left the Ray that all had joined"
    assert ray.get_runtime_context().gcs_address == ray_address
    ray.shutdown()


def short_temporary_folder(home: Path) -> Path:
    """Ray's sockets must have short paths."""
    return Path("/tmp") / f"gr-{os.getpid()}-{home.name[-8:]}"


def stop_ray_processes(home: Path, address: str) -> None:
    """End the processes of our own cluster, by process id, and no other Ray on this machine."""
    import psutil

    folder = str(short_temporary_folder(home))
    ours = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(
            folder in word or word == f"--address={address}"
            for word in process.info["cmdline"] or ()
        )
    ]
    for process in ours:
        for child in [*process.children(recursive=True), process]:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
    psutil.wait_procs(ours, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)
