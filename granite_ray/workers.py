"""The Ray actor that holds one replica of the model and answers shards with it.

A thin shell: what runs beside what is decided in `programs`, who is to blame for a death in
`attempts`.
"""

import asyncio
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import pyarrow as pa
import ray

from granite_ray.attempts import LiveCounts
from granite_ray.checkpoint import Checkpoint
from granite_ray.cluster import ReplicaResources
from granite_ray.engine.factory import Engine
from granite_ray.errors import GraniteRayError, InfrastructureError
from granite_ray.io.reuse import POSITION
from granite_ray.io.sinks import result_table
from granite_ray.prepare import documents_of
from granite_ray.programs import (
    Attempt,
    CountingLLM,
    ReplicaGate,
    ShardWatch,
    StallWatch,
    run_programs,
)
from granite_ray.ranks import RankedEngine, wait_passively
from granite_ray.records import Result
from granite_ray.stages import ShardWork, StageContext, local_checkpoint, pack, task_limits, unpack
from granite_ray.tasks import make_task
from granite_ray.tokenizer import load_tokenizer

REPORT_INTERVAL_S = 1.0
STEPS_ADMITTED = 16
"""Document tokens that may be in flight, in steps of the engine: enough to keep it full."""
LAST_WORDS_S = 5.0
"""How long a replica that ends itself tries to tell the journal why."""

logger = logging.getLogger(__name__)


class ReplicaWorker:
    """The actor that holds one replica: shards come in side by side and share the engine."""

    def __init__(self, context: StageContext, journal: Any, resources: ReplicaResources) -> None:
        self.schema = context.schema
        self.journal = journal
        engine = context.config.engine
        step_tokens = engine.expert_parallel_size * engine.max_num_batched_tokens
        self.gate = ReplicaGate(STEPS_ADMITTED * step_tokens)
        self.node_id = ray.get_runtime_context().get_node_id()
        self.replica_id = ray.get_runtime_context().get_actor_id()
        self.counts = LiveCounts()
        self._report(num_steps=0)  # it has its place; loading may take as long again
        try:
            self._load(context, resources)
        except Exception as error:
            own = isinstance(error, GraniteRayError)
            known = error if own else InfrastructureError(f"A replica could not start: {error!r}")
            ray.get(journal.cannot_start.remote(known))
            raise
        timeout_s = context.config.job.scheduling_timeout_s
        # It must not keep this object alive: Ray Data deletes it before the process ends.
        arguments = weakref.ref(self), timeout_s
        threading.Thread(target=_watch, args=arguments, name="watch", daemon=True).start()

    def __del__(self) -> None:
        engine = getattr(self, "engine", None)  # none where the constructor failed
        if isinstance(engine, RankedEngine):
            engine.shutdown()

    def _load(self, context: StageContext, resources: ReplicaResources) -> None:
        wait_passively()
        config, checkpoint = context.config, local_checkpoint(context)
        self.engine = self._start_engine(context, checkpoint, resources)
        self.llm = CountingLLM(self.engine)
        limits = task_limits(config, checkpoint)
        self.task = make_task(config.task, load_tokenizer(checkpoint.tokenizer_path), limits)

    def _start_engine(
        self, context: StageContext, checkpoint: Checkpoint, resources: ReplicaResources
    ) -> Engine:
        """Start the engine: in this process, or where ranks share it in theirs."""
        config, num_threads = context.config, resources.num_threads
        if resources.rank_bundle is None:
            return context.make_engine(checkpoint, config.model, config.engine, num_threads)
        return RankedEngine(context, checkpoint, resources.rank_bundle, num_threads)

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """Answer every document of one shard, as the journal says it is to be tried."""
        shard_id = ShardWork.from_json(block["work"][0].as_py()).shard.shard_id
        try:
            attempt = await self.journal.begin.remote(shard_id, self.node_id)
        except ray.exceptions.RayActorError as error:
            raise InfrastructureError("The run has ended; its journal is gone.") from error
        if attempt.mode == "skip":
            yield (
                block.drop_columns(["prepared"])
                .append_column("answered", pa.nulls(1, pa.large_binary()))
                .append_column("model_calls", pa.array([0]))
            )
        else:
            yield await self._answer(block, shard_id, attempt)

    async def _answer(self, block: pa.Table, shard_id: str, attempt: Attempt) -> pa.Table:
        prepared = await asyncio.to_thread(unpack, block["prepared"])
        documents = await asyncio.to_thread(documents_of, prepared)
        llm = CountingLLM(self.llm)
        watch = ShardWatch(
            partial(self.journal.enter.remote, shard_id),
            partial(self.journal.begin_document.remote, shard_id),
            partial(self._count, at_once=attempt.mode == "one_by_one"),
        )
        try:
            results = await run_programs(documents, self.task, llm, self.gate, attempt, watch)
        except InfrastructureError as error:
            await asyncio.to_thread(self._die, error)
        self.journal.leave.remote(shard_id)
        rows = await asyncio.to_thread(result_table, prepared, results, self.schema)
        answered = rows.append_column(POSITION, prepared[POSITION])
        return (
            block.drop_columns(["prepared"])
            .append_column("answered", pack(answered))
            .append_column("model_calls", pa.array([llm.num_calls]))
        )

    def _count(self, result: Result, *, at_once: bool) -> None:
        """Count a result; `at_once` tells the journal before the next document may end it all."""
        failed = int(result.error is not None)
        self.counts += LiveCounts(1, failed, result.num_prompt_tokens, result.num_completion_tokens)
        if at_once:
            self._report(self.engine.num_steps)

    def look(self, watch: StallWatch, timeout_s: float) -> None:
        """Show life, also while no shard is here, and end where the engine shows none."""
        num_calls, num_steps = self.llm.num_in_flight, self.engine.num_steps
        self._report(num_steps)
        if watch.look(time.monotonic(), num_calls, num_steps):
            self._die(
                InfrastructureError(
                    f"The engine hangs: {num_calls} calls are in flight, and it has made no "
                    f"step for {timeout_s:g} s (job.scheduling_timeout_s)."
                )
            )
        if isinstance(self.engine, RankedEngine) and self.engine.failure is not None:
            self._die(self.engine.failure)

    def _report(self, num_steps: int) -> None:
        self.journal.report.remote(self.replica_id, os.getpid(), asdict(self.counts), num_steps)

    def _die(self, error: InfrastructureError) -> NoReturn:
        """End this process, whose engine is broken: Ray replaces it, the journal counts the death.

        An exception would end the job; Ray retries only what dies.
        """
        logger.critical("engine broken, replica ends error=%s", error, exc_info=error)
        told = self.journal.give_up.remote(str(error)).future()
        with suppress(ray.exceptions.RayError, TimeoutError):
            told.result(LAST_WORDS_S)
        if isinstance(self.engine, RankedEngine):
            self.engine.shutdown()  # what this process started would outlive it
        logging.shutdown()
        os._exit(1)


def _watch(find: Callable[[], ReplicaWorker | None], timeout_s: float) -> None:
    watch = StallWatch(timeout_s)
    while True:
        time.sleep(REPORT_INTERVAL_S)
        worker = find()
        if worker is None:
            return
        worker.look(watch, timeout_s)
        del worker
