"""Labels against what scikit-learn 1.9 says of the same rows, and against counting by hand."""

import json

import numpy as np
import pyarrow as pa
import pytest

from granite_ray.config import ClassifyConfig
from granite_ray.errors import ConfigError
from granite_ray.evaluation.findings import Findings
from granite_ray.evaluation.label_sets import score_label_sets
from granite_ray.evaluation.labels import score_labels
from granite_ray.tasks.classify import Classify, ClassifyMulti
from tests.unit.evaluation.outputs import (
    NAMES,
    Row,
    label_rows,
    label_set_rows,
    label_set_table,
    label_table,
    table_of,
)

CONFIG = ClassifyConfig(kind="classify", labels=NAMES, abstain_below=0.3)
TREE = ClassifyConfig(kind="classify", labels={"a": ["x", "y"], "b": None})

FIGURES = {
    "accuracy": 0.66,  # accuracy_score, "<none>" where there is no label
    "macro_f1": 0.7225000801285117,  # f1_score(labels=NAMES, average="macro")
    "top_3_accuracy": 525 / 600,  # top_k_accuracy_score(k=3, normalize=False) of scored rows
    "coverage": 0.795,
    "accuracy_of_answered": 0.8301886792452831,  # accuracy_score of the rows with a label
    "calibration_error": 0.36809772033746363,  # calibration_curve(n_bins=15), by bin size
}
BY_LABEL = {  # precision_recall_fscore_support(labels=NAMES)
    "alpha": (143, 0.883495145631068, 0.6363636363636364, 0.7398373983739838),
    "beta": (132, 0.883495145631068, 0.6893939393939394, 0.774468085106383),
    "gamma": (152, 0.8793103448275862, 0.6710526315789473, 0.7611940298507462),
    "delta": (132, 0.826530612244898, 0.6136363636363636, 0.7043478260869566),
    "epsilon": (41, 0.543859649122807, 0.7560975609756098, 0.6326530612244898),
}
BINS = [  # calibration_curve: answers, mean confidence, accuracy
    (32, 0.25127871008589864, 0.4375),
    (131, 0.30359628455329485, 0.4961832061068702),
    (124, 0.36361388165143227, 0.7903225806451613),
    (134, 0.4321927879728488, 0.9104477611940298),
    (82, 0.4967458651560109, 0.926829268292683),
    (42, 0.5646198973769233, 0.9761904761904762),
    (15, 0.6191725492477417, 1.0),
    (3, 0.6747493147850037, 1.0),
    (1, 0.8198660016059875, 1.0),
]
SET_FIGURES = {
    "micro_f1": 0.6311926605504588,
    "micro_precision": 0.5723793677204659,
    "micro_recall": 0.7034764826175869,
    "macro_f1": 0.6298092672977849,
    "subset_accuracy": 0.17666666666666667,  # accuracy_score, failed rows wrong
    "calibration_error": 0.16056521706024954,
}


def figures(findings: Findings) -> dict[str, float | None]:
    return {name: metric.value for name, metric in findings.metrics.items()}


def score(rows: list[Row], config: ClassifyConfig = CONFIG) -> Findings:
    return score_labels(label_table(rows), "truth", config)


@pytest.fixture(scope="module")
def findings() -> Findings:
    return score(label_rows(600))


def test_figures_are_those_of_scikit_learn(findings: Findings) -> None:
    assert figures(findings) == pytest.approx(FIGURES, abs=1e-7)
    assert findings.num_abstained == 87


def test_labels_are_measured_as_scikit_learn_does(findings: Findings) -> None:
    found = {
        row["label"]: tuple(row[name] for name in ("true", "precision", "recall", "F1"))
        for row in findings.tables["labels"].records()
    }
    assert found.keys() == BY_LABEL.keys()
    for label, expected in BY_LABEL.items():
        assert found[label] == pytest.approx(expected), label


def test_reliability_bins_are_those_of_scikit_learn(findings: Findings) -> None:
    rows = findings.tables["reliability"].rows
    assert [row[2:] for row in rows] == [pytest.approx(bin_, abs=1e-6) for bin_ in BINS]
    assert all(row[0] <= row[3] <= row[1] for row in rows), "the mean lies in its bin"


def test_coverage_says_what_an_abstain_threshold_would_have_brought(findings: Findings) -> None:
    answered = [row for row in label_rows(600) if "scores" in row]
    bests = [row["scores"][0] for row in answered]
    tops = [
        (np.float32(best["probability"]), best["label"] == row["truth"])
        for best, row in zip(bests, answered, strict=True)
    ]
    rows = findings.tables["coverage"].records()
    assert len(rows) == 5
    for row in rows:
        kept = [is_right for top, is_right in tops if top >= row["abstain_below"]]
        assert row["coverage"] == pytest.approx(len(kept) / 600)
        assert row["accuracy"] == pytest.approx(sum(kept) / len(kept))
    assert findings.curves["coverage"][-1] == pytest.approx(
        (len(answered) / 600, sum(is_right for _, is_right in tops) / len(answered))
    )


def test_the_most_confused_pairs_are_counted(findings: Findings) -> None:
    pairs = [(row["truth"], row.get("label")) for row in label_rows(600)]
    wrong = [(truth, label) for truth, label in pairs if label not in (None, truth)]
    found = {row[:2]: row[2] for row in findings.tables["confusions"].rows}
    assert found == {pair: wrong.count(pair) for pair in set(wrong)}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    first = findings.tables["confusions"].records()[0]
    assert first["share of true"] == first["rows"] / BY_LABEL[first["true"]][0]


def test_failed_and_abstained_rows_are_wrong_and_counted() -> None:
    good = [row for row in label_rows(200) if row.get("label") == row["truth"]]
    bad: list[Row] = [{"truth": "beta", "status": "failed"}, {**good[0], "label": None}]
    found = score(good + bad)
    assert figures(found)["accuracy"] == pytest.approx(len(good) / (len(good) + 2))
    assert figures(found)["accuracy_of_answered"] == 1
    assert found.num_abstained == 1
    assert found.curves["coverage"][-1][0] == pytest.approx((len(good) + 1) / (len(good) + 2))


def test_where_every_row_failed_what_needs_an_answer_is_not_defined() -> None:
    found = figures(score([{"truth": "beta", "status": "failed"}] * 5))
    assert found["accuracy"] == found["coverage"] == found["top_3_accuracy"] == 0
    assert found["accuracy_of_answered"] is found["calibration_error"] is None


def test_a_true_label_that_the_task_lacks_counts_as_missed_and_is_told() -> None:
    rows = label_rows(100)
    found = score([*rows, {**rows[1], "truth": "omega"}])
    assert "1 true labels are none of task.labels; they count, as missed." in found.notes
    [omega] = [row for row in found.tables["labels"].records() if row["label"] == "omega"]
    assert (omega["true"], omega["answered"], omega["F1"]) == (1, 0, 0.0)


def test_a_column_of_other_values_is_refused_without_quoting_them() -> None:
    rows = [{**row, "truth": f"secret {index}"} for index, row in enumerate(label_rows(30))]
    with pytest.raises(ConfigError, match="none of the column's 30 distinct values") as refused:
        score(rows)
    assert "secret" not in str(refused.value)


def test_integers_are_labels_too() -> None:
    scores = [{"label": "1", "probability": 0.9}, {"label": "2", "probability": 0.1}]
    answer = {"label": "1", "confidence": 0.9, "scores": scores}
    rows = [{**answer, "truth": truth} for truth in (1, 2, 2, 1)]
    table = table_of(Classify.output_fields, rows, pa.int64())
    config = ClassifyConfig(kind="classify", labels=("1", "2"))
    assert figures(score_labels(table, "truth", config))["accuracy"] == 0.5


def tree_row(truth: str, *, label: str | None) -> Row:
    """`a` at 0.6, below it x at 0.35 and y at 0.25; `b` at 0.4, likelier than what is chosen."""
    scores = {"a": 0.6, "b": 0.4, "a/x": 0.35, "a/y": 0.25}
    return {
        "truth": truth,
        "label": label,
        "confidence": 0.35,
        "scores": [{"label": name, "probability": share} for name, share in scores.items()],
    }


@pytest.mark.parametrize("label", ["a/x", None])
def test_in_a_tree_an_abstained_row_would_have_had_the_end_of_its_path(label: str | None) -> None:
    found = score([tree_row("a/x", label=label)] * 3 + [tree_row("b", label=label)], TREE)
    assert found.curves["coverage"] == ((1.0, 0.75),)
    assert figures(found)["accuracy"] == (0.75 if label else 0)
    assert "top_3_accuracy" not in figures(found), "of three leaves all are among the first three"


def test_label_sets_have_the_figures_of_scikit_learn() -> None:
    found = score_label_sets(label_set_table(label_set_rows(300)), "truth", CONFIG)
    assert figures(found) == pytest.approx(SET_FIGURES, abs=1e-7)
    numbers = [row["true"] for row in found.tables["labels"].records()]
    assert numbers == sorted([90, 96, 101, 109, 93], reverse=True)


def test_a_failed_row_is_wrong_as_a_set_also_where_nothing_is_true() -> None:
    rows: list[Row] = [
        {"truth": ["alpha"], "labels": ["alpha"], "scores": []},
        {"truth": [], "labels": [], "scores": []},
        {"truth": [], "status": "failed"},
    ]
    found = figures(score_label_sets(label_set_table(rows), "truth", CONFIG))
    assert found["subset_accuracy"] == pytest.approx(2 / 3)
    assert found["micro_f1"] == 1
    assert found["calibration_error"] is None


def test_label_sets_may_be_json_text_and_repeat_a_label() -> None:
    rows = label_set_rows(60)
    texts = [json.dumps(row["truth"] * 2) for row in rows]
    with_text = [{**row, "truth": text} for row, text in zip(rows, texts, strict=True)]
    as_text = table_of(ClassifyMulti.output_fields, with_text, pa.string())
    found = score_label_sets(as_text, "truth", CONFIG)
    assert found.metrics == score_label_sets(label_set_table(rows), "truth", CONFIG).metrics


@pytest.mark.parametrize(
    ("truth", "value", "wanted"),
    [
        (pa.string(), "alpha", "the value of document 'd0' is not a JSON list"),
        (pa.string(), '{"a": 1}', "the value of document 'd0' is not a JSON list"),
        (pa.float64(), 1.0, "the column is double. For this task it must be a list of text"),
    ],
)
def test_what_is_no_set_of_labels_is_refused(
    truth: pa.DataType, value: object, wanted: str
) -> None:
    row = {"truth": value, "labels": [], "scores": []}
    table = table_of(ClassifyMulti.output_fields, [row], truth)
    with pytest.raises(ConfigError, match=wanted):
        score_label_sets(table, "truth", CONFIG)


def test_the_order_of_rows_and_their_chunks_do_not_matter() -> None:
    rows = label_rows(120)
    whole = label_table(rows)
    pieces = pa.concat_tables([whole.slice(0, 50), label_table(rows[50:90]), whole.slice(90)])
    turned = label_table(rows[::-1])
    expected = figures(score_labels(whole, "truth", CONFIG))
    for table in (pieces, turned):
        assert figures(score_labels(table, "truth", CONFIG)) == pytest.approx(expected)
