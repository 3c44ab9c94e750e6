"""Summaries: one pass where the document is one chunk, else a tree of partial summaries.

    chunks → partial summaries → merged, as many at a time as fit → … → one summary

What the model wrote about a document goes into the next prompt as plain text, like the document.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from granite_ray.config import SummarizeConfig
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import LLM, Chunk, Document, Grammar, Result
from granite_ray.tasks.answers import read_json, read_text
from granite_ray.tasks.base import (
    MeteredLLM,
    TaskLimits,
    chunk_tokens,
    free_tokens,
    gather_all,
    gather_chunks,
    run_metered,
    sampling_params,
)
from granite_ray.tasks.prompts import Filling, PromptTemplate, PromptWords, chunk_filling
from granite_ray.tasks.templates import TokenizedText
from granite_ray.tasks.wording import (
    check_shows_text,
    default_template,
    prompt_words,
    text_examples,
    with_language,
)
from granite_ray.tokenizer import Tokenizer

LENGTHS = {
    "sentence": "in one sentence",
    "short": "in about three sentences",
    "medium": "in one paragraph",
    "long": "in several paragraphs",
}
PREFACE = "What follows are summaries of consecutive parts of one document."
KEEP = "Keep the facts, names and numbers that a summary of the whole document needs."
PARTIAL = f"Summarize this part of a longer document in one paragraph. {KEEP}"
MERGE = f"{PREFACE} Merge them into one paragraph. {KEEP}"
POINTS = "List the {} most important points as a JSON array of strings, each one short sentence."

PARTS_TEMPLATE = "{{ instruction }}\n\n{{ text }}"
MAX_POINT_LENGTH = 200
"""Characters of a key point, at most: the list must end within `task.max_tokens`."""


class Summarize:
    """One summary a document, and key points where asked for."""

    kind = "summarize"
    output_fields = (
        pa.field("summary", pa.string()),
        pa.field("key_points", pa.list_(pa.string())),  # null where `task.key_points` is 0
    )

    def __init__(self, config: SummarizeConfig, tokenizer: Tokenizer, limits: TaskLimits) -> None:
        self._config = config
        self._max_failed_chunks = limits.max_failed_chunks
        words = prompt_words(
            config, _instruction(config), text_examples(config), limits.text_column
        )
        partial = _with_style(config, config.instruction or PARTIAL)
        points = with_language(config, POINTS.format(config.key_points))
        self._whole = PromptTemplate(words, tokenizer)
        self._partial = PromptTemplate(replace(words, instruction=partial, examples=()), tokenizer)
        self._points = PromptTemplate(
            PromptWords(default_template(config), points, system_prompt=config.system_prompt),
            tokenizer,
        )
        self._tree = _SummaryTree(config, tokenizer, limits, self._points.num_tokens)
        self._points_grammar = _points_grammar(config.key_points)
        check_shows_text(self._whole)
        self.columns = self._whole.columns
        templates = (self._whole, self._partial, self._points)
        free = free_tokens(limits, max(t.num_tokens for t in templates), config.max_tokens)
        self.max_chunk_tokens = chunk_tokens(limits, free)

    async def run(self, document: Document, llm: LLM) -> Result:
        """Summarize one document."""
        return await run_metered(document, llm, self._answer)

    async def _answer(self, document: Document, llm: MeteredLLM) -> Mapping[str, Any]:
        if len(document.chunks) == 1:
            shown = chunk_filling(document, document.chunks[0])
            summarize = self._whole
        else:
            partials = await self._summarize_chunks(document, llm)
            shown = await self._tree.merge(partials, document, llm)
            summarize = self._tree.final
        sampling = sampling_params(self._config, document, "summary", stop=summarize.stop)
        summary = read_text(await llm.generate(summarize.fill(shown), sampling))
        points = await self._list_points(shown, document, llm) if self._config.key_points else None
        return {"summary": summary, "key_points": points}

    async def _summarize_chunks(self, document: Document, llm: MeteredLLM) -> list[str]:
        async def summarize(chunk: Chunk) -> str:
            prompt = self._partial.fill(chunk_filling(document, chunk))
            stop = self._partial.stop
            sampling = sampling_params(self._config, document, "partial", chunk.index, stop)
            return read_text(await llm.generate(prompt, sampling))

        calls = [summarize(chunk) for chunk in document.chunks]
        partials = await gather_chunks(calls, llm, self._max_failed_chunks)
        return [partial for partial in partials if partial is not None]

    async def _list_points(
        self, shown: Filling, document: Document, llm: MeteredLLM
    ) -> Sequence[str]:
        sampling = sampling_params(self._config, document, "points")
        prompt = self._points.fill(shown)
        points = read_json(await llm.generate(prompt, sampling, self._points_grammar))
        if not (isinstance(points, list) and all(isinstance(point, str) for point in points)):
            raise RowFailure("schema_violation", "the key points are not a list of strings")
        return points


class _SummaryTree:
    """Merges partial summaries, round after round, until they fit into one prompt.

    It ends: no summary may take more than half of the room, so each round joins at least every
    two neighbours.
    """

    def __init__(
        self,
        config: SummarizeConfig,
        tokenizer: Tokenizer,
        limits: TaskLimits,
        num_points_tokens: int,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        merge = PromptWords(PARTS_TEMPLATE, _with_style(config, MERGE), (), config.system_prompt)
        instruction = with_language(config, f"{PREFACE} {_instruction(config)}")
        final = replace(merge, instruction=instruction)
        self._merge = PromptTemplate(merge, tokenizer)
        self.final = PromptTemplate(final, tokenizer)
        num_tokens = max(self._merge.num_tokens, self.final.num_tokens, num_points_tokens)
        self._room = free_tokens(limits, num_tokens, config.max_tokens)
        needed = 2 * (config.max_tokens + tokenizer.count(_part("")))
        if self._room < needed:
            raise ConfigError(
                f"task.max_tokens is {config.max_tokens}: two partial summaries of that length "
                f"take {needed} tokens to merge, and model.max_model_len ({limits.max_model_len}) "
                f"leaves {self._room}. Lower task.max_tokens or raise model.max_model_len."
            )

    async def merge(self, summaries: Sequence[str], document: Document, llm: MeteredLLM) -> Filling:
        """Return what is shown of the document in place of its text."""
        groups = self._pack(summaries)
        round_index = 0
        while len(groups) > 1:
            purpose = f"merge {round_index}"
            calls = [
                self._merge_group(group, document, llm, purpose, index)
                for index, group in enumerate(groups)
            ]
            groups = self._pack(await gather_all(calls))
            round_index += 1
        return Filling(_join(groups[0]))

    def _pack(self, summaries: Sequence[str]) -> list[list[TokenizedText]]:
        """Group neighbours, as many as fit into one prompt."""
        groups: list[list[TokenizedText]] = []
        room = 0
        for summary in summaries:
            # A text can take more tokens than were written: bytes that are not UTF-8 grow.
            token_ids = self._tokenizer.encode_text(_part(summary))[: self._room // 2]
            if len(token_ids) > room:
                groups.append([])
                room = self._room
            groups[-1].append(TokenizedText(summary, token_ids))
            room -= len(token_ids)
        return groups

    async def _merge_group(
        self,
        group: Sequence[TokenizedText],
        document: Document,
        llm: MeteredLLM,
        purpose: str,
        index: int,
    ) -> str:
        if len(group) == 1:
            return group[0]
        sampling = sampling_params(self._config, document, purpose, index, self._merge.stop)
        return read_text(await llm.generate(self._merge.fill(Filling(_join(group))), sampling))


def _part(summary: str) -> str:
    return f"Part:\n{summary}\n\n"


def _join(group: Sequence[TokenizedText]) -> TokenizedText:
    token_ids = [token_id for summary in group for token_id in summary.token_ids]
    return TokenizedText("".join(_part(summary) for summary in group), token_ids)


def _instruction(config: SummarizeConfig) -> str:
    """Return what to do with the whole document."""
    if config.instruction:
        return config.instruction
    style = f" Style: {config.style}." if config.style else ""
    return f"Summarize the document {LENGTHS[config.length]}.{style}{_focus(config)}"


def _with_style(config: SummarizeConfig, instruction: str) -> str:
    """Apply the user's focus and language to an instruction for text that is merged later."""
    return with_language(config, instruction + _focus(config))


def _focus(config: SummarizeConfig) -> str:
    return f" Concentrate on {config.focus}." if config.focus else ""


def _points_grammar(num_points: int) -> Grammar:
    point = {"type": "string", "minLength": 1, "maxLength": MAX_POINT_LENGTH}
    schema = {"type": "array", "items": point, "minItems": 1, "maxItems": max(num_points, 1)}
    return Grammar(json.dumps(schema))
