"""The output folder as one run holds it: lease, what it is of, snapshot, report."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from granite_ray.config import JobConfig
from granite_ray.errors import (
    ConfigError,
    ConflictError,
    GraniteRayError,
    LeaseError,
    StorageDeniedError,
    StorageError,
)
from granite_ray.io.commit import (
    JOB_PATH,
    RESULTS_FOLDER,
    Generation,
    Snapshot,
    SnapshotFile,
    delete_probes,
    delete_superseded,
    probe_put_if_absent,
    read_snapshot,
    write_snapshot,
)
from granite_ray.io.lease import Lease
from granite_ray.io.storage import Storage
from granite_ray.report import RunReport, replace_always, write_report


@dataclass(slots=True)
class HeldOutput:
    """An output that this run alone may write."""

    sink: Storage
    lease: Lease
    report: RunReport
    generation: Generation = field(default_factory=lambda: Generation(""))
    snapshot: Snapshot | None = None
    is_claimed: bool = False
    _stored: dict[str, Any] | None = None

    def look(self, config: JobConfig, fingerprint: str, *, restart: bool = False) -> None:
        """Find out what is there, and which generation of answers this run would write.

        Raises:
            ConflictError: If it holds answers to another question.
        """
        self._stored = read_job(self.sink)
        self.generation = _generation(
            self._stored, config, fingerprint, self.sink.root, restart=restart
        )
        self.snapshot = read_snapshot(self.sink)
        self.report.fingerprint = fingerprint

    def claim(self, config: JobConfig) -> None:
        """Make the output this job's. A run that is refused must not come here: it writes nothing.

        Raises:
            ConfigError: If the storage cannot commit exactly once, or may not be written.
        """
        probe_put_if_absent(self.sink, self.lease.run_id)
        values = {
            "fingerprint": self.generation.fingerprint,
            "generation": self.generation.number,
            "config": config.dump(),
        }
        if values != self._stored:
            replace_always(self.sink, JOB_PATH, json.dumps(values, indent=2).encode())
        self.is_claimed = True

    def complete(self, files: Iterable[SnapshotFile], source_root: str) -> None:
        """Make these files the results, and delete every other."""
        new = Snapshot(
            run_id=self.lease.run_id,
            fingerprint=self.generation.fingerprint,
            generation=self.generation.number,
            source_root=source_root,
            files=tuple(sorted(files, key=lambda file: file.path)),
            version=self.snapshot.version if self.snapshot else None,
        )
        if not _is_same(self.snapshot, new):
            write_snapshot(self.sink, new, self.lease.check)
        self.report.shards.superseded = delete_superseded(self.sink, new, self.lease.check)
        delete_probes(self.sink)
        for folder in ("", RESULTS_FOLDER, "_granite"):
            self.sink.sweep(folder)


@contextmanager
def hold_output(
    sink: Storage, report: RunReport, lease_s: float, say: Callable[[str], None]
) -> Iterator[HeldOutput]:
    """Hold the lease of an output; write the report however the run ends.

    Raises:
        LeaseError: If another run holds it; nothing is written then.
        ConfigError: If the storage refuses to be written.
        StorageError: If it fails, which may pass.
    """
    lease = Lease(sink, report.run_id, lease_s)
    try:
        lease.acquire(lambda holder: say(f"waiting to see whether {holder} is still alive"))
    except StorageDeniedError as error:
        raise ConfigError(f"sink.path {sink.root} cannot be written: {error}") from error
    output = HeldOutput(sink, lease, report)
    try:
        yield output
    except BaseException as error:
        report.exit_code = error.exit_code if isinstance(error, GraniteRayError) else 1
        report.error = str(error) if isinstance(error, GraniteRayError) else type(error).__name__
        raise
    finally:
        _write_last_words(output)


def _write_last_words(output: HeldOutput) -> None:
    """Write the report and let go; a storage that is gone must not hide why the run ended."""
    try:
        try:
            if output.is_claimed:
                output.lease.check()
                write_report(output.sink, output.report)
        finally:
            output.lease.release()
    except LeaseError:
        pass  # what stands there now is a successor's
    except (StorageError, FileExistsError):
        if output.report.exit_code in (0, 3):
            raise


def read_job(sink: Storage) -> dict[str, Any] | None:
    """Return what the output says it is of: fingerprint, generation and config."""
    try:
        data, _ = sink.read(JOB_PATH)
    except FileNotFoundError:
        return None
    values: dict[str, Any] = json.loads(data)
    return values


def _generation(
    stored: Mapping[str, Any] | None,
    config: JobConfig,
    fingerprint: str,
    root: str,
    *,
    restart: bool,
) -> Generation:
    if stored is None:
        return Generation(fingerprint)
    if restart:
        return Generation(fingerprint, stored["generation"] + 1)
    if stored["fingerprint"] != fingerprint:
        changed = changed_fields(stored["config"], config.dump())
        raise ConflictError(
            f"{root} holds answers of another fingerprint ({changed or 'the checkpoint'} changed). "
            "Use another sink.path, or --restart to answer every document again."
        )
    return Generation(fingerprint, stored["generation"])


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name the fields that differ in the sections that decide the answers."""
    return ", ".join(
        f"{section}.{name}"
        for section in ("task", "chunking", "model")
        for name in sorted({*old[section], *new[section]})
        if old[section].get(name) != new[section].get(name)
    )


def _is_same(old: Snapshot | None, new: Snapshot) -> bool:
    return old is not None and (old.files, old.generation, old.fingerprint, old.source_root) == (
        new.files,
        new.generation,
        new.fingerprint,
        new.source_root,
    )
