"""The metrics of a run, `granite_*`, which the driver's node exports for Prometheus.

Ray puts `ray_` before their names. Labels are task and checkpoint, never an id. All of them come
from the counts that the driver has anyway; where no Ray runs, nothing is exported.
"""

import time
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from granite_ray.io.sinks import CommitRecord

LABELS = ("task", "checkpoint")


class RunMetrics:
    """What one run exports; made once Ray runs."""

    def __init__(self, task: str, checkpoint: str) -> None:
        self._labels = {"task": task, "checkpoint": checkpoint}
        self._documents = _counter("documents", "Documents committed, by status.", "status")
        self._tokens = _counter("tokens", "Tokens of committed documents, by kind.", "kind")
        self._failures = _counter("failures", "Documents that failed, by type.", "error_type")
        self._commits = _counter("commits", "Shards committed.")
        self._retries = _counter("retries", "What had to be done again, by cause.", "cause")
        self._restarts = _counter("engine_restarts", "Replicas whose process was replaced.")
        self._progress = _gauge("progress_ratio", "Documents committed, of those planned.")
        self._busy = _gauge("busy_ratio", "Replicas whose engine made a step lately, of all.")
        self._success = _gauge(
            "last_success_timestamp_seconds", "When a run last ended with 0 or 3, as Unix time."
        )
        self._seen: dict[str, int] = {}

    def count_shard(self, record: CommitRecord, num_retries: int) -> None:
        """Count a shard that is committed now."""
        self._add(self._commits, 1)
        self._add(self._documents, record.num_ok, status="ok")
        self._add(self._documents, record.num_failed, status="failed")
        self._add(self._tokens, record.num_prompt_tokens, kind="prompt")
        self._add(self._tokens, record.num_completion_tokens, kind="completion")
        self._add(self._retries, num_retries, cause="storage")
        for error_type, count in record.failures.items():
            self._add(self._failures, count, error_type=error_type)

    def look(self, state: Mapping[str, Any], progress: float) -> None:
        """Take over what the journal says."""
        self._add(self._retries, self._grown("num_deaths", state), cause="worker_death")
        self._add(self._restarts, self._grown("num_restarts", state))
        self._progress.set(progress, self._labels)
        self._busy.set(state.get("busy_ratio", 0.0), self._labels)

    def succeed(self) -> None:
        """Note that the run has ended well."""
        self._progress.set(1.0, self._labels)
        self._success.set(time.time(), self._labels)

    def _grown(self, name: str, state: Mapping[str, Any]) -> int:
        now, before = int(state.get(name, 0)), self._seen.get(name, 0)
        self._seen[name] = max(now, before)
        return max(0, now - before)

    def _add(self, counter: Counter, count: int, **labels: str) -> None:
        if count:  # Ray refuses to add nothing
            counter.inc(count, self._labels | labels)


def _counter(name: str, description: str, *labels: str) -> Counter:
    return Counter(f"granite_{name}", description, (*LABELS, *labels))


def _gauge(name: str, description: str) -> Gauge:
    return Gauge(f"granite_{name}", description, LABELS)
