"""Show what the quickstart job wrote: some rows beside the truth, and how often they agree."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from granite_ray.io.results import read_results

NUM_SHOWN = 8
COLUMNS = {"package": 18, "synopsis": 24, "truth": 11, "label": 11, "confidence": 10}
"""Columns and their widths: 80 characters together."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print a sample of the results in the folder that is given."""
    (path,) = sys.argv[1:] if argv is None else argv
    rows = read_results(path).to_pylist()
    console = Console()
    console.print(_sample(rows))
    right = sum(row["label"] == row["section"] for row in rows)
    labels = len({row["section"] for row in rows})
    console.print(
        f"{right:,} of {len(rows):,} labels agree with the archive's own section "
        f"({right / len(rows):.1%}; drawing lots among {labels} gives {1 / labels:.1%}).\n"
        "The embedded checkpoint has random weights so far: the job is real, its answers are not.",
        highlight=False,
    )


def _sample(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Some of the rows", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, width in COLUMNS.items():
        table.add_column(name, overflow="ellipsis", no_wrap=True, max_width=width)
    step = max(1, len(rows) // NUM_SHOWN)
    for row in rows[::step][:NUM_SHOWN]:
        confidence = f"{row['confidence']:.3f}" if row["confidence"] is not None else ""
        table.add_row(row["document_id"], row["synopsis"], row["section"], row["label"], confidence)
    return table


if __name__ == "__main__":
    main()
