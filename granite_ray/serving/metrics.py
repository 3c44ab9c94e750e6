"""Counts of a gateway in Prometheus' text form: routes and statuses, tokens, times; no texts."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]


class Metrics:
    """What one gateway counts, in a registry of its own."""

    def __init__(self, num_in_flight: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "granite_ray_requests",
            "Requests answered, by route, method and status.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "granite_ray_request_seconds",
            "Seconds from a request to the end of its answer, by route.",
            ["route"],
            buckets=BUCKETS_S,
            registry=self._registry,
        )
        self._tokens = Counter(
            "granite_ray_tokens",
            "Tokens of prompts and completions, of interactive requests and of batches.",
            ["kind", "way"],
            registry=self._registry,
        )
        self._documents = Counter(
            "granite_ray_documents",
            "Documents answered, by status.",
            ["status", "way"],
            registry=self._registry,
        )
        in_flight = Gauge(
            "granite_ray_requests_in_flight",
            "Requests accepted and not answered yet.",
            registry=self._registry,
        )
        in_flight.set_function(num_in_flight)

    def note_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one answered request."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def note_tokens(self, num_prompt: int, num_completion: int, *, is_interactive: bool) -> None:
        """Count the tokens of one answer."""
        way = _way(is_interactive)
        self._tokens.labels("prompt", way).inc(num_prompt)
        self._tokens.labels("completion", way).inc(num_completion)

    def note_documents(self, num_ok: int, num_failed: int, *, is_interactive: bool) -> None:
        """Count documents."""
        way = _way(is_interactive)
        self._documents.labels("ok", way).inc(num_ok)
        self._documents.labels("failed", way).inc(num_failed)

    def text(self) -> bytes:
        """Return all counts."""
        return generate_latest(self._registry)


def _way(is_interactive: bool) -> str:
    return "interactive" if is_interactive else "batch"
