"""SIGINT and SIGTERM as something that a run can look at, instead of something that breaks it."""

import signal
import threading
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
    """While entered, notes the first SIGINT or SIGTERM; a second SIGINT breaks in as usual.

    Outside the main thread Python allows no handlers, and signals stay whose they are.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

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

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
