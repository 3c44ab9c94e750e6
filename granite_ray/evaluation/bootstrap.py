"""Figures with intervals, by drawing the documents anew.

A measure is a function of the documents' weights. All weights 1 give the figure itself; how often
each document comes up in a draw of as many, with replacement, gives one figure of the bootstrap
(Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13: percentile intervals).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from granite_ray.evaluation.findings import Metric, defined

NUM_RESAMPLES = 1000
CONFIDENCE_LEVEL = 0.95
SEED = 0

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]
Measure = Callable[[Floats], Mapping[str, Floats]]
"""Weights, one a document → figures by name, each one number or an array of them."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, or an array of them, with the ends of its interval; NaN is not defined."""

    value: Floats
    low: Floats
    high: Floats

    def metric(self, about: str) -> Metric:
        """Return it, a single figure, as a metric."""
        value, low, high = (defined(float(one)) for one in (self.value, self.low, self.high))
        return Metric(value, low, high, about)


def estimate(measure: Measure, num_documents: int) -> dict[str, Estimate]:
    """Return every figure of a measure with its interval; the same documents give the same."""
    generator = np.random.default_rng(SEED)
    values = measure(np.ones(num_documents))
    samples: dict[str, list[Floats]] = {name: [] for name in values}
    for _ in range(NUM_RESAMPLES):
        drawn = generator.integers(num_documents, size=num_documents)
        weights = np.bincount(drawn, minlength=num_documents).astype(np.float64)
        for name, value in measure(weights).items():
            samples[name].append(value)
    return {name: _estimate(value, np.array(samples[name])) for name, value in values.items()}


def _estimate(value: Floats, samples: Floats) -> Estimate:
    """Read the interval off the samples (resamples first); those not defined do not count."""
    flat = samples.reshape(len(samples), -1)
    ends = np.full((2, flat.shape[1]), np.nan)
    is_defined = ~np.isnan(flat).all(axis=0)
    tail = (1 - CONFIDENCE_LEVEL) / 2 * 100
    if is_defined.any():
        ends[:, is_defined] = np.nanpercentile(flat[:, is_defined], [tail, 100 - tail], axis=0)
    low, high = ends.reshape(2, *samples.shape[1:])
    return Estimate(np.asarray(value), low, high)


def ratio(part: ArrayLike, whole: ArrayLike) -> Floats:
    """Divide; not defined where the whole is nothing."""
    parts, wholes = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    result: Floats = np.full(parts.shape, np.nan)
    np.divide(parts, wholes, out=result, where=wholes > 0)
    return result


def mean_of_defined(values: Floats) -> Floats:
    """Average over those that are defined; not defined where none is."""
    is_defined = ~np.isnan(values)
    return ratio(np.where(is_defined, values, 0.0).sum(), is_defined.sum())


def share(weights: Floats, is_counted: Bools) -> Floats:
    """Return the weighted share of the documents that count."""
    return ratio(weights @ is_counted, weights.sum())
