"""What an evaluation says in words; the terminal and the page say the same."""

from collections.abc import Iterator

from granite_ray.evaluation.findings import Cell, Evaluation

PARTIAL = "Partial: the job's first run is not complete."
PROPER_NAMES = {
    "f1": "F1",
    "rouge l": "ROUGE-L",
    "rouge ": "ROUGE-",
    "chrf": "chrF",
    "top ": "top-",
}


def headline(evaluation: Evaluation) -> str:
    """Say what was measured, in one line."""
    return f"{evaluation.task} by {evaluation.checkpoint}, against {evaluation.truth}"


def counts(evaluation: Evaluation) -> str:
    """Say what became of every row."""
    rows = evaluation.rows
    abstained = f"{rows.abstained:,} abstained, " if rows.abstained else ""
    left_out = f"; {rows.without_truth:,} without truth left out" if rows.without_truth else ""
    return (
        f"{rows.measured:,} rows: {rows.answered:,} answered, {abstained}"
        f"{rows.failed:,} failed{left_out}"
    )


def notes(evaluation: Evaluation) -> Iterator[str]:
    """Yield how rows were counted, and where the intervals come from."""
    yield from evaluation.findings.notes
    yield (
        f"Intervals: {evaluation.confidence_level:.0%}, by percentiles of "
        f"{evaluation.num_resamples:,} bootstrap resamples of the documents "
        f"(seed {evaluation.seed})."
    )


def shown(cell: Cell) -> str:
    """Write a figure: shares with three digits, counts with thousands; nothing for no figure."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def spoken(name: str) -> str:
    """Write a figure's name as a person would."""
    words = name.replace("_", " ")
    for plain, proper in PROPER_NAMES.items():
        words = words.replace(plain, proper)
    return words
