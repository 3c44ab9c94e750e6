"""A job's prompts and answers without Ray, and the same as any user of transformers gets them."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.config import GenerateConfig, JobConfig
from granite_ray.engine.factory import make_engine
from granite_ray.prepare import documents_of, prepare_shard
from granite_ray.records import (
    LLM,
    RAW_FIELDS,
    Completion,
    Grammar,
    Prompt,
    Result,
    SamplingParams,
)
from granite_ray.tasks import TaskLimits, make_task
from granite_ray.tokenizer import load_tokenizer


class Reference:
    """A checkpoint as any user of transformers has it, in float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._written: dict[tuple[tuple[int, ...], int], str] = {}

    def prompt(self, task: GenerateConfig, row: dict[str, Any]) -> tuple[int, ...]:
        """The token ids of a row's prompt, rendered and encoded in one piece."""
        if self.tokenizer.chat_template is None:
            return self._encode(_plain_prompt(task, row))
        turns = [{"role": "user", "content": _user_turn(task, row)}]
        if task.system_prompt is not None:
            turns.insert(0, {"role": "system", "content": task.system_prompt})
        documents = _documents(task, row) or None
        return self.encode_chat(turns, documents=documents, tools=list(task.tools) or None)

    def encode_chat(self, turns: list[dict[str, str]], **listed: Any) -> tuple[int, ...]:
        """Turns as the model is to continue them."""
        rendered = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, **listed
        )
        return self._encode(rendered)

    def write(self, prompt: tuple[int, ...], num_tokens: int) -> str:
        """What `generate` continues a prompt with, greedily."""
        if (prompt, num_tokens) not in self._written:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                out = self._model.generate(ids, max_new_tokens=num_tokens, do_sample=False)
            text = self.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
            self._written[prompt, num_tokens] = text
        return self._written[prompt, num_tokens]

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _user_turn(task: GenerateConfig, row: dict[str, Any]) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(task.template).render(row, instruction=task.instruction)


def _plain_prompt(task: GenerateConfig, row: dict[str, Any]) -> str:
    turns = [(_user_turn(task, {"text": one.input}), f"{one.output}\n\n") for one in task.examples]
    turns.append((_user_turn(task, row), ""))
    return "".join(f"### Task\n{turn}\n\n### Answer\n{answer}" for turn, answer in turns)


def _documents(task: GenerateConfig, row: dict[str, Any]) -> list[dict[str, str]]:
    found = row[task.documents_column] if task.documents_column else []
    return [{"title": one["title"] or "", "text": one["text"]} for one in found]


@dataclass
class RecordingLLM:
    """An engine whose calls are written down."""

    llm: LLM
    calls: list[tuple[Prompt, Completion]] = field(default_factory=list)

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, grammar: Grammar | None = None
    ) -> Completion:
        completion = await self.llm.generate(prompt, sampling, grammar)
        self.calls.append((prompt, completion))
        return completion

    async def score(self, prompt: Prompt, choices: Any) -> list[float]:
        return await self.llm.score(prompt, choices)

    def count(self, text: str) -> int:
        return self.llm.count(text)


def run_on_own_engine(config: JobConfig, rows: list[dict[str, Any]]) -> list[Result]:
    """Run a job's rows on an engine made for them, in this process."""
    checkpoint = open_checkpoint(config.model)
    engine = make_engine(checkpoint, config.model, config.engine)
    try:
        return run_without_ray(config, checkpoint, engine, rows)
    finally:
        engine.shutdown()


def run_without_ray(
    config: JobConfig, checkpoint: Checkpoint, llm: LLM, rows: list[dict[str, Any]]
) -> list[Result]:
    """What a job answers for `rows`: prepared and asked as a worker does it."""
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    limits = TaskLimits(
        checkpoint.max_model_len,
        max_chunk_tokens=config.chunking.max_tokens,
        text_column=config.source.text_column,
    )
    task = make_task(config.task, tokenizer, limits)
    raw = _raw_rows(config, config.prompt_columns(task.columns), rows)
    prepared = prepare_shard(raw, tokenizer, config.chunking, task.max_chunk_tokens)
    documents = documents_of(prepared)
    assert [document.error for document in documents] == [None] * len(rows)

    async def answer_all() -> list[Result]:
        return await asyncio.gather(*(task.run(document, llm) for document in documents))

    return asyncio.run(answer_all())


def _raw_rows(config: JobConfig, seen: tuple[str, ...], rows: list[dict[str, Any]]) -> pa.Table:
    raw = [
        {
            "document_id": str(number),
            "text": row[config.source.text_column].encode(),
            "columns": json.dumps({column: row[column] for column in seen}),
            "source_file": "rows",
            "source_row": number,
        }
        for number, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(raw, schema=pa.schema(RAW_FIELDS))
