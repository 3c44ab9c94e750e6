"""Log-probabilities of labels → probabilities: plain arithmetic on lists of floats."""

import math
from collections.abc import Sequence


def log_softmax(scores: Sequence[float]) -> list[float]:
    """Turn scores into log-probabilities that sum to one."""
    total = _log_sum_exp(scores)
    return [score - total for score in scores]


def combine_chunks(
    scores: Sequence[Sequence[float]], num_tokens: Sequence[int], prior: Sequence[float]
) -> list[float]:
    """Return the labels' probabilities for a whole document.

    Args:
        scores: For each chunk, the log-probability of each label.
        num_tokens: The weight of each chunk.
        prior: The log-probability of each label without a document, which is divided out.
    """
    total = sum(num_tokens)
    combined = [-log_probability for log_probability in prior]
    for chunk_scores, weight in zip(scores, num_tokens, strict=True):
        for index, log_probability in enumerate(log_softmax(chunk_scores)):
            combined[index] += log_probability * weight / total
    return [math.exp(log_probability) for log_probability in log_softmax(combined)]


def mean_log_probabilities(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return the logarithm of the mean probability of each label over several prompts."""
    rows = [log_softmax(row) for row in scores]
    return [_log_sum_exp(column) - math.log(len(rows)) for column in zip(*rows, strict=True)]


def _log_sum_exp(scores: Sequence[float]) -> float:
    top = max(scores)  # taken out first: the exponential of a score like -800 is zero
    return top + math.log(sum(math.exp(score - top) for score in scores))
