"""What an evaluation found, as plain records, and as JSON. No document text is ever in it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure with its interval; None where it is not defined, as precision without answers."""

    value: float | None
    low: float | None
    high: float | None
    about: str


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in rows. A terminal shows the first `num_shown` of them, a page all."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    num_shown: int = 0

    def records(self) -> list[dict[str, Cell]]:
        """Return each row as a mapping of column to cell."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True)
class Findings:
    """What a task's measures say of the rows that have a truth.

    `curves` are points (x, y), both between 0 and 1. `notes` say how the rows were counted.
    """

    metrics: Mapping[str, Metric]
    tables: Mapping[str, Table] = field(default_factory=dict)
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    num_abstained: int = 0


@dataclass(frozen=True, slots=True)
class RowCounts:
    """`total = without_truth + measured`, and `measured = answered + abstained + failed`."""

    total: int
    without_truth: int
    measured: int
    answered: int
    abstained: int
    failed: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The quality of a job's results against one column of truth.

    `is_partial` says that the job's first run was not complete when its rows were read. Intervals
    are percentiles of a bootstrap over documents.
    """

    task: str
    truth: str
    sink: str
    checkpoint: str
    fingerprint: str
    version: str
    time: str
    is_partial: bool
    rows: RowCounts
    num_resamples: int
    confidence_level: float
    seed: int
    findings: Findings

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The figures by name."""
        return self.findings.metrics

    def to_json(self) -> str:
        """Return it as JSON text; what is not defined is null."""
        values: dict[str, Any] = asdict(self)
        findings = values.pop("findings")
        values["bootstrap"] = {
            name: values.pop(name) for name in ("num_resamples", "confidence_level", "seed")
        }
        values["notes"] = findings["notes"]
        values["metrics"] = findings["metrics"]
        values["tables"] = {name: table.records() for name, table in self.findings.tables.items()}
        values["curves"] = findings["curves"]
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)


def defined(value: float) -> float | None:
    """Return a figure as plain data: None for one that is not defined."""
    return None if math.isnan(value) else float(value)
