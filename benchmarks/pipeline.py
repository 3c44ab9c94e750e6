"""What the pipeline keeps of two engines of a known speed: Ray, reading, preparing and committing.

    python benchmarks/pipeline.py [--documents 20000] [--replicas 2] [--rate 500]

Every document has about 300 tokens of the embedded tokenizer. The fake engine answers `--rate`
documents a second in each replica, so that together they offer `rate * replicas`; what is kept of
it is measured from the first commit to the last. CPU seconds say what bounds it on a small machine.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from granite_ray.io.commit import read_snapshot
from granite_ray.io.storage import open_storage
from granite_ray.job import QUICKSTART_CORPUS
from granite_ray.tokenizer import load_tokenizer

CHECKPOINT = QUICKSTART_CORPUS.parent / "checkpoint"
TOKENS_PER_DOCUMENT = 300


def write_corpus(folder: Path, num_documents: int) -> None:
    """Write documents of about 300 tokens from the embedded corpus, no two alike."""
    tokenizer = load_tokenizer(str(CHECKPOINT))
    texts = pq.read_table(QUICKSTART_CORPUS, columns=["text"])["text"].to_pylist()
    token_ids = [token for text in texts for token in tokenizer.encode_text(text + " ")]
    made = []
    for index in range(num_documents):
        start = index * 37 % (len(token_ids) - TOKENS_PER_DOCUMENT)
        made.append(f"{index}: {tokenizer.decode(token_ids[start : start + TOKENS_PER_DOCUMENT])}")
    folder.mkdir(parents=True)
    for start in range(0, num_documents, 5000):
        part = made[start : start + 5000]
        ids = [str(index) for index in range(start, start + len(part))]
        table = pa.table({"id": ids, "text": part})
        pq.write_table(table, folder / f"{start:08d}.parquet", row_group_size=500)


def run(source: Path, sink: Path, engine: dict[str, object]) -> dict[str, float]:
    """Run the job in a process of its own; return what it took."""
    config = {
        "source": {"path": str(source), "id_column": "id"},
        "task": {"kind": "summarize", "max_tokens": 16},
        "model": {"path": "quickstart"},
        "engine": {"backend": "fake", **engine},
        "sink": {"path": str(sink)},
    }
    path = sink.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run([sys.executable, "-m", "granite_ray.cli", "run", str(path)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    commits = sorted(file.stat().st_mtime for file in (sink / "results").iterdir())
    snapshot = read_snapshot(open_storage(str(sink)))
    assert snapshot is not None
    rows = [file.num_ok + file.num_failed for file in snapshot.files]
    report = json.loads((sink / "_granite" / "report.json").read_text())
    tokens = report["tokens"]["prompt"] + report["tokens"]["completion"]
    return {
        "documents": sum(rows),
        "tokens_per_document": tokens / sum(rows),
        "start_up_s": commits[0] - started,
        "streaming_s": commits[-1] - commits[0],
        "documents_per_s": (sum(rows) - max(rows)) / (commits[-1] - commits[0]),
        "driver_cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rate", type=float, default=500.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_corpus(work / "probe", 1000)
        write_corpus(work / "corpus", arguments.documents)
        probe = run(work / "probe", work / "out-probe", {})
        speed = arguments.rate * probe["tokens_per_document"]
        engine = {"fake_tokens_per_s": speed, "num_replicas": arguments.replicas}
        measured = run(work / "corpus", work / "out", engine)
    offered = arguments.rate * arguments.replicas
    for name, value in measured.items():
        print(f"{name:22} {value:12,.1f}")
    print(f"{'offered documents/s':22} {offered:12,.1f}")
    print(f"kept: {measured['documents_per_s'] / offered:.1%} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
