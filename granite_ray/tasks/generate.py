"""Any template over any columns: text, a record by schema, or calls of the user's tools."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from granite_ray.config import GenerateConfig
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import LLM, Document, Result
from granite_ray.tasks.answers import read_text
from granite_ray.tasks.base import (
    MeteredLLM,
    TaskLimits,
    chunk_tokens,
    free_tokens,
    gather_chunks,
    run_metered,
    sampling_params,
)
from granite_ray.tasks.fields import RecordQuestion, RecordSchema
from granite_ray.tasks.prompts import Filling, PromptTemplate, chunk_filling
from granite_ray.tasks.wording import prompt_words, text_examples
from granite_ray.tokenizer import Tokenizer

TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

TOOL_CALLS_FIELD = pa.field(
    "tool_calls",
    pa.list_(pa.struct([pa.field("name", pa.string()), pa.field("arguments", pa.string())])),
)


class Generate:
    """What the template asks for, of each chunk that it shows.

    Answers of several chunks stand below each other; records are merged as `extract` does it. A
    template that never shows the text is asked once.
    """

    kind = "generate"

    def __init__(self, config: GenerateConfig, tokenizer: Tokenizer, limits: TaskLimits) -> None:
        self._config = config
        self._max_failed_chunks = limits.max_failed_chunks
        words = prompt_words(
            config, config.instruction or "", text_examples(config), limits.text_column
        )
        self._template = PromptTemplate(replace(words, tools=config.tools), tokenizer)
        self._question = self._record_question(config, limits)
        self.output_fields = self._fields()
        self.columns = self._template.columns
        if config.documents_column is not None:
            self._template.check_takes_documents()
            self.columns |= {config.documents_column}
        free = free_tokens(limits, self._template.num_tokens, config.max_tokens)
        self.max_chunk_tokens = chunk_tokens(limits, free)

    async def run(self, document: Document, llm: LLM) -> Result:
        """Answer for one document."""
        return await run_metered(document, llm, self._answer)

    def _record_question(self, config: GenerateConfig, limits: TaskLimits) -> RecordQuestion | None:
        if config.schema_ is None:
            return None
        if config.tools:
            raise ConfigError(
                "task.schema and task.tools exclude each other: a call of a tool is no record. "
                "Remove one of them."
            )
        schema = RecordSchema(config.schema_)
        schema.check_examples(config)
        if schema.has_copies and not self._template.shows_text:
            raise ConfigError(
                "task.schema has x-copy, which copies from the text, and task.template never shows "
                "the text. Write {{ text }} where it belongs, or remove x-copy."
            )
        return RecordQuestion(config, schema, self._template, limits.max_failed_chunks)

    def _fields(self) -> tuple[pa.Field, ...]:
        if self._question is not None:
            return (self._question.schema.field,)
        text = pa.field("text", pa.string())
        return (text, TOOL_CALLS_FIELD) if self._config.tools else (text,)

    async def _answer(self, document: Document, llm: MeteredLLM) -> Mapping[str, Any]:
        fillings = self._fillings(document)
        if self._question is not None:
            merged = await self._question.ask(fillings, document, llm)
            return {"fields": self._question.column(merged)}
        calls = [self._write(index, filling, document, llm) for index, filling in fillings.items()]
        answers = await gather_chunks(calls, llm, self._max_failed_chunks)
        texts = [answer for answer in answers if answer is not None]
        values: dict[str, Any] = {"text": "\n\n".join(texts)}
        if self._config.tools:
            values["tool_calls"] = [call for text in texts for call in read_tool_calls(text)]
        return values

    async def _write(
        self, index: int, filling: Filling, document: Document, llm: MeteredLLM
    ) -> str:
        stop = self._template.stop
        sampling = sampling_params(self._config, document, "text", index, stop)
        return read_text(await llm.generate(self._template.fill(filling), sampling))

    def _fillings(self, document: Document) -> dict[int, Filling]:
        documents = self._documents(document)
        chunks = document.chunks if self._template.shows_text else document.chunks[:1]
        return {
            chunk.index: replace(chunk_filling(document, chunk), documents=documents)
            for chunk in chunks
        }

    def _documents(self, document: Document) -> tuple[tuple[str, str], ...]:
        """Return title and text of each document in `task.documents_column`."""
        column = self._config.documents_column
        if column is None:
            return ()
        value = document.columns.get(column)
        if not isinstance(value, list):
            raise _not_documents(column)
        return tuple(_title_and_text(one, column) for one in value)


def read_tool_calls(text: str) -> list[dict[str, str]]:
    """Return the calls that an answer makes; none where it makes no well-formed call.

    Granite 4 writes each as `<tool_call>{…}</tool_call>`, Granite 3 all as one JSON list.
    """
    written = TOOL_CALL.findall(text) or [text.removeprefix("<|tool_call|>")]
    try:
        values = [json.loads(one) for one in written]
    except (ValueError, RecursionError):
        return []
    calls = [call for value in values for call in (value if isinstance(value, list) else [value])]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [{"name": call["name"], "arguments": _arguments(call)} for call in calls]


def _arguments(call: Mapping[str, Any]) -> str:
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)


def _title_and_text(value: Any, column: str) -> tuple[str, str]:
    if isinstance(value, str):
        return "", value
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        title = value.get("title")
        if title is None or isinstance(title, str):
            return title or "", value["text"]
    raise _not_documents(column)


def _not_documents(column: str) -> RowFailure:
    return RowFailure(
        "invalid_column",
        f"column {column!r} (task.documents_column) is not a list of texts, or of objects with "
        "title and text",
    )
