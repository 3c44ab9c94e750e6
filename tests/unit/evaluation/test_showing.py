"""What a person sees: the terminal at 80 columns, and one page that needs nothing else."""

import io
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
from rich.console import Console

from granite_ray.config import ClassifyConfig
from granite_ray.errors import ConfigError, StorageDeniedError
from granite_ray.evaluation.files import write_evaluation
from granite_ray.evaluation.findings import Evaluation, RowCounts
from granite_ray.evaluation.labels import score_labels
from granite_ray.evaluation.page import page
from granite_ray.evaluation.terminal import terminal_view
from tests.faulty_storage import MemoryStorage
from tests.unit.evaluation.outputs import NAMES, label_rows, label_table

FORGED = '<script>alert("1")</script>[red]&amp;'
VOID = {"meta"}


def evaluation_of(*, names: dict[str, str] | None = None, is_partial: bool = False) -> Evaluation:
    names = names or {name: name for name in NAMES}
    rows = label_rows(120)
    for row in rows:
        row["truth"] = names[row["truth"]]
        row["label"] = names.get(row.get("label", ""))
        row["scores"] = [
            {**score, "label": names[score["label"]]} for score in row.get("scores", [])
        ]
    config = ClassifyConfig(kind="classify", labels=tuple(names.values()), abstain_below=0.3)
    findings = score_labels(label_table(rows), "truth", config)
    return Evaluation(
        task="classify",
        truth="truth",
        sink="/data/out",
        checkpoint="tiny",
        fingerprint="ab" * 32,
        version="0.1.0",
        time="2026-01-31T12:00:00+00:00",
        is_partial=is_partial,
        rows=RowCounts(1234, 4, 1230, 1200, 20, 10),
        num_resamples=1000,
        confidence_level=0.95,
        seed=0,
        findings=findings,
    )


def told(evaluation: Evaluation, *, width: int = 80, is_terminal: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=is_terminal)
    console.print(terminal_view(evaluation))
    return file.getvalue()


class Balanced(HTMLParser):
    """Reads a page; every element that is opened must be closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Balanced:
    reader = Balanced()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_the_terminal_shows_the_figures_with_their_intervals_in_80_columns() -> None:
    evaluation = evaluation_of()
    words = told(evaluation)
    accuracy = evaluation.metrics["accuracy"]
    assert (
        f"accuracy               {accuracy.value:.3f}  {accuracy.low:.3f} to {accuracy.high:.3f}"
        in words
    )
    assert "1,230 rows: 1,200 answered, 20 abstained, 10 failed; 4 without truth left out" in words
    assert "A failed or abstained row counts as wrong" in words
    assert "1,000 bootstrap resamples" in words
    assert max(map(len, words.splitlines())) <= 80
    assert "Partial" not in words


def test_a_colored_terminal_says_the_same() -> None:
    evaluation = evaluation_of()
    colored = told(evaluation, is_terminal=True)
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == told(evaluation)


def test_both_say_that_results_are_partial() -> None:
    evaluation = evaluation_of(is_partial=True)
    for words in (told(evaluation), unescape(page(evaluation))):
        assert "Partial: the job's first run is not complete." in words


def test_labels_are_shown_as_they_are_and_never_as_markup() -> None:
    names = {name: f"{name}{FORGED}" for name in NAMES}
    evaluation = replace(evaluation_of(names=names), truth=FORGED, sink=FORGED, checkpoint=FORGED)
    reader = read(page(evaluation))
    assert "script" not in reader.seen
    shown = "".join(reader.text)
    assert all(name in shown for name in names.values())
    assert "alpha<script>" in told(evaluation, width=200)
    assert "[red]" in told(evaluation, width=200)


def test_the_page_needs_nothing_outside_it_and_runs_nothing() -> None:
    html = page(evaluation_of())
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script|\son\w+=", html)
    assert "default-src 'none'" in html


def test_the_page_draws_reliability_and_coverage_in_light_and_dark() -> None:
    evaluation = evaluation_of()
    html = page(evaluation)
    reader = read(html)
    num_bins = len(evaluation.findings.tables["reliability"].rows)
    assert reader.seen.count("rect") == num_bins
    [points] = re.findall(r'<polyline class="curve" points="([^"]+)"', html)
    assert len(points.split()) == len(evaluation.findings.curves["coverage"])
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_a_page_without_confidence_has_no_plots() -> None:
    evaluation = evaluation_of()
    metrics = {"chrf": evaluation.metrics["accuracy"]}
    plain = replace(evaluation.findings, tables={}, curves={}, metrics=metrics)
    reader = read(page(replace(evaluation, findings=plain)))
    assert "rect" not in reader.seen
    assert "figure" not in reader.seen


def test_both_files_replace_those_of_the_last_evaluation() -> None:
    storage = MemoryStorage()
    write_evaluation(storage, evaluation_of(is_partial=True))
    evaluation = evaluation_of()
    places = write_evaluation(storage, evaluation)
    assert places == ["memory/evaluation.json", "memory/evaluation.html"]
    assert storage.read("evaluation.json")[0].decode() == evaluation.to_json()
    assert storage.read("evaluation.html")[0].decode() == page(evaluation)


class SealedStorage(MemoryStorage):
    root = "/sealed"

    def read(self, path: str) -> tuple[bytes, str]:
        raise StorageDeniedError(f"{path} is denied.")


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out() -> None:
    with pytest.raises(
        ConfigError, match=r"/sealed cannot be written: evaluation.json is denied. Choose .*--out"
    ):
        write_evaluation(SealedStorage(), evaluation_of())
