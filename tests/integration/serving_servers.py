"""`granite-ray serve` as its users start it: a process of its own, on a free port of loopback."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import yaml

from tests.unit.serving.conftest import KEY, write_keys

STARTED = re.compile(r"serving .* at (http://\S+)/")
START_S = 600
"""Generous: replicas load in processes of their own, on a machine that may be busy."""


class RunningServer:
    """A server process, with clients of it."""

    def __init__(self, process: subprocess.Popen[str], lines: list[str], url: str) -> None:
        self.process = process
        self.lines = lines
        self.url = url
        self.clients: list[httpx2.Client] = []

    def openai(self, key: str = KEY, **values: Any) -> openai.OpenAI:
        http = httpx2.Client(trust_env=False)
        self.clients.append(http)
        return openai.OpenAI(
            api_key=key, base_url=f"{self.url}/v1", http_client=http, **{"timeout": 300, **values}
        )

    def http(self, key: str = KEY) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=300, trust_env=False)

    def actors(self, name: str) -> list[psutil.Process]:
        """The processes of this server's replicas of one deployment."""
        mine = psutil.Process(self.process.pid).children(recursive=True)
        found = []
        for process in mine:
            try:
                if f"ServeReplica:granite-ray:{name}" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


def write_config(folder: Path, **sections: Any) -> Path:
    keys = write_keys(folder)
    serving = {"port": 0, "keys_path": str(keys), "store_path": str(folder / "store")}
    serving |= sections.pop("serve", {})
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({**sections, "serve": serving}))
    return path


@contextmanager
def running_server(config: Path, address: str | None = None) -> Iterator[RunningServer]:
    """Start a server, wait until it answers, and stop it by SIGTERM."""
    command = [sys.executable, "-m", "granite_ray.cli", "serve", str(config)]
    command += ["--set", f"job.ray_address={address}"] if address else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    lines: list[str] = []
    found: list[str] = []
    is_told = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if match := STARTED.search(line):
                found.append(match[1])
                is_told.set()
        is_told.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert is_told.wait(START_S), "".join(lines)
        assert found, "".join(lines)
        running = RunningServer(process, lines, found[0])
        yield running
        for client in running.clients:
            client.close()
    finally:
        stop(process)
        reader.join(30)
        assert process.stdout is not None
        process.stdout.close()


def stop(process: subprocess.Popen[str], timeout_s: float = 120) -> int:
    """End the server as an operator does; by force what is left of it then."""
    children = []
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
        for child in children:
            if child.is_running():
                child.kill()


def wait_until(is_so: Any, timeout_s: float = 120, every_s: float = 0.2) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(every_s)
