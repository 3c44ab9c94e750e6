"""Texts, against figures by hand and a second chrF."""

import sys
from collections import Counter

import pyarrow as pa
import pytest

from granite_ray.errors import ConfigError
from granite_ray.evaluation.texts import score_texts
from tests.unit.evaluation.outputs import table_of

FIELD = pa.field("summary", pa.string())
PAIRS = [
    ("the cat sat on the mat", "the cat lay on the mat"),
    ("the cat sat on the mat", "mat the on"),
    ("a list of packages, sorted", "A list of packages (sorted)."),
    ("granite", "ray"),
]
ROUGES = {  # by hand: F1 of words, of pairs, of the longest common subsequence
    "rouge_1": [5 / 6, 2 * 3 / (6 + 3), 1.0, 0.0],
    "rouge_2": [2 * 3 / (5 + 5), 0.0, 1.0, 0.0],
    "rouge_l": [5 / 6, 2 * 2 / (6 + 3), 1.0, 0.0],
}


def chrf(reference: str, answer: str) -> float:
    """chrF2 as Popović (2015) defines it: n-grams of 1 to 6 characters without white space."""
    texts = ["".join(text.split()) for text in (reference, answer)]
    precisions, recalls = [], []
    for size in range(1, 7):
        wanted, given = (
            Counter(text[start : start + size] for start in range(len(text) - size + 1))
            for text in texts
        )
        if wanted and given:
            hits = (wanted & given).total()
            precisions.append(hits / given.total())
            recalls.append(hits / wanted.total())
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def texts_table(pairs: list[tuple[str, str | None]]) -> pa.Table:
    rows = [
        {"truth": truth, "summary": answer, "status": "failed" if answer is None else "ok"}
        for truth, answer in pairs
    ]
    return table_of([FIELD], rows, pa.string())


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_one_text_has_the_figures_that_counting_by_hand_gives(index: int) -> None:
    found = score_texts(texts_table([PAIRS[index]]), "truth", "summary").metrics
    for name, expected in ROUGES.items():
        assert found[name].value == pytest.approx(expected[index]), name
    assert found["chrf"].value == pytest.approx(chrf(*PAIRS[index]))


def test_a_figure_is_the_mean_over_documents_and_a_failed_row_scores_nothing() -> None:
    found = score_texts(texts_table([*PAIRS, ("the cat", None), ("dog", "")]), "truth", "summary")
    for name, expected in ROUGES.items():
        assert found.metrics[name].value == pytest.approx(sum(expected) / 6), name
    expected_chrf = sum(chrf(*pair) for pair in PAIRS) / 6
    assert found.metrics["chrf"].value == pytest.approx(expected_chrf)
    low, high = found.metrics["rouge_1"].low, found.metrics["rouge_1"].high
    assert low is not None
    assert high is not None
    assert 0 <= low < sum(ROUGES["rouge_1"]) / 6 < high <= 1


def test_rouge_is_said_to_be_blind_to_other_scripts() -> None:
    japanese = ("今日は良い天気", "今日は良い天気")
    found = score_texts(texts_table([*PAIRS, japanese]), "truth", "summary")
    assert "1 references are mostly not in a-z: read chrF for them, not ROUGE." in found.notes
    alone = score_texts(texts_table([japanese]), "truth", "summary")
    assert (alone.metrics["rouge_1"].value, alone.metrics["chrf"].value) == (0, 1)


@pytest.mark.parametrize("library", ["rouge_score", "sacrebleu"])
def test_a_missing_library_is_named_with_the_way_to_it(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"{library} is not installed.*granite-ray\[eval\]"):
        score_texts(texts_table(PAIRS), "truth", "summary")


def test_a_column_that_is_no_text_is_refused() -> None:
    table = table_of([FIELD], [{"truth": 1.5, "summary": "a"}], pa.float64())
    with pytest.raises(ConfigError, match="the column is double"):
        score_texts(table, "truth", "summary")
