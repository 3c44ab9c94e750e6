"""Counts while a job runs → a live line in a terminal (plain lines elsewhere) and progress.json."""

import json
import logging
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from granite_ray.errors import StorageError
from granite_ray.io.storage import Storage
from granite_ray.report import replace_always

PROGRESS_PATH = "_granite/progress.json"
WRITE_INTERVAL_S = 5.0
LINE_INTERVAL_S = 10.0
BAR_WIDTH = 30

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """How far a run is. `answered` counts documents answered but not yet committed as well."""

    planned: int = 0
    committed: int = 0
    failed: int = 0
    answered: int = 0
    shards_planned: int = 0
    shards_committed: int = 0
    tokens: int = 0
    replicas: int = 0

    @property
    def done(self) -> int:
        """Documents that have an answer; after a worker's death some are answered twice."""
        return min(max(self.committed, self.answered), self.planned)


class ProgressView:
    """Shows counts to a person and writes them beside the results.

    Args:
        console: Where to show them; None shows nothing.
        sink: Where `progress.json` goes.
        run_id: Whose counts they are.
        label: Stands before each line of counts, where several jobs share a console.
    """

    def __init__(
        self, console: Console | None, sink: Storage, run_id: str, label: str = ""
    ) -> None:
        self._label = label
        self._console = console
        self._sink = sink
        self._run_id = run_id
        self._started = self._last_line = time.monotonic()
        self._last_write = float("-inf")
        self._base = 0
        self._beat = 0
        self._is_answering = False
        self._live = LiveView(console) if console and console.is_terminal and not label else None

    def say(self, message: str) -> None:
        """Show one line on what goes on now."""
        if self._live is not None:
            self._live.say(message)
        else:
            self._print(message)

    def begin(self, counts: Counts) -> None:
        """Take what is committed now as what was there before."""
        self._base = counts.done
        self.update(counts)

    def update(self, counts: Counts) -> None:
        """Show the counts, and write them down when it is time."""
        if counts.replicas and not self._is_answering:
            self._is_answering = True
            self.say(f"{self._label}answering")
        if not self._is_answering:
            self._started = time.monotonic()  # a rate over the start of Ray would say nothing
        done = counts.done
        rate = (done - self._base) / max(1e-9, time.monotonic() - self._started)
        left_s = (counts.planned - done) / rate if rate > 0 else None
        about = _about(counts, rate, left_s)
        if self._live is not None:
            self._live.show(done, counts.planned, about)
        elif time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            self._print(f"{self._label}{done:,} of {counts.planned:,} documents, {about}")
        if time.monotonic() - self._last_write >= WRITE_INTERVAL_S:
            self._write("running", counts, rate, left_s)

    def end(self, state: str, counts: Counts) -> None:
        """Take the live view away and write the last counts; leaving does the former alone."""
        self._close()
        self._write(state, counts, 0.0, None)

    def __enter__(self) -> "ProgressView":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _print(self, line: str) -> None:
        if self._console:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        logger.info("%s", line, extra={"job": self._run_id})

    def _write(self, state: str, counts: Counts, rate: float, left_s: float | None) -> None:
        self._last_write = time.monotonic()
        self._beat += 1
        values = {
            "run_id": self._run_id,
            "state": state,
            "beat": self._beat,
            **asdict(counts),
            "documents_per_s": round(rate, 2),
            "seconds_left": None if left_s is None else round(left_s),
        }
        # News, not results: the next write tries again, and commits check storage themselves.
        with suppress(StorageError, FileExistsError):
            replace_always(self._sink, PROGRESS_PATH, json.dumps(values, indent=2).encode())


def read_progress(sink: Storage) -> dict[str, Any] | None:
    """Return the last progress as plain data, if a run ever began here."""
    try:
        data, _ = sink.read(PROGRESS_PATH)
    except FileNotFoundError:
        return None
    values: dict[str, Any] = json.loads(data)
    return values


def default_console() -> Console:
    """Return the terminal's standard error, so that standard output stays free for data."""
    return Console(file=sys.stderr)


class LiveView:
    """What a terminal shows while a run goes on: what is being done, how far, how fast.

    Two lines that fit 80 columns, redrawn in place and gone at the end.
    """

    def __init__(self, console: Console) -> None:
        self._spinner = Spinner("dots")
        self._bar = ProgressBar(width=BAR_WIDTH)
        self._message = self._done = self._about = ""
        self._live = Live(console=console, transient=True, get_renderable=self._render)

    def say(self, message: str) -> None:
        """Show what is being done."""
        self._message = message
        self._live.start()

    def show(self, done: int, planned: int, about: str) -> None:
        """Show how far it is."""
        self._bar.update(completed=done, total=max(planned, done))
        self._done, self._about = f"{done:,} of {planned:,} documents", about

    def stop(self) -> None:
        """Take it away."""
        self._live.stop()

    def _render(self) -> RenderableType:
        self._spinner.update(text=self._message)
        if not self._done:
            return self._spinner
        line = Table.grid(padding=(0, 2))
        line.add_row(self._bar, self._done)
        return Group(self._spinner, line, Text(self._about))


def _about(counts: Counts, rate: float, left_s: float | None) -> str:
    words = [
        f"{rate:,.1f} documents/s",
        f"{counts.failed:,} failed",
        f"{counts.shards_committed:,} of {counts.shards_planned:,} shards committed",
    ]
    if left_s is not None:
        words.append(f"{duration(left_s)} left")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """Write a duration as a person would: `42 s`, `7 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
