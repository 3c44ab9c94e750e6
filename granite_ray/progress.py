"""Counts while a job runs → a live line in a terminal (plain lines elsewhere) and progress.json."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from granite_ray.errors import StorageError
from granite_ray.io.storage import Storage
from granite_ray.report import replace_always

PROGRESS_PATH = "_granite/progress.json"
WRITE_INTERVAL_S = 5.0
LINE_INTERVAL_S = 10.0


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


class ProgressView:
    """Shows counts to a person and writes them beside the results.

    Args:
        console: Where to show them; None shows nothing.
        sink: Where `progress.json` goes.
    """

    def __init__(self, console: Console | None, sink: Storage, run_id: str) -> None:
        self._console = console
        self._sink = sink
        self._run_id = run_id
        self._started = self._last_line = time.monotonic()
        self._last_write = float("-inf")
        self._base = 0
        self._beat = 0
        self._bar = _bar(console) if console and console.is_terminal else None
        self._task_id = self._bar.add_task("starting", total=None, about="") if self._bar else None

    def say(self, message: str) -> None:
        """Show one line on what goes on now."""
        if self._bar is not None and self._task_id is not None:
            self._bar.start()
            self._bar.update(self._task_id, description=message)
        elif self._console:
            self._console.print(message, highlight=False)

    def begin(self, counts: Counts) -> None:
        """Start the clock of the rate: what is committed now was there before."""
        self._started, self._base = time.monotonic(), max(counts.committed, counts.answered)
        self.update(counts)

    def update(self, counts: Counts) -> None:
        """Show the counts, and write them down when it is time."""
        done = max(counts.committed, counts.answered)
        rate = (done - self._base) / max(1e-9, time.monotonic() - self._started)
        left_s = (counts.planned - done) / rate if rate > 0 else None
        about = _about(counts, rate, left_s)
        if self._bar is not None and self._task_id is not None:
            self._bar.update(
                self._task_id, completed=done, total=counts.planned or None, about=about
            )
        elif self._console and time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            self._console.print(f"{done:,}/{counts.planned:,} documents  {about}", highlight=False)
        if time.monotonic() - self._last_write >= WRITE_INTERVAL_S:
            self._write("running", counts, rate, left_s)

    def end(self, state: str, counts: Counts) -> None:
        """Take the live line away and write the last counts."""
        if self._bar is not None:
            self._bar.stop()
        self._write(state, counts, 0.0, None)

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


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[about]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _about(counts: Counts, rate: float, left_s: float | None) -> str:
    words = [f"{rate:,.1f} documents/s", f"{counts.failed:,} failed"]
    words.append(f"{counts.shards_committed:,}/{counts.shards_planned:,} shards")
    if left_s is not None:
        words.append(f"{duration(left_s)} left")
    return "  ".join(words)


def duration(seconds: float) -> str:
    """Write a duration as a person would: `42 s`, `7 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
