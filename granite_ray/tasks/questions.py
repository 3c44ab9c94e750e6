"""A question with a fixed list of answers: their log-probabilities for each chunk, combined.

Nothing is generated: the engine scores every answer after one prompt.
"""

import asyncio
from collections.abc import Sequence

from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import LLM, Chunk, Document, Prompt
from granite_ray.tasks.base import MeteredLLM, gather_all, gather_chunks
from granite_ray.tasks.labels import combine_chunks, mean_log_probabilities
from granite_ray.tasks.prompts import Filling, PromptTemplate, chunk_filling
from granite_ray.tasks.templates import TokenizedText
from granite_ray.tokenizer import Tokenizer

CONTENT_FREE = ("", "N/A", "[MASK]")
"""Texts that say nothing: what answers get for them is the model's prejudice."""

ScoredChunk = tuple[Chunk, list[list[float]]]
"""A chunk and, for each question, the log-probability of each of its choices."""


class Question:
    """One prompt and the answers that it can have.

    Every choice ends with the end-of-text token, so that none is the beginning of another.
    """

    def __init__(
        self,
        template: PromptTemplate,
        choices: Sequence[str],
        tokenizer: Tokenizer,
        *,
        is_calibrated: bool,
    ) -> None:
        self.template = template
        self.choices = tuple(choices)
        end = tokenizer.eos_token_ids[0]
        self._choice_ids = [(*tokenizer.encode_text(choice), end) for choice in choices]
        self.max_answer_tokens = max(len(token_ids) for token_ids in self._choice_ids)
        self._content_free = _content_free(template, tokenizer) if is_calibrated else []
        self._prior: list[float] | None = None if is_calibrated else [0.0] * len(choices)
        self._prior_lock = asyncio.Lock()

    async def score(self, prompt: Prompt, llm: LLM) -> list[float]:
        """Return the log-probability of each choice after `prompt`."""
        return await llm.score(prompt, self._choice_ids)

    async def prior(self, llm: LLM) -> list[float]:
        """Return the choices' log-probabilities without a document; asked for once in all.

        A lock, not a shared future: if the document that asks first is cancelled, the next asks.
        """
        async with self._prior_lock:
            if self._prior is None:
                calls = [self.score(prompt, llm) for prompt in self._content_free]
                self._prior = mean_log_probabilities(await gather_all(calls))
        return self._prior


async def score_chunks(
    questions: Sequence[Question],
    document: Document,
    chunks: Sequence[Chunk],
    llm: MeteredLLM,
    max_failed_chunks: int,
) -> list[ScoredChunk]:
    """Ask all questions of each chunk; chunks that failed are left out."""

    async def score(chunk: Chunk) -> ScoredChunk:
        filling = chunk_filling(document, chunk)
        calls = [question.score(question.template.fill(filling), llm) for question in questions]
        return chunk, await gather_all(calls)

    scored = await gather_chunks([score(chunk) for chunk in chunks], llm, max_failed_chunks)
    return [one for one in scored if one is not None]


async def combine(
    questions: Sequence[Question], scored: Sequence[ScoredChunk], llm: MeteredLLM
) -> list[list[float]]:
    """Return, for each question, its choices' probabilities for the whole document."""
    weights = [len(chunk.token_ids) for chunk, _ in scored]
    probabilities = []
    for index, question in enumerate(questions):
        # Unmetered: which document asks first is chance, and must not show in its row.
        prior = await question.prior(llm.unmetered)
        probabilities.append(combine_chunks([rows[index] for _, rows in scored], weights, prior))
    return probabilities


def _content_free(template: PromptTemplate, tokenizer: Tokenizer) -> list[Prompt]:
    try:
        return [
            template.fill(
                Filling(
                    TokenizedText(text, tokenizer.encode_text(text)),
                    dict.fromkeys(template.columns, text),
                )
            )
            for text in CONTENT_FREE
        ]
    except RowFailure as failure:
        raise ConfigError(
            f"task.calibration fills the template with texts such as 'N/A', but {failure.message}. "
            "Use task.calibration: none, or a template that takes text in every column."
        ) from failure
