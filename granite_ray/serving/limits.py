"""How much at once and how often: who is beyond a limit is told when to come back.

Counts live in the one gateway process, so they are exact.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from granite_ray.serving.errors import RETRY_S, ApiError
from granite_ray.serving.keys import Caller

WINDOW_S = 60.0


class Limits:
    """Requests in flight, of all and of each caller, and requests in a minute.

    Args:
        max_in_flight: Requests of all callers that may wait for their answers at once.
        clock: Seconds that never go back.
    """

    def __init__(self, max_in_flight: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_in_flight = max_in_flight
        self._clock = clock
        self._in_flight: defaultdict[str, int] = defaultdict(int)
        self._credits: dict[str, tuple[float, float]] = {}

    @property
    def num_in_flight(self) -> int:
        """Requests accepted and not answered yet."""
        return sum(self._in_flight.values())

    def count(self, caller: Caller) -> None:
        """Count a request against the caller's rate.

        Raises:
            ApiError: 429, with the seconds until there is room again.
        """
        now = self._clock()
        per_second = caller.requests_per_minute / WINDOW_S
        credit, seen_at = self._credits.get(caller.name, (caller.requests_per_minute, now))
        credit = min(caller.requests_per_minute, credit + (now - seen_at) * per_second)
        if credit < 1:
            self._credits[caller.name] = (credit, now)
            raise ApiError(
                429,
                f"More than {caller.requests_per_minute} requests in a minute.",
                "rate_limit_exceeded",
                retry_after_s=max(1, math.ceil((1 - credit) / per_second)),
            )
        self._credits[caller.name] = (credit - 1, now)

    @contextmanager
    def admitted(self, caller: Caller) -> Iterator[None]:
        """Hold a place for a request while it is answered.

        Raises:
            ApiError: 429 where all places are taken.
        """
        if self._in_flight[caller.name] >= caller.max_in_flight:
            raise _full(f"{caller.max_in_flight} requests of this key are in flight.")
        if self.num_in_flight >= self._max_in_flight:
            raise _full(f"The server has {self._max_in_flight} requests in flight.")
        self._in_flight[caller.name] += 1
        try:
            yield
        finally:
            self._in_flight[caller.name] -= 1


def _full(reason: str) -> ApiError:
    return ApiError(429, f"{reason} Try again soon.", "queue_full", retry_after_s=RETRY_S)
