"""Labels by their likelihood: each label is scored after the prompt, and nothing is written.

Scores become probabilities over the labels; with `task.calibration: contextual` what labels get
without a document is divided out; chunks are combined by token-weighted log-probability.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from granite_ray.config import ClassifyConfig
from granite_ray.errors import ConfigError
from granite_ray.records import LLM, Chunk, Document, Result
from granite_ray.tasks.base import (
    MeteredLLM,
    TaskLimits,
    chunk_tokens,
    free_tokens,
    run_metered,
)
from granite_ray.tasks.prompts import PromptTemplate
from granite_ray.tasks.questions import Question, combine, score_chunks
from granite_ray.tasks.taxonomy import LabelLevel, Path, example_paths, label_levels, leaf_paths
from granite_ray.tasks.wording import DOCUMENT_FIRST, check_shows_text, prompt_words
from granite_ray.tokenizer import Tokenizer

DEFAULT_INSTRUCTION = "Classify the document."
DEFAULT_BAR = 0.5
"""Probability from which a label applies under `task.multi_label`."""

SCORES_FIELD = pa.field(
    "scores",
    pa.list_(pa.struct([pa.field("label", pa.string()), pa.field("probability", pa.float32())])),
)


class Classify:
    """One label a document, or a path of labels in a tree.

    `scores` holds the probability of every label that was looked at, best first: all of a flat
    list; in a tree those of each level along the chosen path.
    """

    kind = "classify"
    output_fields = (
        pa.field("label", pa.string()),  # null below `task.abstain_below`
        pa.field("confidence", pa.float32()),
        SCORES_FIELD,
    )

    def __init__(self, config: ClassifyConfig, tokenizer: Tokenizer, limits: TaskLimits) -> None:
        levels = label_levels(config.labels)
        examples = example_paths(config, levels)
        builder = _QuestionBuilder(config, tokenizer, limits, needs_instruction=len(levels) > 1)
        self._abstain_below = config.abstain_below
        self._max_failed_chunks = limits.max_failed_chunks
        self._questions = {
            path: builder.which_label(level, examples) for path, level in levels.items()
        }
        self.columns = self._questions[()].template.columns
        self.max_chunk_tokens = _longest_chunk(self._questions.values(), limits)

    async def run(self, document: Document, llm: LLM) -> Result:
        """Classify one document."""
        return await run_metered(document, llm, self._answer)

    async def _answer(self, document: Document, llm: MeteredLLM) -> Mapping[str, Any]:
        path: Path = ()
        confidence = 1.0
        scores: dict[str, float] = {}
        chunks: Sequence[Chunk] = document.chunks
        while path in self._questions:
            question = self._questions[path]
            scored = await score_chunks([question], document, chunks, llm, self._max_failed_chunks)
            [probabilities] = await combine([question], scored, llm)
            for name, probability in zip(question.choices, probabilities, strict=True):
                scores["/".join((*path, name))] = confidence * probability
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            path = (*path, question.choices[best])
            confidence *= probabilities[best]
            chunks = [chunk for chunk, _ in scored]
        label = "/".join(path) if confidence >= self._abstain_below else None
        return {"label": label, "confidence": confidence, "scores": _sorted_scores(scores)}


class ClassifyMulti:
    """Any number of labels a document: one yes or no for each label, or each leaf of a tree.

    `scores` holds the probability of yes for every label; they do not sum to one.
    """

    kind = "classify"
    output_fields = (pa.field("labels", pa.list_(pa.string())), SCORES_FIELD)

    def __init__(self, config: ClassifyConfig, tokenizer: Tokenizer, limits: TaskLimits) -> None:
        levels = label_levels(config.labels)
        examples = example_paths(config, levels)
        builder = _QuestionBuilder(config, tokenizer, limits, needs_instruction=True)
        self._bar = config.abstain_below or DEFAULT_BAR
        self._max_failed_chunks = limits.max_failed_chunks
        self._questions = {
            "/".join(path): builder.is_it(path, examples) for path in leaf_paths(levels)
        }
        self.columns = next(iter(self._questions.values())).template.columns
        self.max_chunk_tokens = _longest_chunk(self._questions.values(), limits)

    async def run(self, document: Document, llm: LLM) -> Result:
        """Classify one document."""
        return await run_metered(document, llm, self._answer)

    async def _answer(self, document: Document, llm: MeteredLLM) -> Mapping[str, Any]:
        questions = list(self._questions.values())
        chunks = document.chunks
        scored = await score_chunks(questions, document, chunks, llm, self._max_failed_chunks)
        probabilities = await combine(questions, scored, llm)
        scores = {
            label: yes for label, (yes, _) in zip(self._questions, probabilities, strict=True)
        }
        labels = [label for label, yes in scores.items() if yes >= self._bar]
        return {"labels": labels, "scores": _sorted_scores(scores)}


class _QuestionBuilder:
    """Words the questions of one classification."""

    def __init__(
        self,
        config: ClassifyConfig,
        tokenizer: Tokenizer,
        limits: TaskLimits,
        *,
        needs_instruction: bool,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._text_column = limits.text_column
        self._needs_instruction = needs_instruction
        if config.language:
            raise ConfigError(
                f"task.language is {config.language!r}, but classify writes nothing: labels stay "
                "as they are. Remove task.language."
            )

    def which_label(self, level: LabelLevel, examples: Sequence[Collection[Path]]) -> Question:
        """Ask which label of one level it is; an example shows its own label of that level."""
        depth = len(level.path)
        about = f" It is about {'/'.join(level.path)}." if level.path else ""
        names = "\n".join(f"- {name}" for name in level.names)
        ask = f"{about} Answer with exactly one of these labels:\n{names}"
        answers = [
            path[depth] if path[:depth] == level.path else None for [path] in map(tuple, examples)
        ]
        return self._question(ask, answers, level.names)

    def is_it(self, path: Path, examples: Sequence[Collection[Path]]) -> Question:
        """Ask whether one label applies."""
        ask = f" Does the label {'/'.join(path)!r} apply? Answer yes or no."
        answers = ["yes" if path in paths else "no" for paths in examples]
        return self._question(ask, answers, ("yes", "no"))

    def _question(
        self, ask: str, answers: Sequence[str | None], choices: Sequence[str]
    ) -> Question:
        """Put the question; examples without an answer to it are left out."""
        config = self._config
        pairs = zip(config.examples, answers, strict=True)
        words = prompt_words(
            config,
            (config.instruction or DEFAULT_INSTRUCTION) + ask,
            [(example.input, answer) for example, answer in pairs if answer is not None],
            self._text_column,
        )
        if config.multi_label and config.template is None:
            # The document is what a document's questions share: computed once, asked many times.
            words = replace(words, template=DOCUMENT_FIRST)
        template = PromptTemplate(words, self._tokenizer)
        check_shows_text(template)
        if self._needs_instruction and not template.shows_instruction:
            raise ConfigError(
                "task.template has no {{ instruction }}, which names the labels that are asked "
                "for. Write it into the template."
            )
        is_calibrated = config.calibration == "contextual"
        return Question(template, choices, self._tokenizer, is_calibrated=is_calibrated)


def _longest_chunk(questions: Iterable[Question], limits: TaskLimits) -> int:
    free = [
        free_tokens(limits, question.template.num_tokens, question.max_answer_tokens)
        for question in questions
    ]
    return chunk_tokens(limits, min(free))


def _sorted_scores(scores: Mapping[str, float]) -> list[dict[str, Any]]:
    best_first = sorted(scores.items(), key=lambda score: (-score[1], score[0]))
    return [{"label": label, "probability": probability} for label, probability in best_first]
