"""Documents → the rows that a job would write, on one engine. No HTTP, no Ray.

prepare chunks → generate answers → merge results, by the job's own code.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa

from granite_ray.config import ChunkingConfig, ServerConfig, TaskConfig
from granite_ray.engine.factory import Engine
from granite_ray.errors import ConfigError
from granite_ray.io.sinks import result_table
from granite_ray.prepare import check_chunk_limits, documents_of, prepare_shard
from granite_ray.programs import Attempt, Program, ReplicaGate, ShardWatch, run_programs
from granite_ray.records import (
    RAW_FIELDS,
    Completion,
    Grammar,
    Prompt,
    SamplingParams,
    output_schema,
)
from granite_ray.serving.calls import DocumentsCall, Refusal
from granite_ray.tasks import Task, TaskLimits, make_task
from granite_ray.tokenizer import Tokenizer

STEPS_ADMITTED = 16
"""As in a job's replica: document tokens in flight, in steps of the engine."""
MAX_TASKS_KEPT = 64


class TaskCache:
    """Tasks by their config: templates are encoded and schemas compiled once."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, chunking: ChunkingConfig) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._chunking = chunking
        self._lock = threading.Lock()
        self._tasks: OrderedDict[tuple[str, str], Task] = OrderedDict()

    def task(self, config: TaskConfig, text_column: str = "text") -> Task:
        """Return the task of a config.

        Raises:
            ConfigError: It cannot work; named as a config file would spell it.
        """
        key = (config.model_dump_json(by_alias=True), text_column)
        with self._lock:
            if key in self._tasks:
                self._tasks.move_to_end(key)
                return self._tasks[key]
        limits = TaskLimits(
            max_model_len=self._max_model_len,
            max_failed_chunks=self._chunking.max_failed_chunks,
            max_chunk_tokens=self._chunking.max_tokens,
            text_column=text_column,
        )
        task = make_task(config, self._tokenizer, limits)
        check_chunk_limits(self._chunking, task.max_chunk_tokens)
        with self._lock:
            self._tasks[key] = task
            if len(self._tasks) > MAX_TASKS_KEPT:
                self._tasks.popitem(last=False)
        return task


class PrioritizedLLM:
    """An engine as task programs see it, all of whose calls are interactive, or none."""

    def __init__(self, engine: Engine, *, is_interactive: bool) -> None:
        self._engine = engine
        self._is_interactive = is_interactive

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, grammar: Grammar | None = None
    ) -> Completion:
        """Continue `prompt`."""
        return await self._engine.generate(
            prompt, sampling, grammar, is_interactive=self._is_interactive
        )

    async def score(self, prompt: Prompt, choices: Sequence[tuple[int, ...]]) -> list[float]:
        """Score `choices`."""
        return await self._engine.score(prompt, choices, is_interactive=self._is_interactive)

    def count(self, text: str) -> int:
        """Count the tokens of plain text."""
        return self._engine.count(text)


class DocumentAnswerer:
    """Runs task programs on one engine, interactive ones beside those of batches."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        max_model_len: int,
        config: ServerConfig,
    ) -> None:
        self.tasks = TaskCache(tokenizer, max_model_len, config.chunking)
        self._tokenizer = tokenizer
        self._name = name
        self._chunking = config.chunking
        num_ranks = config.engine.expert_parallel_size
        capacity = STEPS_ADMITTED * num_ranks * config.engine.max_num_batched_tokens
        # One gate each: documents of batches must not stand in line before interactive ones.
        self._ways = {
            is_interactive: (
                PrioritizedLLM(engine, is_interactive=is_interactive),
                ReplicaGate(capacity),
            )
            for is_interactive in (True, False)
        }

    async def answer(self, call: DocumentsCall, *, is_interactive: bool) -> pa.Table | Refusal:
        """Return the rows of these documents, in their order.

        Raises:
            InfrastructureError: The engine is broken.
        """
        try:
            task = await asyncio.to_thread(self.tasks.task, call.task, call.text_column)
        except ConfigError as error:
            return Refusal(400, str(error), "invalid_task")
        prepared = await asyncio.to_thread(
            prepare_shard, call.raw, self._tokenizer, self._chunking, task.max_chunk_tokens
        )
        documents = await asyncio.to_thread(documents_of, prepared)
        llm, gate = self._ways[is_interactive]
        deadly = frozenset(range(len(documents)) if call.is_deadly else ())
        attempt = Attempt("together", deadly)
        programs = [Program(document, task, llm) for document in documents]
        results = await run_programs(programs, gate, attempt, UNWATCHED)
        schema = rows_schema(task, list(call.raw.schema)[len(RAW_FIELDS) :], self._name)
        return await asyncio.to_thread(result_table, prepared, results, schema)


def rows_schema(task: Task, keep_fields: "Sequence[pa.Field]", checkpoint_name: str) -> pa.Schema:
    """Return the schema of rows, as a job over the same columns declares it."""
    schema = output_schema(task.output_fields, keep_fields)
    return schema.with_metadata({"task": task.kind, "checkpoint": checkpoint_name})


async def _nothing(*_: object) -> None:
    """Nobody watches: a request that ends with its replica is asked again by its caller."""


UNWATCHED = ShardWatch(lambda: _nothing(), lambda _: _nothing(), lambda _: None)
