"""The Ray actor that holds one replica of the model and answers shards with it.

A thin shell: what runs beside what is decided in `programs`, who is to blame for a death in
`attempts`.
"""

import asyncio
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import ray

from granite_ray.attempts import LiveCounts
from granite_ray.checkpoint import Checkpoint
from granite_ray.cluster import ReplicaResources
from granite_ray.engine.factory import Engine
from granite_ray.errors import GraniteRayError, InfrastructureError
from granite_ray.io.reuse import POSITION
from granite_ray.io.sinks import result_table
from granite_ray.logs import set_up_logging
from granite_ray.prepare import documents_of
from granite_ray.programs import (
    Attempt,
    CountingLLM,
    Program,
    ReplicaGate,
    ShardWatch,
    StallWatch,
    run_programs,
)
from granite_ray.rank_worker import wait_briefly
from granite_ray.ranks import RankedEngine
from granite_ray.records import Result
from granite_ray.stages import (
    ReplicaContext,
    ShardWork,
    StageContext,
    local_checkpoint,
    pack,
    read_work,
    task_limits,
    unpack,
)
from granite_ray.tasks import make_task
from granite_ray.tokenizer import load_tokenizer

REPORT_INTERVAL_S = 1.0
STEPS_ADMITTED = 16
"""Document tokens that may be in flight, in steps of the engine: enough to keep it full."""
RUN_HAS_ENDED = "The run has ended; its journal is gone."
LAST_WORDS_S = 5.0
"""How long a replica that ends itself tries to tell the journal why."""

logger = logging.getLogger(__name__)


def start_engine(
    context: ReplicaContext, checkpoint: Checkpoint, resources: ReplicaResources
) -> Engine:
    """Start a replica's engine: in this process, or where ranks share it in theirs."""
    config, num_threads = context.config, resources.num_threads
    if resources.rank_bundle is None:
        return context.make_engine(checkpoint, config.model, config.engine, num_threads)
    return RankedEngine(context, checkpoint, resources.rank_bundle, num_threads)


class ReplicaWorker:
    """The actor that holds one replica: shards come in side by side and share the engine."""

    def __init__(
        self, contexts: Sequence[StageContext], journal: Any, resources: ReplicaResources
    ) -> None:
        context = contexts[0]
        self.schemas = [context.schema for context in contexts]
        self.run_ids = [context.run_id for context in contexts]
        self.journal = journal
        engine = context.config.engine
        step_tokens = engine.expert_parallel_size * engine.max_num_batched_tokens
        self.gate = ReplicaGate(STEPS_ADMITTED * step_tokens)
        self.node_id = ray.get_runtime_context().get_node_id()
        self.replica_id = ray.get_runtime_context().get_actor_id()
        self.process_id = uuid.uuid4().hex  # those of the system repeat from node to node
        self.counts = LiveCounts()
        try:  # it has its place; loading may take as long again
            with suppress(ray.exceptions.ActorUnavailableError):
                ray.get(self._report(0, 0))
        except ray.exceptions.RayActorError as error:
            raise InfrastructureError(RUN_HAS_ENDED) from error
        try:
            self._load(contexts, resources)
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

    def _load(self, contexts: Sequence[StageContext], resources: ReplicaResources) -> None:
        wait_briefly()
        set_up_logging(contexts[0].config.job)
        config, checkpoint = contexts[0].config, local_checkpoint(contexts[0])
        self.engine = start_engine(contexts[0], checkpoint, resources)
        self.llm = CountingLLM(self.engine)
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        limits = task_limits(config, checkpoint)
        self.tasks = [make_task(context.config.task, tokenizer, limits) for context in contexts]

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """Answer every document of one shard, as the journal says it is to be tried."""
        works = read_work(block)
        shard_id = works[0].shard.shard_id
        try:
            attempt = await self.journal.begin.remote(shard_id, self.node_id)
        except ray.exceptions.RayActorError as error:
            raise InfrastructureError(RUN_HAS_ENDED) from error
        if attempt.mode == "skip":
            yield (
                block.drop_columns(["prepared"])
                .append_column("answered", pa.nulls(1, pa.large_list(pa.large_binary())))
                .append_column("model_calls", pa.nulls(1, pa.list_(pa.int64())))
            )
        else:
            yield await self._answer(block, works, attempt)

    async def _answer(
        self, block: pa.Table, works: Sequence[ShardWork], attempt: Attempt
    ) -> pa.Table:
        prepared = await asyncio.to_thread(unpack, block["prepared"])
        documents = await asyncio.to_thread(documents_of, prepared)
        asked = await asyncio.to_thread(_rows_asked, prepared, block, len(works))
        llms = [CountingLLM(self.llm) for _ in works]
        # One document's programs side by side: what they have in common is computed once.
        places = sorted((row, at) for at, rows in enumerate(asked) for row in rows)
        programs = [
            Program(documents[row], self.tasks[works[at].job], llms[at]) for row, at in places
        ]
        shard_id = works[0].shard.shard_id
        for work in works:
            logger.info("shard begins", extra=self._at(work, attempt))
        watch = ShardWatch(
            partial(self.journal.enter.remote, shard_id),
            partial(self.journal.begin_document.remote, shard_id),
            partial(self._count, at_once=attempt.mode == "one_by_one"),
        )
        try:
            results = await run_programs(programs, self.gate, attempt, watch)
        except InfrastructureError as error:
            await asyncio.to_thread(self._die, error)
        self._report(self.engine.num_steps, self.engine.num_cached_tokens)
        self.journal.leave.remote(shard_id)
        answered = []
        for at, rows in enumerate(asked):
            own = [result for result, place in zip(results, places, strict=True) if place[1] == at]
            schema = self.schemas[works[at].job]
            answered.append(await asyncio.to_thread(_answered, prepared, rows, own, schema))
            counts = {"answered": len(own), "failed": sum(r.error is not None for r in own)}
            logger.info("shard answered", extra={**self._at(works[at], attempt), "counts": counts})
        return (
            block.drop_columns(["prepared"])
            .append_column("answered", pack(answered))
            .append_column("model_calls", pa.array([[llm.num_calls for llm in llms]]))
        )

    def _at(self, work: ShardWork, attempt: Attempt) -> dict[str, Any]:
        """Say in a log line what it is about."""
        shard_id = work.shard.shard_id
        return {"job": self.run_ids[work.job], "shard": shard_id, "attempt": attempt.number}

    def _count(self, result: Result, *, at_once: bool) -> None:
        """Count a result; `at_once` tells the journal before the next document may end it all."""
        failed = int(result.error is not None)
        self.counts += LiveCounts(1, failed, result.num_prompt_tokens, result.num_completion_tokens)
        if at_once:
            self._report(self.engine.num_steps, self.engine.num_cached_tokens)

    def look(self, watch: StallWatch, timeout_s: float) -> None:
        """Show life, also while no shard is here, and end where the engine shows none."""
        num_calls, num_steps = self.llm.num_in_flight, self.engine.num_steps
        told = self._report(num_steps, self.engine.num_cached_tokens).future()
        if watch.look(time.monotonic(), num_calls, num_steps):
            self._die(
                InfrastructureError(
                    f"The engine hangs: {num_calls} calls are in flight, and it has made no "
                    f"step for {timeout_s:g} s (job.scheduling_timeout_s)."
                )
            )
        if isinstance(self.engine, RankedEngine) and self.engine.failure is not None:
            self._die(self.engine.failure)
        self._leave_unless_wanted(told)

    def _leave_unless_wanted(self, told: Future[bool]) -> None:
        """End this process where the run has ended, or another process has taken its place.

        Ray ends it then as well, unless the daemon of its node is what is lost.
        """
        try:
            is_wanted = told.result(LAST_WORDS_S)
        except ray.exceptions.ActorDiedError:
            is_wanted = False
        except (ray.exceptions.RayError, TimeoutError):
            return  # the driver waits for the journal too, and ends the run if it must
        if not is_wanted:
            logger.info("replica is not wanted any more, and ends")
            self._end()

    def _report(self, num_steps: int, num_cached_tokens: int) -> Any:
        counts = asdict(replace(self.counts, cached_tokens=num_cached_tokens))
        return self.journal.report.remote(self.replica_id, self.process_id, counts, num_steps)

    def _die(self, error: InfrastructureError) -> NoReturn:
        """End this process, whose engine is broken: Ray replaces it, the journal counts the death.

        An exception would end the job; Ray retries only what dies.
        """
        logger.critical("engine broken, replica ends error=%s", error, exc_info=error)
        told = self.journal.give_up.remote(str(error)).future()
        with suppress(ray.exceptions.RayError, TimeoutError):
            told.result(LAST_WORDS_S)
        self._end()

    def _end(self) -> NoReturn:
        if isinstance(self.engine, RankedEngine):
            # What this process started would outlive it; but Ray may not answer any more.
            ender = threading.Thread(target=self.engine.shutdown, daemon=True)
            ender.start()
            ender.join(LAST_WORDS_S)
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


def _rows_asked(prepared: pa.Table, block: pa.Table, num_jobs: int) -> list[list[int]]:
    """Return for each job the rows of `prepared` that it has no answer for yet."""
    positions = prepared[POSITION].to_pylist()
    reused = [set(unpack(block["reused"], at)[POSITION].to_pylist()) for at in range(num_jobs)]
    return [[row for row, at in enumerate(positions) if at not in done] for done in reused]


def _answered(
    prepared: pa.Table, rows: Sequence[int], results: Sequence[Result], schema: pa.Schema
) -> pa.Table:
    if len(rows) < prepared.num_rows:
        is_asked = np.zeros(prepared.num_rows, dtype=bool)
        is_asked[list(rows)] = True
        prepared = prepared.filter(pa.array(is_asked))
    table = result_table(prepared, results, schema)
    return table.append_column(POSITION, prepared[POSITION])
