"""The Ray that a job runs on: joined where one is named, else started for the job and stopped.

Says what a replica needs, checks that the cluster has it, and nothing about shards.
"""

import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private import auto_init_hook

from granite_ray.config import EngineConfig, JobSection
from granite_ray.config.load import default_ray_address
from granite_ray.errors import InfrastructureError
from granite_ray.interrupts import InterruptedRunError

SHELL_CPUS = 0.5
"""Of the actor that answers shards where the model runs in others. Unlike what reading and
committing take, or Ray Data would fuse them into it."""
SPARE_CPUS = 2
"""CPUs beside the replicas' own, for reading and committing; without one the job would starve."""
STOP_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 10.0
POLL_S = 1.0
STREAM_THREAD = "granite-ray-stream"
STREAM_THREADS = (STREAM_THREAD, "StreamingExecutor", "ray-data-metadata-prefetch")
"""Names, or how they begin, of the threads that call Ray while a dataset streams: ours, and Ray
Data's, which waits two seconds for its own to end and then leaves them be."""


@dataclass(frozen=True, slots=True)
class ReplicaResources:
    """What one replica takes, how many there are at least and most, and its CPU threads.

    Attributes:
        num_cpus: Of the actor that answers shards.
        num_gpus: Likewise.
        least: Replicas that there must be.
        most: Replicas that there may be.
        num_threads: CPU threads of each of its processes that computes; None leaves it to torch.
        rank_bundle: What each rank takes, where a replica has several, beside that actor.
        num_ranks: How many it has.
    """

    num_cpus: float
    num_gpus: float
    least: int
    most: int
    num_threads: int | None
    rank_bundle: Mapping[str, float] | None = None
    num_ranks: int = 1

    @property
    def total(self) -> dict[str, float]:
        """CPUs and GPUs of one replica in all."""
        bundle = self.rank_bundle or {}
        return {
            "CPU": self.num_cpus + self.num_ranks * bundle.get("CPU", 0.0),
            "GPU": self.num_gpus + self.num_ranks * bundle.get("GPU", 0.0),
        }


class Cluster:
    """Ray for one job, joined or started when it is first needed, and left as it was found.

    A finished job run again, and one that is refused, never start it.

    Args:
        on_start: Called once Ray runs; Ray takes signals for itself, which must be taken back.
    """

    def __init__(
        self, job: JobSection, engine: EngineConfig, on_start: Callable[[], None] = lambda: None
    ) -> None:
        self._job = job
        self._engine = engine
        self._on_start = on_start
        self._is_ours = False

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            stop_ray()

    def start(self) -> None:
        """Join or start Ray, unless this process has one.

        Raises:
            InfrastructureError: If it cannot be reached or started.
            InterruptedRunError: If a signal ends it.
        """
        _quiet_ray_data()
        if not ray.is_initialized():
            self._is_ours = True
            try:
                _start(self._job, self._engine)
                self._on_start()
            except SystemExit as error:  # what Ray makes of a signal as long as it has them
                if error.code not in (signal.SIGINT, signal.SIGTERM):
                    raise
                raise InterruptedRunError(int(error.code)) from error

    def place_replicas(self) -> ReplicaResources:
        """Start Ray, wait for what the replicas need, and return what they may take.

        Raises:
            InfrastructureError: If the resources are not there in `job.scheduling_timeout_s`.
        """
        self.start()
        return _wait_for_resources(self._job, self._engine)


def stop_ray() -> bool:
    """Leave or stop Ray within a bounded time; return whether it went.

    Not while a thread still asks it for something: Ray's core ends a process at once, with exit
    code 1, that calls it after it was left. Whoever ends such a process does so by `os._exit`.
    """
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for thread in threading.enumerate():
        if thread.name.startswith(STREAM_THREADS):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                return False
    stopper = threading.Thread(target=ray.shutdown, daemon=True)
    stopper.start()
    stopper.join(max(0.0, deadline - time.monotonic()))
    return not stopper.is_alive()


def _start(job: JobSection, engine: EngineConfig) -> None:
    address = job.ray_address or default_ray_address()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        cores = os.cpu_count() or 1
        options |= {
            "address": "local",
            # Logical CPUs only bound what runs side by side; replicas must not starve the readers.
            "num_cpus": max(cores, math.ceil(_most_cpus(engine)) + SPARE_CPUS),
            "include_dashboard": False,
        }
    else:
        options["address"] = address
        _check_reachable(address)
    # A thread of Ray Data that outlives the run would join again, and end the process by exit(1).
    auto_init_hook.enable_auto_connect = False
    # Ray's C++ side writes to the terminal what only its developers can use.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with _quiet_standard_error():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InfrastructureError(
            f"Ray at job.ray_address {address or 'local'} cannot be reached or started: {error}"
        ) from error


def _check_reachable(address: str) -> None:
    """Raise InfrastructureError where nothing listens: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "://" in address:
        return  # `auto`, or a client's address, which Ray answers for soon enough
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise InfrastructureError(
            f"Ray at job.ray_address {address} cannot be reached: {error}. Start the cluster, or "
            "correct the address."
        ) from error


@contextmanager
def _quiet_standard_error() -> Iterator[None]:
    """Keep native code, which announces even its own quietness, from the terminal."""
    sys.stderr.flush()
    terminal = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _quiet_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_consecutive_actor_init_deaths = 3
    context.raise_original_map_exception = True  # else only the text of a stage's error arrives
    for name in ("ray", "ray.data"):  # what goes wrong there is raised, and said once, by us
        logging.getLogger(name).setLevel(logging.CRITICAL)


def size_replicas(engine: EngineConfig) -> ReplicaResources:
    """Return what replicas may take of the cluster as it is now, without waiting for more."""
    had = ray.cluster_resources()
    wanted = _replica_resources(engine, had)
    return replace(wanted, num_threads=_threads_of(wanted, had, wanted.most))


def _most_replicas(engine: EngineConfig) -> int:
    return engine.num_replicas if isinstance(engine.num_replicas, int) else engine.num_replicas[1]


def _most_cpus(engine: EngineConfig) -> float:
    """Return the CPUs that all replicas take at most, where there is no GPU."""
    return _most_replicas(engine) * _replica_resources(engine, {}).total["CPU"]


def _wait_for_resources(job: JobSection, engine: EngineConfig) -> ReplicaResources:
    """Wait until the least number of replicas can be placed; clamp the most to what there is."""
    deadline = time.monotonic() + job.scheduling_timeout_s
    while True:
        had = ray.cluster_resources()
        wanted = _replica_resources(engine, had)
        room = _replicas_that_fit(wanted, had)
        if room >= wanted.least:
            most = min(wanted.most, room)
            return replace(wanted, most=most, num_threads=_threads_of(wanted, had, most))
        if time.monotonic() > deadline:
            raise InfrastructureError(
                f"The cluster cannot place engine.num_replicas: {wanted.least} replicas want "
                f"{wanted.least * wanted.total['GPU']:g} GPUs and "
                f"{wanted.least * wanted.total['CPU'] + 1:g} CPUs{_by_ranks(wanted)}; after "
                f"{job.scheduling_timeout_s:g} s it has {had.get('GPU', 0):g} GPUs and "
                f"{had.get('CPU', 0):g} CPUs. Use fewer replicas, another engine.device or a "
                "larger cluster."
            )
        _ask_autoscaler(wanted)
        time.sleep(POLL_S)


def _replica_resources(engine: EngineConfig, had: dict[str, float]) -> ReplicaResources:
    least = engine.num_replicas if isinstance(engine.num_replicas, int) else engine.num_replicas[0]
    needs_gpu = engine.device == "cuda" or (engine.device == "auto" and had.get("GPU", 0) > 0)
    cpus, gpus = (0.5, 1.0) if needs_gpu and engine.backend != "fake" else (1.0, 0.0)
    most, num_ranks = _most_replicas(engine), engine.expert_parallel_size
    if num_ranks == 1:
        return ReplicaResources(cpus, gpus, least, most, None)
    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return ReplicaResources(SHELL_CPUS, 0.0, least, most, None, bundle, num_ranks)


def _replicas_that_fit(wanted: ReplicaResources, had: dict[str, float]) -> int:
    fit = int((had.get("CPU", 0) - 1) / wanted.total["CPU"])
    if wanted.total["GPU"]:
        fit = min(fit, int(had.get("GPU", 0) / wanted.total["GPU"]))
    if wanted.rank_bundle:
        fit = min(fit, _ranks_that_fit(wanted.rank_bundle) // wanted.num_ranks)
    return fit


def _ranks_that_fit(bundle: Mapping[str, float]) -> int:
    """Return how many ranks the nodes can hold: none stands on two."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(int(node.get(name, 0) / amount) for name, amount in bundle.items()) for node in nodes
    )


def _by_ranks(wanted: ReplicaResources) -> str:
    if wanted.num_ranks == 1:
        return ""
    return f", each on {wanted.num_ranks} ranks (engine.expert_parallel_size)"


def _threads_of(wanted: ReplicaResources, had: dict[str, float], most: int) -> int | None:
    """Share the cores among CPU replicas. Ray would give each process one thread."""
    if wanted.total["GPU"]:
        return None
    num_nodes = max(1, sum(node["Alive"] for node in ray.nodes()))
    cores = min(had.get("CPU", 1), num_nodes * (os.cpu_count() or 1))
    return max(1, int(cores // (most * wanted.num_ranks)))


def _ask_autoscaler(wanted: ReplicaResources) -> None:
    """Ray Data's GPU pools do not always make a cluster grow from zero (ray#59144)."""
    from ray.autoscaler.sdk import request_resources

    actor = {"CPU": wanted.num_cpus, "GPU": wanted.num_gpus}
    bundles = [
        actor,
        *([dict(wanted.rank_bundle)] * wanted.num_ranks if wanted.rank_bundle else []),
    ]
    taken = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
    request_resources(bundles=taken * wanted.least)
