"""What grows with the corpus and what must not.

    python benchmarks/scale.py memory [--documents 5000]     driver and workers, N against 10 N
    python benchmarks/scale.py resume [--shards 10000]       a run over shards that are committed
    python benchmarks/scale.py shard [--megabytes 500]       one shard passes whole

All on the fake engine, so that what is measured is the pipeline.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from granite_ray import load_config, read_results
from granite_ray.cluster import Cluster
from granite_ray.io.commit import commit_shard, list_result_files, read_records
from granite_ray.io.storage import open_storage
from granite_ray.planning import plan_input

MIB = 1024**2
SENTENCE = "The committee approved the budget for the northern harbour after a long debate. "


def write_corpus(folder: Path, num_documents: int, characters: int, rows_per_file: int) -> None:
    """Write documents of the given length, no two alike."""
    folder.mkdir(parents=True)
    for start in range(0, num_documents, rows_per_file):
        stop = min(start + rows_per_file, num_documents)
        texts = [
            f"{index} {SENTENCE * (characters // len(SENTENCE) + 1)}"[:characters]
            for index in range(start, stop)
        ]
        ids = [str(index) for index in range(start, stop)]
        table = pa.table({"id": ids, "text": texts})
        pq.write_table(table, folder / f"{start:09d}.parquet", row_group_size=500)


def run(
    work: Path, source: dict[str, object], limit: int | None = None, **sections: dict[str, object]
) -> "Measured":
    """Run one job in a process of its own and watch the memory of all that it starts."""
    config = {
        "source": {"id_column": "id", **source},
        "task": {"kind": "summarize", "max_tokens": 16},
        "engine": {"backend": "fake"},
        "sink": {"path": str(work / "out")},
        **sections,
    }
    path = work / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "granite_ray.cli", "run", str(path)]
    process = subprocess.Popen(command + (["--limit", str(limit)] if limit else []))
    measured = Measured()
    watcher = threading.Thread(target=measured.watch, args=(process.pid,), daemon=True)
    watcher.start()
    assert process.wait() == 0
    measured.seconds = time.monotonic() - measured.started
    return measured


class Measured:
    """Wall time, and peak private memory by kind of process, in MiB."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds = 0.0
        self.peak: dict[str, float] = defaultdict(float)

    def watch(self, pid: int) -> None:
        """Sample until the driver is gone. Private memory: the object store is shared by all."""
        while psutil.pid_exists(pid):
            try:
                driver = psutil.Process(pid)
                self._note("driver", driver)
                for child in driver.children(recursive=True):
                    self._note(kind_of(child), child)
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.2)

    def _note(self, kind: str, process: psutil.Process) -> None:
        memory = process.memory_info()
        self.peak[kind] = max(self.peak[kind], (memory.rss - memory.shared) / MIB)


def kind_of(process: psutil.Process) -> str:
    """Name a process of Ray by what it does for the job."""
    words = " ".join(process.cmdline())
    for kind in ("ReplicaWorker", "read_and_prepare", "commit", "Journal"):
        if kind in words:
            return kind
    return "other"


def measure_memory(num_documents: int) -> None:
    for factor in (1, 10):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            write_corpus(work / "in", num_documents * factor, 1200, 5000)
            measured = run(work, {"path": str(work / "in")})
            print(f"{num_documents * factor:,} documents, {measured.seconds:.0f} s:", end=" ")
            kinds = ("driver", "read_and_prepare", "ReplicaWorker", "commit", "Journal")
            print(", ".join(f"{kind} {measured.peak[kind]:,.0f} MiB" for kind in kinds), flush=True)


def measure_resume(num_shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_corpus(work / "in", num_shards, 100, 2000)
        source = {"path": str(work / "in"), "documents_per_shard": 1}
        run(work, source, limit=1)
        commit_copies(work)
        resumed = run(work, source)
        print(f"{num_shards:,} shards committed, no snapshot yet: {resumed.seconds:.1f} s")
        again = run(work, source)
        print(f"again, all in the snapshot: {again.seconds:.1f} s, ", end="")
        print(f"driver {again.peak['driver']:.0f} MiB", flush=True)


def commit_copies(work: Path) -> None:
    """Commit every other shard of a plan as a copy of the one that a run has committed."""
    config = load_config(work / "job.yaml")
    sink = open_storage(config.sink.path)
    (file,) = list_result_files(sink)
    record = read_records(sink, [file.path])[file.path]
    rows = pq.read_table(work / "out" / file.path)
    plan = plan_input(config.source, [], open_storage, Cluster(config.job, config.engine))
    for shard in plan.shards:
        copied = replace(record, shard_id=shard.shard_id, parts=shard.parts)
        if shard.shard_id != record.shard_id:
            commit_shard(sink, rows, copied, file.tag, lambda: None)


def measure_shard(megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        num_documents = megabytes * 100
        write_corpus(work / "in", num_documents, MIB // 100, num_documents)
        source = {
            "path": str(work / "in"),
            "documents_per_shard": 10**9,
            "bytes_per_shard": 10**12,
        }
        measured = run(work, source, job={"scheduling_timeout_s": 3600})
        rows = read_results(str(work / "out"))
        assert rows.num_rows == num_documents
        assert len(list((work / "out" / "results").iterdir())) == 1
        print(f"one shard of {megabytes} MB, {num_documents:,} documents: {measured.seconds:.0f} s")
        for kind, peak in sorted(measured.peak.items()):
            print(f"  {kind:18} {peak:8,.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("memory").add_argument("--documents", type=int, default=5000)
    commands.add_parser("resume").add_argument("--shards", type=int, default=10_000)
    commands.add_parser("shard").add_argument("--megabytes", type=int, default=500)
    arguments = parser.parse_args()
    if arguments.what == "memory":
        measure_memory(arguments.documents)
    elif arguments.what == "resume":
        measure_resume(arguments.shards)
    else:
        measure_shard(arguments.megabytes)


if __name__ == "__main__":
    main()
