"""An evaluation as one page: nothing outside it is needed, and everything in it is escaped."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from granite_ray.evaluation.findings import Evaluation, Table
from granite_ray.evaluation.wording import PARTIAL, counts, headline, notes, shown, spoken

WIDTH, HEIGHT = 320, 240
"""Of a plot's square of figures between 0 and 1, in SVG units."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a plot, in SVG units; `about` comes up under the pointer."""

    x: float
    y: float
    width: float
    height: float
    about: str


def page(evaluation: Evaluation) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("granite_ray.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "spoken": spoken}
    findings = evaluation.findings
    return environment.get_template("page.html.jinja").render(
        evaluation=evaluation,
        headline=headline(evaluation),
        partial=PARTIAL if evaluation.is_partial else None,
        counts=counts(evaluation),
        notes=list(notes(evaluation)),
        tables=[table for table in findings.tables.values() if table.rows],
        width=WIDTH,
        height=HEIGHT,
        reliability=_bars(findings.tables.get("reliability")),
        curve=_line(findings.curves.get("coverage", ())),
        here=_point_now(evaluation),
    )


def _bars(table: Table | None) -> list[Bar]:
    """Return a bar for each bin of confidence, as high as its accuracy."""
    return list(_each_bar(table)) if table else []


def _each_bar(table: Table) -> Iterator[Bar]:
    for cells in table.rows:
        start, stop, number, confidence, accuracy = (float(cell or 0) for cell in cells)
        yield Bar(
            x=_x(start) + 1,
            y=_y(accuracy),
            width=_x(stop) - _x(start) - 2,
            height=max(HEIGHT - _y(accuracy), 1),  # none is not nothing: it must be seen
            about=f"{number:,.0f} answers, mean confidence {confidence:.3f}, "
            f"accuracy {accuracy:.3f}",
        )


def _line(points: Sequence[tuple[float, float]]) -> str:
    """Return points as an SVG polyline takes them."""
    return " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in points)


def _point_now(evaluation: Evaluation) -> tuple[float, float] | None:
    """Return where the job as configured stands on the coverage curve."""
    metrics = evaluation.metrics
    if "accuracy_of_answered" not in metrics:
        return None
    coverage, accuracy = metrics["coverage"].value, metrics["accuracy_of_answered"].value
    return None if coverage is None or accuracy is None else (_x(coverage), _y(accuracy))


def _x(share: float) -> float:
    return round(share * WIDTH, 1)


def _y(share: float) -> float:
    return round((1 - share) * HEIGHT, 1)
