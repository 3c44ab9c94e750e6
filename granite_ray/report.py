"""What a run did, as counts: `report.json` and the closing words in the terminal.

No document text is ever in it.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from granite_ray.io.commit import SnapshotFile
from granite_ray.io.storage import Storage

REPORT_PATH = "_granite/report.json"
LIBRARIES = ("granite-ray", "ray", "pyarrow", "tokenizers", "transformers", "torch", "llguidance")


@dataclass(slots=True)
class ShardCounts:
    """Shards of the plan, and what became of them."""

    planned: int = 0
    committed: int = 0
    reused: int = 0
    superseded: int = 0


@dataclass(slots=True)
class DocumentCounts:
    """The ledger: `input = ok + failed = generated + reused + already_committed`."""

    input: int = 0
    ok: int = 0
    failed: int = 0
    generated: int = 0
    reused: int = 0
    already_committed: int = 0

    @property
    def is_balanced(self) -> bool:
        """Whether every input document is in exactly one row."""
        by_origin = self.generated + self.reused + self.already_committed
        return self.input == self.ok + self.failed == by_origin


@dataclass(slots=True)
class RunReport:
    """What a run did. `exit_code` is the truth that Ray's job status cannot show."""

    run_id: str
    task: str
    checkpoint: str
    sink: str
    exit_code: int = 1
    error: str | None = None
    fingerprint: str = ""
    model_calls: int = 0
    shards: ShardCounts = field(default_factory=ShardCounts)
    documents: DocumentCounts = field(default_factory=DocumentCounts)
    failures: Counter[str] = field(default_factory=Counter)
    bad_files: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "completion": 0})
    seconds: dict[str, float] = field(default_factory=dict)
    worker_deaths: int = 0
    storage_retries: int = 0
    started: float = field(default_factory=time.monotonic, repr=False)
    versions: dict[str, str] = field(
        default_factory=lambda: {name: version(name) for name in LIBRARIES}
    )

    @property
    def total_s(self) -> float:
        """Seconds since the run began."""
        return round(time.monotonic() - self.started, 3)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how many seconds something took."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - started, 3)

    def add_file(self, file: SnapshotFile) -> None:
        """Count the rows of one committed file."""
        self.documents.ok += file.num_ok
        self.documents.failed += file.num_failed
        self.failures.update(file.failures)
        self.bad_files.update(file.bad_files)
        self.tokens["prompt"] += file.num_prompt_tokens
        self.tokens["completion"] += file.num_completion_tokens

    def to_json(self) -> str:
        """Return it as JSON text."""
        values = asdict(self)
        del values["started"]
        values["seconds"]["total"] = self.total_s
        values["failures"] = dict(sorted(self.failures.items()))
        return json.dumps(values, indent=2)


def write_report(storage: Storage, report: RunReport) -> None:
    """Put the report beside the results, replacing the last run's."""
    replace_always(storage, REPORT_PATH, report.to_json().encode())


def replace_always(storage: Storage, path: str, data: bytes) -> None:
    """Replace a file whatever its version; only the holder of the lease writes here."""
    try:
        current: str | None = storage.info(path).version
    except FileNotFoundError:
        current = None
    storage.replace(path, data, current)


def read_report(storage: Storage) -> dict[str, Any] | None:
    """Return the last report as plain data, if there is one."""
    try:
        data, _ = storage.read(REPORT_PATH)
    except FileNotFoundError:
        return None
    values: dict[str, Any] = json.loads(data)
    return values


# for people ──────────────────────────────────────────────────────────────────────────────────────

HEADLINES: Mapping[int, tuple[str, str]] = {
    0: ("green", "Done: every document has its row."),
    3: ("yellow", "Done: every document has its row; some could not be answered."),
    4: ("red", "Too many documents failed (job.max_failed_fraction)."),
}


def closing_words(report: RunReport) -> RenderableType:
    """Return the closing summary: what was done, what failed and why, how to read the results."""
    color, headline = HEADLINES.get(report.exit_code, ("red", report.error or "Stopped."))
    parts: list[RenderableType] = [
        Text(headline, style=f"bold {color}"),
        Padding(_counts(report), (0, 2)),
    ]
    if report.failures:
        parts.append(Padding(_failures(report), (0, 2)))
    if report.bad_files:
        parts.append(
            Text(f"{len(report.bad_files)} unreadable input files were skipped:", style="yellow")
        )
        parts += [
            Text(f"  {path}: {reason}") for path, reason in sorted(report.bad_files.items())[:5]
        ]
    parts.append(_how_to_read(report))
    return Group(*parts)


def _counts(report: RunReport) -> Table:
    table = Table.grid(padding=(0, 3))
    documents, shards = report.documents, report.shards
    seconds = report.seconds.get("generate", 0.0)
    rate = (
        f", {documents.generated / seconds:,.1f} a second"
        if seconds and documents.generated
        else ""
    )
    table.add_row(
        "Documents", f"{documents.input:,} in = {documents.ok:,} ok + {documents.failed:,} failed"
    )
    table.add_row(
        "",
        f"{documents.generated:,} answered now{rate}, {documents.reused:,} reused, "
        f"{documents.already_committed:,} there already",
    )
    table.add_row("Shards", f"{shards.planned:,}, {shards.committed:,} committed now")
    table.add_row(
        "Tokens", f"{report.tokens['prompt']:,} in prompts, {report.tokens['completion']:,} written"
    )
    table.add_row("Model", f"{report.checkpoint}, {report.model_calls:,} calls")
    table.add_row("Time", f"{report.total_s:,.1f} s")
    if report.worker_deaths:
        table.add_row("Workers", f"{report.worker_deaths} died and were replaced")
    return table


def _failures(report: RunReport) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
    for error_type, count in report.failures.most_common():
        table.add_row("failed", Text(error_type, style="yellow"), f"{count:,}")
    return table


def _how_to_read(report: RunReport) -> RenderableType:
    lines = [
        Text(f"Results in {report.sink}; read them with", style="bold"),
        Text(f'  python: granite_ray.read_results("{report.sink}").to_pandas()'),
        Text(f"  duckdb: SELECT * FROM '{report.sink}/results/*.parquet'"),
    ]
    if report.documents.failed:
        lines.append(Text(f"  again:  granite-ray redrive {report.sink}   (the failed rows only)"))
    return Group(*lines)
