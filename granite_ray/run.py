"""One run from its resumption to its exit code: the loop that watches, counts and judges."""

import time
from collections.abc import Mapping
from contextlib import closing

from granite_ray.cluster import Cluster
from granite_ray.config import JobSection
from granite_ray.errors import LeaseError, TooManyFailedError
from granite_ray.execution import CommittedShard, Tick, stream_shards
from granite_ray.interrupts import InterruptedRunError, Interrupts
from granite_ray.io.commit import SnapshotFile
from granite_ray.output import HeldOutput
from granite_ray.planning import InputPlan
from granite_ray.progress import Counts, ProgressView
from granite_ray.resume import Resumption
from granite_ray.stages import StageContext

MIN_DOCUMENTS_TO_JUDGE = 100
"""Documents seen before `job.max_failed_fraction` can stop a run early."""
SOME_FAILED = 3
TOO_MANY_FAILED = 4


class Run:
    """A run that holds its output: commits what is to be done, and says how it ended."""

    def __init__(
        self,
        job: JobSection,
        output: HeldOutput,
        view: ProgressView,
        cluster: Cluster,
        interrupts: Interrupts,
    ) -> None:
        self._job = job
        self._output = output
        self._view = view
        self._cluster = cluster
        self._interrupts = interrupts
        self._counts = Counts()
        self._stop_at: float | None = None
        self._generate_began = 0.0
        self._has_begun = False
        self.files: list[SnapshotFile] = []
        self.report = output.report

    def commit_shards(self, plan: InputPlan, resumption: Resumption, context: StageContext) -> None:
        """Do what is to be done; afterwards `files` has the file of every planned shard.

        Raises:
            GraniteRayError: Whatever ends the run early; what is committed stays.
        """
        self._count_committed(plan, resumption)
        state = "stopped"
        try:
            if resumption.work:
                self._stream(resumption, context)
            state = "done"
        finally:
            self._view.end(state, self._counts)

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
        if documents.failed > self._job.max_failed_fraction * documents.input:
            self.report.exit_code = TOO_MANY_FAILED
        else:
            self.report.exit_code = SOME_FAILED if documents.failed and not allow_failed else 0

    def _stream(self, resumption: Resumption, context: StageContext) -> None:
        self._view.say("starting Ray and the replicas")
        replica = self._cluster.place_replicas()
        events = stream_shards(resumption.work, context, replica)
        started = self._generate_began = time.monotonic()
        try:
            with self._interrupts.deferred(), closing(events):
                for event in events:
                    if isinstance(event, CommittedShard):
                        self._count(event)
                    else:
                        self._look(event)
        finally:
            self.report.seconds["start_up"] = round(self._generate_began - started, 3)
            self.report.seconds["generate"] = round(time.monotonic() - self._generate_began, 3)
        self._raise_if_told_to_stop()

    def _rows_unknown(self, plan: InputPlan) -> bool:
        return not plan.is_exact or bool(self.report.bad_files)

    def _count_committed(self, plan: InputPlan, resumption: Resumption) -> None:
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
        self._view.begin(counts)

    def _count(self, shard: CommittedShard) -> None:
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
        self._view.update(counts)
        self._break_circuit()

    def _break_circuit(self) -> None:
        """Stop early where so many fail that the run would be refused in the end."""
        seen = self.report.documents.ok + self.report.documents.failed
        failed = self.report.documents.failed
        if seen >= MIN_DOCUMENTS_TO_JUDGE and failed > self._job.max_failed_fraction * seen:
            raise TooManyFailedError(
                f"{failed:,} of the first {seen:,} documents failed, more than "
                f"job.max_failed_fraction ({self._job.max_failed_fraction:g}): "
                f"{_worst(self.report.failures)}. Look at their error_message in the results; what "
                "is committed stays."
            )

    def _look(self, tick: Tick) -> None:
        """Take over the live counts; stop if the lease is lost or the run is told to."""
        if self._output.lease.is_lost:
            raise LeaseError(f"{self._output.sink.root}: another run has taken this output over.")
        state = tick.state
        live = state.get("counts", {})
        if not self._has_begun and (state.get("num_running") or live.get("documents")):
            # Until a replica takes its first shard, Ray and the models were starting.
            self._generate_began, self._has_begun = time.monotonic(), True
        self.report.worker_deaths = state.get("num_deaths", 0)
        self._counts.answered = self.report.documents.already_committed + live.get("documents", 0)
        self._counts.tokens = live.get("prompt_tokens", 0) + live.get("completion_tokens", 0)
        self._counts.replicas = state.get("replicas", 0)
        self._view.update(self._counts)
        if self._interrupts.signal_number is not None:
            self._drain(tick)

    def _drain(self, tick: Tick) -> None:
        """After a signal, let the shards in flight finish, for `job.grace_s` at most."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self._job.grace_s
            self._view.say("stopping: waiting for the shards in flight")
            tick.drain()
        elif not tick.state.get("num_running") or time.monotonic() > self._stop_at:
            self._raise_if_told_to_stop()

    def _raise_if_told_to_stop(self) -> None:
        if self._interrupts.signal_number is not None:
            raise InterruptedRunError(self._interrupts.signal_number)


def _worst(failures: Mapping[str, int]) -> str:
    worst = sorted(failures.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{count:,} {error_type}" for error_type, count in worst)
