"""A Ray head as a cluster has it: dashboard, Jobs API, metrics and token authentication."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import RAY

BIN = str(Path(sys.executable).parent)
SCRIPT = f"{BIN}/granite-ray"


@dataclass(frozen=True, slots=True)
class Head:
    """Where a head listens, and the environment that its users need."""

    address: str
    dashboard: str
    metrics: str
    folder: str
    environment: Mapping[str, str]

    def run(self, *command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster would."""
        return subprocess.run(
            command,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    def submit(self, config: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(SCRIPT, "submit", str(config), "--address", self.dashboard, *words)


@contextmanager
def ray_head(node_ip: str, num_cpus: int = 4, **environment: str) -> Iterator[Head]:
    """Start a head on a loopback address, and stop its processes by their ids in the end."""
    folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
    token = folder / "token"
    token.write_text("a-token-of-the-tests-which-is-long-enough\n")
    port, metrics_port = _free_port(node_ip), _free_port(node_ip)
    known = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        **environment,
    }
    try:
        started = subprocess.run(
            [
                *(RAY, "start", "--head", "--port=0", f"--node-ip-address={node_ip}"),
                *("--include-dashboard=true", f"--dashboard-host={node_ip}"),
                *(f"--dashboard-port={port}", "--dashboard-agent-listen-port=0"),
                *(f"--ray-client-server-port={_free_port(node_ip)}", f"--num-cpus={num_cpus}"),
                f"--metrics-export-port={metrics_port}",
                *("--disable-usage-stats", f"--object-store-memory={200 * 1024**2}"),
                f"--temp-dir={folder}",
            ],
            env=known,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        found = re.search(rf"{re.escape(node_ip)}:\d+", started.stdout)
        assert found, started.stdout + started.stderr
        yield Head(
            found[0],
            f"http://{node_ip}:{port}",
            f"http://{node_ip}:{metrics_port}",
            str(folder),
            known,
        )
    finally:
        _stop(folder)


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])


def _stop(folder: Path) -> None:
    """End whoever has the head's folder in its command line, and their children."""
    for _ in range(2):  # the monitors start others as long as they live
        for process in psutil.process_iter(["cmdline"]):
            if any(str(folder) in word for word in process.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    for child in [*process.children(recursive=True), process]:
                        with suppress(psutil.NoSuchProcess):
                            child.send_signal(signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
