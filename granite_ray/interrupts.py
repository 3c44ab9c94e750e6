"""SIGINT and SIGTERM as an end that a run knows, and that it can put off while shards are on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, ClassVar

from granite_ray.errors import GraniteRayError


class InterruptedRunError(GraniteRayError):
    """The run was told to stop; what is committed stays, and the next run resumes."""

    exit_code: ClassVar[int] = 130

    def __init__(self, signal_number: int) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"Stopped by {name}. What is committed stays; run again to resume.")
        self.exit_code = 128 + signal_number  # type: ignore[misc]  # it depends on the signal


class Interrupts:
    """While entered, the first SIGINT or SIGTERM ends the run by InterruptedRunError.

    Inside `deferred` it is only noted. A second SIGINT breaks in as usual.

    Outside the main thread Python allows no handlers, and signals stay whose they are.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}
        self._is_deferred = False

    def __enter__(self) -> "Interrupts":
        self.install()
        return self

    def install(self) -> None:
        """Take the signals; again after a library, such as Ray, has taken them for itself."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(number, self._note)
                self._previous.setdefault(number, previous)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note a signal in `signal_number` instead of raising; whoever is inside looks at it."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number
            if not self._is_deferred:
                raise InterruptedRunError(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
