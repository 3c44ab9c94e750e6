"""An evaluation as a person reads it in a terminal of 80 columns."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from granite_ray.evaluation.findings import Evaluation, Table
from granite_ray.evaluation.wording import PARTIAL, counts, headline, notes, shown, spoken

MAX_NAME_WIDTH = 24


def terminal_view(evaluation: Evaluation) -> Group:
    """Return the counts, the figures, the tables that a terminal shows, and the rules."""
    return Group(*_parts(evaluation))


def _parts(evaluation: Evaluation) -> Iterator[RenderableType]:
    yield Text(headline(evaluation), style="bold")
    if evaluation.is_partial:
        yield Text(PARTIAL, style="bold yellow")
    yield Text(counts(evaluation))
    yield Text()
    yield _metrics(evaluation)
    for table in evaluation.findings.tables.values():
        if table.rows and table.num_shown:
            yield Text()
            yield from _table(table)
    yield Text()
    for note in notes(evaluation):
        yield Text(note, style="dim")


def _metrics(evaluation: Evaluation) -> RichTable:
    grid = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    grid.add_column("", no_wrap=True)
    grid.add_column("figure", justify="right", no_wrap=True, style="bold")
    grid.add_column(f"{evaluation.confidence_level:.0%} interval", no_wrap=True)
    grid.add_column("", style="dim")
    for name, metric in evaluation.metrics.items():
        interval = "" if metric.low is None else f"{metric.low:.3f} to {shown(metric.high)}"
        grid.add_row(spoken(name), shown(metric.value), interval, Text(metric.about))
    return grid


def _table(table: Table) -> Iterator[RenderableType]:
    yield Text(table.title, style="bold")
    grid = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name, cell in zip(table.columns, table.rows[0], strict=True):
        is_text = isinstance(cell, str)
        grid.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=MAX_NAME_WIDTH if is_text else None,
        )
    for row in table.rows[: table.num_shown]:
        grid.add_row(*(Text(shown(cell)) for cell in row))
    yield grid
    if len(table.rows) > table.num_shown:
        yield Text(f"and {len(table.rows) - table.num_shown:,} more", style="dim")
