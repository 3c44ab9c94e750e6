"""What a run did, as counts: `report.json` and the closing words in the terminal.

No document text is ever in it.
"""

import json
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

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
    engine: dict[str, int] = field(default_factory=dict)
    """What the engine was asked in this run, by all jobs that shared its pass: prompt tokens, and
    those of them that it had computed before."""
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
MAX_SHOWN_FILES = 5


def closing_words(report: RunReport) -> Text:
    """Return the closing summary: what was done, what failed and why, how to read the results.

    Lines are as long as they are: a path or a query that is broken in two cannot be copied.
    """
    color, headline = HEADLINES.get(report.exit_code, ("red", report.error or "Stopped."))
    if report.exit_code == 0 and report.documents.failed:
        headline = HEADLINES[3][1]  # --allow-failed
    words = Text(headline, style=f"bold {color}")
    for label, value in _facts(report):
        words.append(f"\n  {label:<11}", style="not bold default")
        words.append(value, style="not bold default")
    words.append(f"\nResults in {report.sink}; read them with", style="bold default")
    for label, value in _ways_to_read(report):
        words.append(f"\n  {label:<11}{value}", style="not bold default")
    return words


def _facts(report: RunReport) -> Iterator[tuple[str, str]]:
    documents, shards = report.documents, report.shards
    yield (
        "Documents",
        f"{documents.input:,} in = {documents.ok:,} ok + {documents.failed:,} failed",
    )
    yield (
        "",
        f"{documents.generated:,} answered now{_rate(report)}, {documents.reused:,} reused, "
        f"{documents.already_committed:,} there already",
    )
    for error_type, count in report.failures.most_common():
        yield "Failed", f"{count:,} {error_type}"
    for index, (path, reason) in enumerate(sorted(report.bad_files.items())):
        if index < MAX_SHOWN_FILES:
            yield "Skipped", f"{path}: {reason}"
    if len(report.bad_files) > MAX_SHOWN_FILES:
        yield "", f"and {len(report.bad_files) - MAX_SHOWN_FILES:,} more files, in {REPORT_PATH}"
    yield "Shards", f"{shards.planned:,}, {shards.committed:,} committed now"
    tokens = report.tokens
    yield "Tokens", f"{tokens['prompt']:,} in prompts, {tokens['completion']:,} written"
    if report.engine.get("cached_prompt_tokens"):
        asked, cached = report.engine["prompt_tokens"], report.engine["cached_prompt_tokens"]
        yield "", f"{cached:,} of {asked:,} prompt tokens were computed before"
    yield "Model", f"{report.checkpoint}, {report.model_calls:,} calls"
    if report.worker_deaths:
        yield "Workers", f"{report.worker_deaths:,} died and were replaced"
    if report.storage_retries:
        yield "Storage", f"{report.storage_retries:,} calls had to be repeated"
    yield "Time", f"{report.total_s:,.1f} s"


def _rate(report: RunReport) -> str:
    seconds, generated = report.seconds.get("generate", 0.0), report.documents.generated
    return f" ({generated / seconds:,.1f} a second)" if seconds and generated else ""


def _ways_to_read(report: RunReport) -> Iterator[tuple[str, str]]:
    yield "python", f"granite_ray.read_results({json.dumps(report.sink)}).to_pandas()"
    pattern = f"{report.sink}/results/*.parquet".replace("'", "''")
    yield "duckdb", f"SELECT * FROM '{pattern}'"
    if report.documents.failed:
        yield "again", f"granite-ray redrive {shlex.quote(report.sink)}   (failed rows only)"
