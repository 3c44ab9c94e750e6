"""read → prepare → generate → commit on Ray Data, and the driver's watch over it.

One block a shard, several shards in flight in each replica. Nothing waits without an end: the
driver looks at the journal while the stream runs and gives up with a message that names the cause.
"""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray

from granite_ray.attempts import close_journal, start_journal
from granite_ray.cluster import STREAM_THREAD, ReplicaResources
from granite_ray.errors import ConfigError, GraniteRayError, InfrastructureError
from granite_ray.io.sinks import CommitRecord
from granite_ray.ranks import remove_ranks
from granite_ray.ray_errors import own_error
from granite_ray.records import ShardPart
from granite_ray.stages import ShardWork, StageContext, commit, read_and_prepare, write_work
from granite_ray.workers import ReplicaWorker

MAX_WAVE = 20_000
"""Shards handed to Ray at once: a block costs about 0.6 ms to submit."""
SHARDS_IN_FLIGHT = 4
"""Shards that share one replica, so that its batches stay full while others are read."""
READ_CPUS = 0.75
COMMIT_CPUS = 0.25
"""Unlike a replica's, or Ray Data would fuse reading into the replica's actor."""
STOP_S = 10.0
TICK_S = 0.5
ANSWER_S = 5.0
CLUSTER_SILENCE_S = 30.0
"""How long the cluster may not answer. Ray itself ends the process after 60 s without its head."""


@dataclass(frozen=True, slots=True)
class CommittedShard:
    """One shard that is committed now, and the calls made, and repeated, for it in this run.

    `job` is the place, among those that share the pass, of the job that it is committed for.
    """

    job: int
    path: str
    record: CommitRecord
    model_calls: int
    num_retries: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: what the journal says, and how to let no further shard begin."""

    state: dict[str, Any]
    drain: Callable[[], None]


def stream_shards(
    work: Sequence[Sequence[ShardWork]],
    contexts: Sequence[StageContext],
    replica: ReplicaResources,
) -> Generator[CommittedShard | Tick]:
    """Do the work; yield each shard as it is committed, and a tick at least every second or so.

    `work` says for each shard what the jobs have to do of it; `contexts` has one a job.

    Raises:
        GraniteRayError: What a stage raised, as it raised it.
        InfrastructureError: If the cluster falls silent or cannot go on.
    """
    journal = start_journal()
    watchdog = Watchdog(journal, contexts[0].config.job.scheduling_timeout_s)
    try:
        for start in range(0, len(work), MAX_WAVE):
            dataset = build_dataset(work[start : start + MAX_WAVE], contexts, replica, journal)
            try:
                yield from _watch(_Background(dataset, journal), watchdog)
            finally:
                if replica.rank_bundle is not None:
                    remove_ranks(contexts[0].run_id)  # or the next wave would find no room
    finally:
        close_journal(journal)


def _watch(background: "_Background", watchdog: "Watchdog") -> Iterator[CommittedShard | Tick]:
    try:
        while True:
            try:
                item = background.items.get(timeout=TICK_S)
            except queue.Empty:
                yield Tick(watchdog.look(), watchdog.drain)
                continue
            if item is None:
                yield Tick(watchdog.look(), watchdog.drain)  # deaths since the last one count too
                return
            if isinstance(item, BaseException):
                raise _cause(item, watchdog) from item
            yield from _committed(item)
            if watchdog.is_due:
                yield Tick(watchdog.look(), watchdog.drain)
    finally:
        background.stop()


def build_dataset(
    work: Sequence[Sequence[ShardWork]],
    contexts: Sequence[StageContext],
    replica: ReplicaResources,
    journal: Any,
) -> Any:
    """Return the chain of stages over one wave of shards."""
    pool = ray.data.ActorPoolStrategy(
        min_size=min(replica.least, len(work)),
        max_size=max(1, min(replica.most, len(work))),
        max_concurrent_calls_per_actor=SHARDS_IN_FLIGHT,
        max_tasks_in_flight_per_actor=SHARDS_IN_FLIGHT,
    )
    whole_block: dict[str, Any] = {
        "batch_size": None,
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
    }
    shards = ray.data.from_items(
        [{"work": write_work(works)} for works in work], override_num_blocks=len(work)
    )
    prepared = shards.map_batches(
        cast(Any, read_and_prepare),
        fn_kwargs={"contexts": contexts},
        num_cpus=READ_CPUS,
        **whole_block,
    )
    answered = prepared.map_batches(
        ReplicaWorker,
        fn_constructor_args=(contexts, journal, replica),
        compute=pool,
        num_cpus=replica.num_cpus,
        num_gpus=replica.num_gpus,
        **whole_block,
    )
    return answered.map_batches(
        cast(Any, commit),
        fn_kwargs={"contexts": contexts, "journal": journal},
        num_cpus=COMMIT_CPUS,
        **whole_block,
    )


class Watchdog:
    """Looks at the journal and knows when a silence is too long."""

    def __init__(self, journal: Any, scheduling_timeout_s: float) -> None:
        self._journal = journal
        self._timeout_s = scheduling_timeout_s
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._control_store = host.strip("[]"), int(port)
        self._state: dict[str, Any] = {}
        self._last_look = self._last_answer = self._last_sign = time.monotonic()
        self._num_signs = -1

    def drain(self) -> None:
        """Let shards that run finish, and none begin."""
        self._journal.drain.remote()

    @property
    def is_due(self) -> bool:
        """Whether the last look is older than a tick."""
        return time.monotonic() - self._last_look > TICK_S

    def look(self) -> dict[str, Any]:
        """Return the journal's state.

        Raises:
            ConfigError: If a replica could not start, and will not the next time either.
            InfrastructureError: If it does not answer, or nothing moves.
        """
        self._last_look = time.monotonic()
        if not self._is_answered():
            # The journal's process must start first, which on a busy node takes its time.
            patience_s = CLUSTER_SILENCE_S if self._state else self._timeout_s
            if time.monotonic() - self._last_answer > patience_s:
                raise InfrastructureError(
                    f"The Ray cluster has not answered for {patience_s:g} s: its head or "
                    "control store is gone. What is committed stays; run again to resume."
                )
            return self._state
        self._last_answer = time.monotonic()
        if isinstance(self._state["start_error"], ConfigError):
            raise self._state["start_error"]
        if self._state["num_signs"] != self._num_signs:
            self._num_signs, self._last_sign = self._state["num_signs"], time.monotonic()
        elif time.monotonic() - self._last_sign > self._patience_s:
            raise InfrastructureError(
                f"{self._silence()} The cluster has {_resources()}. Look at the workers' logs; run "
                "again to resume, with a larger job.scheduling_timeout_s if it was only slow."
            )
        return self._state

    @property
    def _patience_s(self) -> float:
        """Twice the time-out where an engine has work.

        A replica gets it once to find out by itself that its engine hangs, and once more until
        another has taken its place.
        """
        return self._timeout_s * (2 if self._state["num_in_engine"] else 1)

    def _silence(self) -> str:
        """Say what has been missing, and for how long."""
        waited = f"for {self._patience_s:g} s"
        if self._state["num_in_engine"]:
            return (
                f"No progress {waited} (twice job.scheduling_timeout_s), with shards in an engine "
                f"({self._state['num_in_engine']}): a replica hangs, or was lost and none took its "
                "place."
            )
        waited += " (job.scheduling_timeout_s)"
        if self._state["replicas"]:
            return f"No replica has shown a sign of life {waited}: they still load, or are gone."
        return f"No replica has been placed {waited}: there is no room for one, or Ray starts none."

    def _is_answered(self) -> bool:
        """Ask the journal, and knock at the control store, without which actors still talk."""
        try:
            self._state = ray.get(self._journal.state.remote(), timeout=ANSWER_S)
            socket.create_connection(self._control_store, timeout=ANSWER_S).close()
        except (ray.exceptions.RayError, OSError):
            return False
        return True


def _resources() -> str:
    had, free = ray.cluster_resources(), ray.available_resources()
    names = [name for name in ("CPU", "GPU") if name in had]
    return ", ".join(f"{had[name]:g} {name} ({free.get(name, 0):g} free)" for name in names)


class _Background:
    """Iterates over a dataset in a thread, so that the driver can look around.

    `items` gets blocks, then None, or the exception that ended it.
    """

    def __init__(self, dataset: Any, journal: Any) -> None:
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._dataset = dataset
        self._journal = journal
        self._thread = threading.Thread(target=self._iterate, name=STREAM_THREAD, daemon=True)
        self._thread.start()

    def _iterate(self) -> None:
        try:
            for block in self._dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                self.items.put(block)
            self.items.put(None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the driver raises it
            self.items.put(error)

    def stop(self) -> None:
        """End the iteration before Ray is left, or its thread would complain in the terminal.

        Ray Data offers no way to stop; without their journal the replicas break off.
        """
        if self._thread.is_alive():
            close_journal(self._journal)
            self._thread.join(STOP_S)


def _committed(block: Any) -> Iterator[CommittedShard]:
    for row in block.to_pylist():
        values = json.loads(row.pop("record"))
        parts = tuple(ShardPart(**part) for part in values.pop("parts"))
        yield CommittedShard(record=CommitRecord(parts=parts, **values), **row)


def _cause(error: BaseException, watchdog: Watchdog) -> BaseException:
    """Return what ended a stream, as its own class."""
    if isinstance(error, ray.exceptions.RayActorError):
        start_error: GraniteRayError | None = watchdog.look().get("start_error")
        if start_error is not None:
            return start_error
    return own_error(error)
