"""Intervals against the textbook's, and weights against rows that really are repeated."""

import math

import numpy as np
import pytest

from granite_ray.evaluation.agreement import Agreement, Values
from granite_ray.evaluation.bootstrap import Floats, estimate, mean_of_defined, ratio, share
from granite_ray.evaluation.confidence import Calibration


@pytest.mark.parametrize(("num_documents", "rate"), [(400, 0.5), (2000, 0.9), (50, 0.3)])
def test_a_shares_interval_is_near_the_normal_one(num_documents: int, rate: float) -> None:
    is_right = np.arange(num_documents) < rate * num_documents
    found = estimate(lambda weights: {"share": share(weights, is_right)}, num_documents)["share"]
    half = 1.96 * math.sqrt(rate * (1 - rate) / num_documents)
    assert float(found.value) == pytest.approx(rate)
    assert float(found.low) == pytest.approx(rate - half, abs=0.15 * half)
    assert float(found.high) == pytest.approx(rate + half, abs=0.15 * half)


def test_documents_are_drawn_whole() -> None:
    """Ten values that share a document are one piece of news, not ten."""
    documents = np.repeat(np.arange(100), 10)
    is_right = documents % 2 == 0

    def measure(weights: Floats) -> dict[str, Floats]:
        return {"share": ratio(weights[documents] @ is_right, weights[documents].sum())}

    found = estimate(measure, 100)["share"]
    assert float(found.high - found.low) == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


def test_the_same_documents_give_the_same_interval() -> None:
    is_right = np.arange(90) % 3 == 0
    first, again = (
        estimate(lambda weights: {"share": share(weights, is_right)}, 90) for _ in range(2)
    )
    assert first == again


def test_a_figure_that_is_sometimes_not_defined_has_the_interval_of_the_other_times() -> None:
    is_one = np.arange(40) == 7
    figures = estimate(
        lambda weights: {"rare": ratio(weights @ is_one, weights @ is_one), "never": ratio(0, 0)},
        40,
    )
    assert [float(one) for one in (figures["rare"].low, figures["rare"].high)] == [1, 1]
    assert figures["never"].metric("").low is figures["never"].metric("").value is None


def test_what_is_divided_by_nothing_is_not_defined() -> None:
    assert ratio(1, 4) == 0.25
    assert np.isnan(ratio(0, 0))
    assert mean_of_defined(np.array([0.5, np.nan, 1.0])) == 0.75
    assert np.isnan(mean_of_defined(np.array([np.nan])))


@pytest.mark.parametrize("num_groups", [6, 60])  # kept as a matrix, and counted
def test_a_weight_counts_a_document_as_often_as_it_says(num_groups: int) -> None:
    generator = np.random.default_rng(5)
    weights = generator.integers(4, size=30)
    sets = [generator.integers(num_groups, size=size) for size in (80, 70)]
    truths, answers = (
        np.unique(np.stack([generator.integers(30, size=len(groups)), groups], 1), axis=0)
        for groups in sets
    )
    hits = np.array(sorted(set(map(tuple, truths)) & set(map(tuple, answers))))

    def repeated(pairs: np.ndarray) -> Values:
        """Copy k of document d becomes document 100 k + d."""
        copies = [(100 * k + d, g) for d, g in pairs for k in range(weights[d])]
        return Values(*np.array(copies).T, shape=(400, num_groups))

    kinds = (truths, answers, hits)
    once = Agreement(*(Values(*pairs.T, shape=(30, num_groups)) for pairs in kinds))
    copied = Agreement(*map(repeated, kinds))
    expected = copied.figures(np.ones(400))
    for name, figure in once.figures(weights.astype(float)).items():
        assert figure == pytest.approx(expected[name], nan_ok=True), name


def test_the_calibration_error_weighs_documents_too() -> None:
    probabilities = np.array([0.05, 0.07, 0.9, 1.0, 1.0])
    is_true = np.array([False, True, True, True, False])
    one = Calibration(probabilities, is_true, np.arange(5), 5)
    weights = np.array([2.0, 0.0, 1.0, 3.0, 1.0])
    index = np.repeat(np.arange(5), weights.astype(int))
    copied = Calibration(probabilities[index], is_true[index], np.arange(7), 7)
    assert one.error(weights) == pytest.approx(float(copied.error(np.ones(7))))
    # By hand: bins [0, 1/15), [1/15, 2/15) is empty at weight 0, and the last for 0.9 and above
    # is [14/15, 1]; 0.9 lies in [13/15, 14/15).
    by_hand = (2 * 0.05 + 1 * 0.1 + abs(4 * 1.0 - 3)) / 7
    assert one.error(weights) == pytest.approx(by_hand)
