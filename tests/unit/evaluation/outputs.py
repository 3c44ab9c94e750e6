"""Rows as jobs write them, without running one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from granite_ray.config import JobConfig
from granite_ray.io.commit import (
    JOB_PATH,
    Generation,
    Snapshot,
    SnapshotFile,
    file_path,
    write_snapshot,
)
from granite_ray.io.sinks import CommitRecord, encode_shard
from granite_ray.records import output_schema
from granite_ray.tasks.classify import Classify, ClassifyMulti
from tests.faulty_storage import MemoryStorage

FINGERPRINT = "ab" * 32
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon")
Row = dict[str, Any]


def table_of(
    fields: Sequence[pa.Field], rows: Sequence[Mapping[str, Any]], truth: pa.DataType
) -> pa.Table:
    """Rows with a `truth` column kept; what is not given is as for an answered document."""
    common = {
        "status": "ok",
        "num_chunks": 1,
        "num_failed_chunks": 0,
        "num_prompt_tokens": 9,
        "num_completion_tokens": 1,
        "task": "any",
        "checkpoint": "tiny",
        "source_file": "a.parquet",
    }
    whole = [
        {**common, "document_id": f"d{index}", "source_row": index, **row}
        for index, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(whole, schema=output_schema(fields, [pa.field("truth", truth)]))


def write_output(
    storage: MemoryStorage, config: JobConfig, rows: pa.Table, *, is_complete: bool = True
) -> None:
    """Leave what a run leaves: its config, one committed file and, when complete, a snapshot."""
    job = {"fingerprint": FINGERPRINT, "generation": 0, "config": config.dump()}
    storage.replace(JOB_PATH, json.dumps(job).encode(), None)
    record = CommitRecord("shard", 0, FINGERPRINT, 0, "run", (), num_ok=rows.num_rows)
    path = file_path("shard", Generation(FINGERPRINT).tag, 0)
    storage.put_if_absent(path, encode_shard(rows, record).to_pybytes())
    if is_complete:
        files = (SnapshotFile.of(path, record),)
        snapshot = Snapshot("run", FINGERPRINT, 0, "in", files)
        write_snapshot(storage, snapshot, lambda: None)


def numbers() -> Iterator[int]:
    """Numbers that look drawn and are the same everywhere (Knuth's MMIX generator)."""
    state = 1
    while True:
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        yield state >> 40


def label_rows(num_rows: int, *, abstain_below: float = 0.3) -> list[Row]:
    """Answers of a fair classifier over `NAMES`; some abstain, every 17th failed."""
    drawn = numbers()
    rows: list[Row] = []
    for index in range(num_rows):
        truth = next(drawn) % (4 if index % 3 else 5)
        weights = [1 + next(drawn) % 1000 for _ in NAMES]
        weights[truth] += next(drawn) % 1500
        shares = {name: weight / sum(weights) for name, weight in zip(NAMES, weights, strict=True)}
        scores = sorted(shares.items(), key=lambda score: -score[1])
        label, confidence = scores[0]
        if index % 17 == 0:
            rows.append({"truth": NAMES[truth], "status": "failed"})
            continue
        rows.append(
            {
                "truth": NAMES[truth],
                "label": label if confidence >= abstain_below else None,
                "confidence": confidence,
                "scores": [{"label": name, "probability": share} for name, share in scores],
            }
        )
    return rows


def label_table(rows: Sequence[Row]) -> pa.Table:
    return table_of(Classify.output_fields, rows, pa.string())


def label_set_rows(num_rows: int, *, bar: float = 0.5) -> list[Row]:
    """Sets of `NAMES`, of 0 to 3 labels; every 13th row failed."""
    drawn = numbers()
    rows: list[Row] = []
    for index in range(num_rows):
        truth = [name for name in NAMES if next(drawn) % 3 == 0]
        shares = {name: (next(drawn) % 1000 + 450 * (name in truth)) / 1450 for name in NAMES}
        scores = sorted(shares.items(), key=lambda score: -score[1])
        answer = {
            "labels": [name for name, share in shares.items() if share >= bar],
            "scores": [{"label": name, "probability": share} for name, share in scores],
        }
        rows.append({"truth": truth, **({"status": "failed"} if index % 13 == 0 else answer)})
    return rows


def label_set_table(rows: Sequence[Row]) -> pa.Table:
    return table_of(ClassifyMulti.output_fields, rows, pa.list_(pa.string()))
