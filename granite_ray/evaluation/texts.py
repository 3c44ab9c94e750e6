"""Texts against a reference: ROUGE-1, ROUGE-2, ROUGE-L (Lin 2004) and chrF2 (Popović 2015)."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from granite_ray.errors import ConfigError
from granite_ray.evaluation.bootstrap import Floats, estimate, ratio
from granite_ray.evaluation.findings import Findings
from granite_ray.evaluation.truths import references_of

ABOUTS = {
    "rouge_1": "F1 of words",
    "rouge_2": "F1 of pairs of words",
    "rouge_l": "F1 of the longest common subsequence",
    "chrf": "chrF2, character n-grams; 1 is best",
}
ScoreText = Callable[[str, str], tuple[float, ...]]
"""Reference and answer → the figures of `ABOUTS`, each between 0 and 1."""


def score_texts(rows: pa.Table, truth: str, column: str) -> Findings:
    """Measure one text a document, that of `column`.

    Raises:
        ConfigError: The truth column holds no text, or the extra `eval` is not installed.
    """
    references = references_of(rows, truth)
    answers = rows[column].to_pylist()
    score_text = _load_scorer()
    scores = np.array(
        [
            score_text(reference, answer) if answer else (0.0,) * len(ABOUTS)
            for reference, answer in zip(references, answers, strict=True)
        ]
    )

    def measure(weights: Floats) -> dict[str, Floats]:
        means = ratio(weights @ scores, np.full(len(ABOUTS), weights.sum()))
        return dict(zip(ABOUTS, means, strict=True))

    estimates = estimate(measure, rows.num_rows)
    return Findings(
        metrics={name: estimates[name].metric(about) for name, about in ABOUTS.items()},
        notes=(
            "Each figure is the mean of the documents' own; a failed row scores 0.",
            "ROUGE reads lower-cased words of a-z and 0-9, without stemming.",
            *_notes(references),
        ),
    )


def _load_scorer() -> ScoreText:
    try:  # an extra that few installations need: it is looked for where it is used
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        name = (error.name or "one of them").partition(".")[0]
        raise ConfigError(
            f"Texts are measured with rouge-score and sacrebleu, and {name} is not "
            "installed. Run: pip install 'granite-ray[eval]'"
        ) from error
    rouge, chrf = RougeScorer(["rouge1", "rouge2", "rougeL"]), CHRF()

    def score_text(reference: str, answer: str) -> tuple[float, ...]:
        by_name = rouge.score(reference, answer)
        rouges = (by_name[name].fmeasure for name in ("rouge1", "rouge2", "rougeL"))
        return (*rouges, chrf.sentence_score(answer, [reference]).score / 100)

    return score_text


def _notes(references: Sequence[str]) -> list[str]:
    number = sum(map(_is_foreign_to_rouge, references))
    if not number:
        return []
    return [f"{number:,} references are mostly not in a-z: read chrF for them, not ROUGE."]


def _is_foreign_to_rouge(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return sum(not letter.isascii() for letter in letters) * 2 > len(letters)
