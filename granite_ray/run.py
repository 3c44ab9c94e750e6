"""Runs from their resumption to their exit codes: the loop that watches, counts and judges.

Mostly one run; several where jobs share a pass over one corpus.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from granite_ray.cluster import Cluster
from granite_ray.config import JobSection
from granite_ray.errors import GraniteRayError, LeaseError, TooManyFailedError
from granite_ray.execution import CommittedShard, Tick, stream_shards
from granite_ray.interrupts import InterruptedRunError, Interrupts
from granite_ray.io.commit import SnapshotFile
from granite_ray.metrics import RunMetrics
from granite_ray.output import HeldOutput
from granite_ray.planning import InputPlan
from granite_ray.progress import Counts, ProgressView
from granite_ray.resume import Resumption
from granite_ray.stages import ShardWork, StageContext

MIN_DOCUMENTS_TO_JUDGE = 100
"""Documents seen before `job.max_failed_fraction` can stop a run early."""
SOME_FAILED = 3
TOO_MANY_FAILED = 4

logger = logging.getLogger(__name__)


def commit_shards(
    runs: Sequence["Run"],
    work: Sequence[Sequence[ShardWork]],
    contexts: Sequence[StageContext],
    cluster: Cluster,
    interrupts: Interrupts,
) -> None:
    """Do what the runs have to do; afterwards each has the file of every planned shard.

    Args:
        runs: What shares the pass, in the order of `contexts`; each has begun.
        work: For each shard, what the runs have to do of it.
        contexts: What the stages need, one for each run.
        cluster: Where it runs.
        interrupts: Tells when to stop.

    Raises:
        GraniteRayError: Whatever ends the pass early; what is committed stays. Where one run alone
            is the reason, it is its `error` as well.
    """
    state = "stopped"
    try:
        if work:
            _Pass(runs, cluster, interrupts).stream(work, contexts)
        state = "done"
    finally:
        for run in runs:
            run.end(state)


class _Pass:
    """The loop over what comes out of the stages."""

    def __init__(self, runs: Sequence["Run"], cluster: Cluster, interrupts: Interrupts) -> None:
        self._runs = runs
        self._cluster = cluster
        self._interrupts = interrupts
        self._job = runs[0].job
        self._stop_at: float | None = None
        self._generate_began = 0.0
        self._has_begun = False

    def stream(self, work: Sequence[Sequence[ShardWork]], contexts: Sequence[StageContext]) -> None:
        self._runs[0].view.say("starting Ray and the replicas")
        replica = self._cluster.place_replicas()
        for run in self._runs:
            run.export_metrics()
        events = stream_shards(work, contexts, replica)
        started = self._generate_began = time.monotonic()
        try:
            with self._interrupts.deferred(), closing(events):
                for event in events:
                    if isinstance(event, CommittedShard):
                        self._runs[event.job].count(event)
                    else:
                        self._look(event)
        finally:
            for run in self._runs:
                seconds = run.report.seconds
                seconds["start_up"] = round(self._generate_began - started, 3)
                seconds["generate"] = round(time.monotonic() - self._generate_began, 3)
        self._raise_if_told_to_stop()

    def _look(self, tick: Tick) -> None:
        """Take over the live counts; stop if the lease is lost or the pass is told to."""
        state = tick.state
        if not self._has_begun and (
            state.get("num_running") or state.get("counts", {}).get("documents")
        ):
            # Until a replica takes its first shard, Ray and the models were starting.
            self._generate_began, self._has_begun = time.monotonic(), True
        for run in self._runs:
            run.look(state, num_runs=len(self._runs))
        if self._interrupts.signal_number is not None:
            self._drain(tick)

    def _drain(self, tick: Tick) -> None:
        """After a signal, let the shards in flight finish, for `job.grace_s` at most."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self._job.grace_s
            self._runs[0].view.say("stopping: waiting for the shards in flight")
            tick.drain()
        elif not tick.state.get("num_running") or time.monotonic() > self._stop_at:
            self._raise_if_told_to_stop()

    def _raise_if_told_to_stop(self) -> None:
        if self._interrupts.signal_number is not None:
            raise InterruptedRunError(self._interrupts.signal_number)


class Run:
    """A run that holds its output: counts what is committed for it, and says how it ended."""

    def __init__(self, job: JobSection, output: HeldOutput, view: ProgressView) -> None:
        self.job = job
        self.view = view
        self.report = output.report
        self.files: list[SnapshotFile] = []
        self.error: GraniteRayError | None = None
        self._output = output
        self._counts = Counts()
        self._metrics: RunMetrics | None = None

    def begin(self, plan: InputPlan, resumption: Resumption) -> None:
        """Count what is committed already."""
        report, counts = self.report, self._counts
        for file in resumption.committed.values():
            self.files.append(file)
            report.add_file(file)
        report.shards.planned = counts.shards_planned = len(plan.shards)
        report.shards.reused = counts.shards_committed = len(resumption.committed)
        report.documents.already_committed = report.documents.ok + report.documents.failed
        report.bad_files |= plan.bad_files
        counts.planned = plan.num_documents
        counts.committed = report.documents.already_committed
        counts.failed = report.documents.failed
        self.view.begin(counts)

    def export_metrics(self) -> None:
        """Let Ray, which runs now, export what is counted from here on."""
        self._metrics = RunMetrics(self.report.task, self.report.checkpoint)

    def count(self, shard: CommittedShard) -> None:
        """Count a shard that is committed now.

        Raises:
            TooManyFailedError: Where so many fail that the run would be refused in the end.
        """
        report, counts, record = self.report, self._counts, shard.record
        file = SnapshotFile.of(shard.path, record)
        self.files.append(file)
        report.add_file(file)
        report.shards.committed += 1
        report.documents.generated += record.num_generated
        report.documents.reused += record.num_reused
        report.model_calls += shard.model_calls
        report.storage_retries += shard.num_retries
        counts.shards_committed += 1
        counts.committed += record.num_rows
        counts.failed = report.documents.failed
        self.view.update(counts)
        if self._metrics:
            self._metrics.count_shard(record, shard.num_retries)
        logger.info(
            "shard committed",
            extra={
                "job": self.report.run_id,
                "shard": record.shard_id,
                "counts": {"ok": record.num_ok, "failed": record.num_failed},
            },
        )
        self._break_circuit()

    def _break_circuit(self) -> None:
        """Stop early where so many fail that the run would be refused in the end."""
        seen = self.report.documents.ok + self.report.documents.failed
        failed = self.report.documents.failed
        if seen >= MIN_DOCUMENTS_TO_JUDGE and failed > self.job.max_failed_fraction * seen:
            raise self._ended(
                TooManyFailedError(
                    f"{failed:,} of the first {seen:,} documents failed, more than "
                    f"job.max_failed_fraction ({self.job.max_failed_fraction:g}): "
                    f"{_worst(self.report.failures)}. Look at their error_message in the results; "
                    "what is committed stays."
                )
            )

    def look(self, state: Mapping[str, Any], *, num_runs: int) -> None:
        """Take over the live counts. Those of several runs are one: what is committed shows then.

        Raises:
            LeaseError: If another run has taken the output over.
        """
        if self._output.lease.is_lost:
            raise self._ended(
                LeaseError(f"{self._output.sink.root}: another run has taken this output over.")
            )
        live, counts = state.get("counts", {}), self._counts
        self.report.worker_deaths = state.get("num_deaths", 0)
        self.report.engine = {
            "jobs": num_runs,
            "prompt_tokens": live.get("prompt_tokens", 0),
            "cached_prompt_tokens": live.get("cached_tokens", 0),
        }
        if num_runs == 1:
            counts.answered = self.report.documents.already_committed + live.get("documents", 0)
        counts.tokens = live.get("prompt_tokens", 0) + live.get("completion_tokens", 0)
        counts.replicas = state.get("replicas", 0)
        self.view.update(counts)
        if self._metrics:
            self._metrics.look(state, counts.committed / max(1, counts.planned))

    def end(self, state: str) -> None:
        """Take the live view away and write the last counts."""
        self.view.end(state, self._counts)

    def judge(self, plan: InputPlan, *, allow_failed: bool) -> None:
        """Balance the ledger and set the report's exit code.

        Raises:
            AssertionError: If the ledger does not balance: a bug of ours, and no snapshot then.
        """
        documents = self.report.documents
        by_origin = documents.generated + documents.reused + documents.already_committed
        documents.input = by_origin if self._rows_unknown(plan) else plan.num_documents
        if not documents.is_balanced:
            raise AssertionError(f"The ledger does not balance: {documents}")
        if documents.failed > self.job.max_failed_fraction * documents.input:
            self.report.exit_code = TOO_MANY_FAILED
        else:
            self.report.exit_code = SOME_FAILED if documents.failed and not allow_failed else 0
            if self._metrics:
                self._metrics.succeed()

    def _ended(self, error: GraniteRayError) -> GraniteRayError:
        self.error = error
        return error

    def _rows_unknown(self, plan: InputPlan) -> bool:
        return not plan.is_exact or bool(self.report.bad_files)


def _worst(failures: Mapping[str, int]) -> str:
    worst = sorted(failures.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{count:,} {error_type}" for error_type, count in worst)
