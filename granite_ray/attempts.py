"""Which shard and document began where, and who is to blame when a worker dies.

A journal that lives in one small actor on the driver's node. It decides how a shard is tried
again: first together with others, then alone in its replica, then one document at a time.
It also holds what the driver asks for while it waits: live counts, and whether to drain.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from granite_ray.errors import GraniteRayError, InfrastructureError
from granite_ray.programs import Attempt, Mode

MAX_LONE_DEATHS = 2
"""A document that kills its worker this often while it runs alone has failed."""
MAX_SHARD_DEATHS = 60
"""A shard that killed its worker this often stops the job: 2 deaths, then 29 deadly documents."""
MAX_DEATHS_IN_A_ROW = 20
"""Deaths between which no document was answered: then it is not the documents that are broken."""


@dataclass(slots=True)
class _ShardJournal:
    """What is known of one shard: where it runs now, and the deaths charged to it.

    `is_inside` says that a death of its replica is charged to it: also while its table is built,
    which can take all memory just as well.
    """

    node_id: str | None = None
    is_inside: bool = False
    document: int | None = None
    num_begun: int = 0
    num_deaths: int = 0
    lone_deaths: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LiveCounts:
    """Counts that a replica reports while it works, since it started."""

    documents: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: "LiveCounts") -> "LiveCounts":
        mine, theirs = asdict(self), asdict(other)
        return LiveCounts(**{name: mine[name] + theirs[name] for name in mine})


class Journal:
    """The plain object behind the actor.

    Args:
        is_node_alive: Tells whether a node lives; the death of a node is not charged to documents.
    """

    def __init__(self, is_node_alive: Callable[[str], bool]) -> None:
        self._is_node_alive = is_node_alive
        self._running: set[str] = set()
        self._in_engine: set[str] = set()
        self._shards: dict[str, _ShardJournal] = {}
        self._counts: dict[tuple[str, str], LiveCounts] = {}
        self._num_steps: dict[tuple[str, str], int] = {}
        self._newest: dict[str, str] = {}
        self._is_busy: dict[str, bool] = {}
        self._start_error: GraniteRayError | None = None
        self._num_signs = 0
        self._deaths_in_a_row = 0
        self._last_words = ""
        self._is_draining = False

    def begin(self, shard_id: str, node_id: str) -> Attempt:
        """Note that a shard begins, and tell how. A shard that had begun has lost its worker.

        Raises:
            InfrastructureError: If workers die one after the other, or too many of this shard.
        """
        self._in_engine.discard(shard_id)
        if self._is_draining:
            self._running.discard(shard_id)
            return Attempt("skip")
        self._num_signs += 1
        journal = self._shards.setdefault(shard_id, _ShardJournal())
        if journal.is_inside and self._is_node_alive(journal.node_id or ""):
            self._charge(shard_id, journal)
        journal.node_id, journal.is_inside, journal.document = node_id, False, None
        journal.num_begun += 1
        self._running.add(shard_id)
        deadly = {at for at, deaths in journal.lone_deaths.items() if deaths >= MAX_LONE_DEATHS}
        modes: tuple[Mode, ...] = ("together", "alone", "one_by_one")
        mode = modes[min(journal.num_deaths, 2)]
        return Attempt(mode, frozenset(deadly), journal.num_begun)

    def _charge(self, shard_id: str, journal: _ShardJournal) -> None:
        journal.num_deaths += 1
        self._deaths_in_a_row += 1
        if journal.document is not None:
            at = journal.document
            journal.lone_deaths[at] = journal.lone_deaths.get(at, 0) + 1
        if self._deaths_in_a_row > MAX_DEATHS_IN_A_ROW:
            raise InfrastructureError(
                f"Workers died {self._deaths_in_a_row} times in a row, with no document answered "
                f"between.{self._last_words} Look at the workers' logs; the job can be resumed."
            )
        if journal.num_deaths > MAX_SHARD_DEATHS:
            raise InfrastructureError(
                f"Shard {shard_id} killed its worker {journal.num_deaths} times."
                f"{self._last_words} Look at the workers' logs; the job can be resumed."
            )

    def enter(self, shard_id: str) -> None:
        """Note that a shard has its place in a replica; one that still waits kills no worker."""
        self._num_signs += 1
        self._shards[shard_id].is_inside = True
        if shard_id in self._running:  # a lost node may speak up after another has ended its shard
            self._in_engine.add(shard_id)

    def begin_document(self, shard_id: str, position: int | None) -> None:
        """Note which document of a shard runs alone now; None after its last."""
        self._num_signs += 1
        self._shards[shard_id].document = position

    def leave(self, shard_id: str) -> None:
        """Note that a shard has all its answers: until it ends, no step of an engine is due."""
        self._num_signs += 1
        self._in_engine.discard(shard_id)

    def end(self, shard_id: str) -> None:
        """Note that a shard's answers are complete or given up: what dies now is not its fault."""
        self._num_signs += 1
        self._in_engine.discard(shard_id)
        if shard_id in self._running:
            self._running.remove(shard_id)
            self._shards[shard_id].is_inside = False

    def report(
        self, replica_id: str, process_id: str, counts: Mapping[str, int], num_steps: int
    ) -> bool:
        """Take over the counts of a replica's process, and how many steps its engine has made.

        Return whether the process is still wanted. It is not once another has taken its place:
        processes of a node that Ray has given up may run on, where its daemon could not end them.

        That it reports is a sign of life while no shard is in an engine: to read the first may
        take long. From then on only progress is, for a process that stands still altogether would
        hide behind another that reports and has nothing to do.
        """
        process, now = (replica_id, process_id), LiveCounts(**counts)
        before = self._counts.get(process)
        if before is None:
            self._newest[replica_id] = process_id
        if not self._in_engine or (now, num_steps) != (before, self._num_steps.get(process)):
            self._num_signs += 1
        self._is_busy[replica_id] = num_steps > self._num_steps.get(process, 0)
        self._counts[process], self._num_steps[process] = now, num_steps
        if now.prompt_tokens > (before or LiveCounts()).prompt_tokens:
            self._deaths_in_a_row, self._last_words = 0, ""
        return self._newest[replica_id] == process_id

    def show_life(self) -> None:
        """Note that a commit is at work: a sign of life under the same condition as a report."""
        self._num_signs += not self._in_engine

    def give_up(self, cause: str) -> None:
        """Note why a replica ends itself: its process keeps no other word than its log."""
        self._num_signs += 1
        self._last_words = f" The last that could tell said: {cause.rstrip('.')}."

    def cannot_start(self, error: GraniteRayError) -> None:
        """Note why a replica could not start: of a dead actor's error Ray keeps the text alone."""
        self._start_error = error

    def drain(self) -> None:
        """Let shards that run finish, and none begin."""
        self._is_draining = True

    def state(self) -> dict[str, Any]:
        """Return counts of all replicas, signs of life so far, and how many shards are where."""
        totals = LiveCounts()
        for counts in self._counts.values():
            totals += counts
        deaths = sum(journal.num_deaths for journal in self._shards.values())
        return {
            "counts": asdict(totals),
            "num_signs": self._num_signs,
            "num_running": len(self._running),
            "num_in_engine": len(self._in_engine),
            "num_deaths": deaths,
            "num_restarts": len(self._counts) - len(self._is_busy),
            "replicas": len(self._is_busy),
            "busy_ratio": sum(self._is_busy.values()) / max(1, len(self._is_busy)),
            "start_error": self._start_error,
        }


def _alive_in_cluster(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def start_journal() -> Any:
    """Start the journal's actor on the driver's node and return its handle."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    actor = ray.remote(num_cpus=0, max_restarts=0)(Journal)
    return actor.options(scheduling_strategy=strategy).remote(_alive_in_cluster)


def close_journal(journal: Any) -> None:
    """End the journal; what of a stopped run still asks it breaks off. Safe to call twice."""
    ray.kill(journal)
