"""Ray clusters of several nodes on loopback, each node of which a test can kill."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.conftest import RAY

IMPATIENCE = {
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that does not answer is given up after some twenty seconds, a third of Ray's own time."""


class LoopbackCluster:
    """Nodes on 127.0.0.10 and up, each with a temporary folder of its own that names its processes.

    The folders stand directly in /tmp, since Ray's sockets must have short paths.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = os.environ | environment
        self._folders: list[Path] = []
        self.address = ""

    def start_node(self, num_cpus: int, num_gpus: int = 0) -> int:
        """Start a node, the head first, and return its number; its GPUs are on paper only."""
        number = len(self._folders)
        self._folders.append(Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp")))
        role = [f"--address={self.address}"] if self.address else ["--head", "--port=0"]
        if not self.address:
            role.append("--include-dashboard=false")
        started = subprocess.run(
            [
                *(RAY, "start", *role, f"--node-ip-address=127.0.0.{10 + number}"),
                *(f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}", "--disable-usage-stats"),
                f"--object-store-memory={100 * 1024**2}",
                f"--temp-dir={self._folders[-1]}",
            ],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert started.returncode == 0, started.stdout + started.stderr
        if not self.address:
            found = re.search(r"127\.0\.0\.10:\d+", started.stdout)
            assert found, started.stdout
            self.address = found[0]
        return number

    def kill(self, number: int, daemon: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Kill -9 a daemon of one node, `raylet` or `gcs_server`, or send it another signal."""
        found = [process for process in self._processes(number) if process.name() == daemon]
        assert len(found) == 1, f"node {number} has {len(found)} processes named {daemon}"
        found[0].send_signal(how)

    def node_of(self, process_id: int) -> int | None:
        """The number of the node that a worker process runs on, None if it is gone."""
        for number in range(len(self._folders)):
            with suppress(psutil.NoSuchProcess):
                raylets = [p for p in self._processes(number) if p.name() == "raylet"]
                if any(parent in raylets for parent in psutil.Process(process_id).parents()):
                    return number
        return None

    def stop(self) -> None:
        """End every process of the cluster, by process id, and remove its folders."""
        for number, folder in enumerate(self._folders):
            for process in self._processes(number):
                with suppress(psutil.NoSuchProcess):
                    for child in [*process.children(recursive=True), process]:
                        with suppress(psutil.NoSuchProcess):
                            child.kill()
            shutil.rmtree(folder, ignore_errors=True)

    def _processes(self, number: int) -> list[psutil.Process]:
        folder = str(self._folders[number])
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if process.pid != os.getpid()
            and any(folder in word for word in process.info["cmdline"] or ())
        ]


@contextmanager
def loopback_cluster(
    *num_cpus: int, num_gpus: int = 0, environment: Mapping[str, str] | None = None
) -> Iterator[LoopbackCluster]:
    """Start a cluster with one node for each number of CPUs, the head first; stop it in the end."""
    cluster = LoopbackCluster(environment or {})
    try:
        for cpus in num_cpus:
            cluster.start_node(cpus, num_gpus)
        yield cluster
    finally:
        cluster.stop()
