"""Corpora and configs for tests of whole jobs."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from granite_ray.config import JobConfig, parse_config

WORDS = ["alpha", "beta", "river", "stone", "cloud", "engine", "garden", "window", "signal"]


def make_text(seed: int, num_words: int = 30) -> str:
    """A text that no other seed gives."""
    chooser = random.Random(seed)
    return f"Document {seed}. " + " ".join(chooser.choice(WORDS) for _ in range(num_words))


def write_corpus(folder: Path, *, num_files: int = 4, rows_per_file: int = 25) -> Path:
    """Write Parquet files with columns id, text and year."""
    for index in range(num_files):
        first = index * rows_per_file
        write_file(folder / f"part-{index:03d}.parquet", range(first, first + rows_per_file))
    return folder


def write_file(path: Path, seeds: Sequence[int], texts: Sequence[str | None] | None = None) -> None:
    """Write one Parquet file; document `d<seed>` has the text of its seed, or the one given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "id": [f"d{seed}" for seed in seeds],
            "text": pa.array(texts or [make_text(seed) for seed in seeds], pa.string()),
            "year": [2000 + seed % 20 for seed in seeds],
        }
    )
    pq.write_table(table, path, row_group_size=10)


def job_values(
    from_path: Path | str, to_path: Path | str, /, **sections: dict[str, Any]
) -> dict[str, Any]:
    """Plain data of a quick job on the fake engine; sections given are laid over the defaults."""
    values: dict[str, dict[str, Any]] = {
        "source": {"path": str(from_path), "id_column": "id", "documents_per_shard": 10},
        "task": {"kind": "summarize", "max_tokens": 24},
        "engine": {"backend": "fake"},
        "sink": {"path": str(to_path)},
        "job": {"lease_s": 4, "grace_s": 10, "scheduling_timeout_s": 60},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def make_config(
    from_path: Path | str, to_path: Path | str, /, **sections: dict[str, Any]
) -> JobConfig:
    """`job_values` as a config."""
    return parse_config(job_values(from_path, to_path, **sections))
