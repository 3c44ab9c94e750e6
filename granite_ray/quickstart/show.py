"""Show what a quickstart job wrote: some rows beside source and truth, and how good all are."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from granite_ray.config import JobConfig
from granite_ray.evaluation import Evaluation, Metric, evaluate
from granite_ray.evaluation.files import DEFAULT_FOLDER, write_evaluation
from granite_ray.evaluation.wording import counts, shown, spoken
from granite_ray.io.results import read_results
from granite_ray.io.storage import open_storage
from granite_ray.job import EMBEDDED_SOURCES

NUM_SHOWN = 4
LONGEST_SHOWN = 330
"""Characters of a source: a sample is read, not searched."""
TRUTHS = {"classify": "section", "summarize": "synopsis", "extract": "truth"}
"""The column of each job that holds what a right answer is."""
BASELINES = {
    "accuracy": "right ones; TF-IDF and a linear model: 0.741",
    "top_3_accuracy": "right ones among the first three; 0.880",
    "rouge_l": "F1 of the longest common subsequence; first sentence: 0.291",
}
"""What simple methods reach on all clean held-out packages, told beside the model's figures."""
FIGURES = (
    *("accuracy", "macro_f1", "top_3_accuracy", "calibration_error"),
    *("rouge_1", "rouge_l", "chrf"),
    *("micro_f1", "exact_records", "evidence_exact"),
)


def show(config: JobConfig, console: Console) -> None:
    """Print a sample of a quickstart job's rows and its figures; write the whole evaluation."""
    rows = read_results(config.sink.path).to_pylist()
    evaluation = evaluate(config, TRUTHS[config.task.kind])
    console.print(_sample(rows, config))
    console.print(_figures(evaluation))
    sink = open_storage(f"{config.sink.path}/{DEFAULT_FOLDER}")
    *_, page = write_evaluation(sink, evaluation)
    console.print(f"All figures, with plots: {page}\n", style="dim", soft_wrap=True)


def _sample(rows: Sequence[dict[str, Any]], config: JobConfig) -> Group:
    texts = _texts(config)
    short = [row for row in rows if len(texts[row["document_id"]]) <= LONGEST_SHOWN]
    step = max(1, len(short) // NUM_SHOWN)
    parts: list[RenderableType] = []
    for row in short[step // 2 :: step][:NUM_SHOWN]:
        parts.append(Text(texts[row["document_id"]].strip(), style="dim"))
        parts.append(_answer(row, config.task.kind))
    return Group(*parts)


def _texts(config: JobConfig) -> dict[str, str]:
    """Return the source texts by document id."""
    [name] = config.source.path
    columns = [config.source.id_column, config.source.text_column]
    source = pq.read_table(EMBEDDED_SOURCES[name], columns=columns)
    return dict(zip(*source.to_pydict().values(), strict=True))


def _answer(row: dict[str, Any], kind: str) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", min_width=12)
    grid.add_column()
    for name, value in _lines(row, kind):
        grid.add_row(name, value)
    grid.add_row("", "")
    return grid


def _lines(row: dict[str, Any], kind: str) -> Iterator[tuple[str, Text]]:
    if row["status"] == "failed":
        yield "failed", Text(row["error_message"], style="red")
    elif kind == "classify":
        yield "archive", Text(row["section"])
        best = [f"{score['label']} {score['probability']:.2f}" for score in row["scores"][:3]]
        yield "model", _judged(", ".join(best), is_right=row["label"] == row["section"])
    elif kind == "summarize":
        yield "archive", Text(row["synopsis"])
        yield "model", _judged(row["summary"], is_right=row["summary"] == row["synopsis"])
    else:
        for name, value in row["fields"].items():
            words = ", ".join(value) if isinstance(value, list) else value or ""
            yield name, _judged(words, is_right=value == row["truth"][name])


def _judged(answer: str, *, is_right: bool) -> Text:
    return Text(answer, style="green" if is_right else "yellow")


def _figures(evaluation: Evaluation) -> Group:
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for name, metric in evaluation.metrics.items():
        if name in FIGURES:
            grid.add_row(spoken(name), _figure(metric), BASELINES.get(name, metric.about))
    return Group(Text(counts(evaluation), style="bold"), grid)


def _figure(metric: Metric) -> Text:
    interval = "" if metric.low is None else f" ({metric.low:.3f} to {shown(metric.high)})"
    return Text.assemble((shown(metric.value), "bold"), (interval, "dim"))
