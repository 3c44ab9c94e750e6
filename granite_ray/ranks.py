"""A replica on several ranks: Ray actors with a device each, placed and removed together.

The actor that answers shards holds no device itself. Were it rank 0, eight replicas could take the
eight devices of a cluster, and each would wait for ever for its second one.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from granite_ray.checkpoint import Checkpoint
from granite_ray.engine.requests import Future, OnToken, check_fits, fail, settle
from granite_ray.errors import InfrastructureError
from granite_ray.parallel.balance import RankBalance
from granite_ray.rank_worker import RankWorker
from granite_ray.ray_errors import own_error
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from granite_ray.stages import ReplicaContext
from granite_ray.tokenizer import load_tokenizer

PLACING_SHARE = 0.5
"""Of the time that the driver waits for a sign of life: then it hears what is missing."""
BEAT_S = 1.0
"""How often each rank is asked whether it lives."""
ANSWER_S = 5.0
"""How long Ray's head may take to remove what a run has left."""
MAX_CALLS = 10_000
"""Calls that one rank takes in at once; more wait their turn."""


class RankedEngine:
    """An `Engine` in front of the ranks of one replica; it deals calls out to them by tokens.

    Where a rank dies, fails or does not answer for `engine.rank_timeout_s`, all calls get
    InfrastructureError: the replica is of no use then.

    Args:
        context: The job's.
        checkpoint: The job's, as this node can read it.
        bundle: What Ray is to give to each rank.
        num_threads: CPU threads of each rank.

    Raises:
        ConfigError: The weights, the device or the memory do not do.
        InfrastructureError: The ranks cannot be placed, or do not start.
    """

    def __init__(
        self,
        context: ReplicaContext,
        checkpoint: Checkpoint,
        bundle: Mapping[str, float],
        num_threads: int | None,
    ) -> None:
        engine, self._patience_s = context.config.engine, context.config.job.scheduling_timeout_s
        self._rank_timeout_s = engine.rank_timeout_s
        self._max_model_len = checkpoint.max_model_len
        self._tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        self._balance = RankBalance(engine.expert_parallel_size)
        self._lock = threading.Lock()  # guards the unsettled and the failure
        self._unsettled: set[Future[Any]] = set()
        self._workers: list[Any] = []
        self._placement: PlacementGroup | None = None
        self.failure: InfrastructureError | None = None
        self.num_calls = self.num_steps = self.num_cached_tokens = 0
        actor_id = ray.get_runtime_context().get_actor_id()
        self._name = f"{_prefix(context.run_id)}{actor_id}"
        _remove(self._name)  # that of this actor's process before, which has died
        try:
            placement = self._reserve([dict(bundle)] * engine.expert_parallel_size)
            self._start(placement, context, bundle, num_threads)
        except BaseException:
            self.shutdown()
            raise
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        grammar: Grammar | None = None,
        *,
        is_interactive: bool = False,
        on_token: OnToken | None = None,
    ) -> Completion:
        """Continue `prompt`; see `Engine`. `on_token` is called in the caller's own loop."""

        def call(worker: Any) -> Any:
            method = worker.generate if on_token is None else worker.stream
            return method.remote(prompt, sampling, grammar, is_interactive)

        completion: Completion = await self._ask(prompt, sampling.max_tokens, call, on_token)
        return completion

    async def score(
        self,
        prompt: Prompt,
        choices: Sequence[tuple[int, ...]],
        *,
        is_interactive: bool = False,
    ) -> list[float]:
        """Return the log-probability of each choice right after `prompt`; see `LLM`."""

        def call(worker: Any) -> Any:
            return worker.score.remote(prompt, choices, is_interactive)

        scores: list[float] = await self._ask(prompt, max(map(len, choices), default=0), call)
        return scores

    def count(self, text: str) -> int:
        """Count the tokens of plain text; see `LLM`."""
        return self._tokenizer.count(text)

    def shutdown(self) -> None:
        """End the ranks' processes and give back what they held; calls get InfrastructureError."""
        self._fail(InfrastructureError("The engine was shut down."))
        for worker in self._workers:
            with suppress(ray.exceptions.RayError):
                ray.kill(worker)
        if self._placement is not None:  # by itself: its name may be that of a successor's by now
            remove_placement_group(self._placement)

    async def _ask(
        self,
        prompt: Prompt,
        num_answer_tokens: int,
        call: Callable[[Any], Any],
        on_token: OnToken | None = None,
    ) -> Any:
        check_fits(prompt, num_answer_tokens, self._max_model_len)
        answer: Future[Any] = Future()
        with self._lock:
            if self.failure is not None:
                raise InfrastructureError(str(self.failure))
            self._unsettled.add(answer)
        self.num_calls += 1
        rank, num_tokens = self._balance.choose(prompt, num_answer_tokens)
        asked = call(self._workers[rank])
        listening = asyncio.ensure_future(_listen(asked, answer, on_token))
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            ray.cancel(asked)
            raise
        finally:
            listening.cancel()
            self._balance.release(rank, num_tokens)
            with self._lock:
                self._unsettled.discard(answer)

    def _reserve(self, bundles: list[dict[str, float]]) -> PlacementGroup:
        """Reserve room for all ranks at once, on one node where there is one with so much."""
        self._placement = placement_group(bundles, strategy="PACK", name=self._name)
        placement: PlacementGroup = self._placement
        patience_s = PLACING_SHARE * self._patience_s
        if not placement.wait(patience_s):
            free = ray.available_resources()
            has = ", ".join(f"{free.get(name, 0):g} {name}" for name in bundles[0])
            raise InfrastructureError(
                f"engine.expert_parallel_size: the cluster has not placed {len(bundles)} ranks of "
                f"{bundles[0]} in {patience_s:g} s (half of job.scheduling_timeout_s); {has} "
                "are free. Use smaller groups, fewer engine.num_replicas, or a larger cluster."
            )
        return placement

    def _start(
        self,
        placement: PlacementGroup,
        context: ReplicaContext,
        bundle: Mapping[str, float],
        num_threads: int | None,
    ) -> None:
        make_actor: Any = ray.remote  # its own types leave out the last two options
        actor = make_actor(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            max_concurrency=MAX_CALLS,
            concurrency_groups={"life": 1},
        )(RankWorker)
        for rank in range(context.config.engine.expert_parallel_size):
            strategy = PlacementGroupSchedulingStrategy(placement, rank)
            options = actor.options(scheduling_strategy=strategy)
            self._workers.append(options.remote(context))
        deadline = time.monotonic() + 2 * self._patience_s  # to start, and to load
        [meeting] = _wait_for([self._workers[0].open_meeting.remote()], deadline)
        loading = [
            worker.load.remote(rank, meeting, num_threads)
            for rank, worker in enumerate(self._workers)
        ]
        _wait_for(loading, deadline)

    def _watch(self) -> None:
        """Ask all ranks for a sign of life, again and again, until one gives none."""
        while self.failure is None:
            time.sleep(BEAT_S)
            beats = [
                worker.beat.options(concurrency_group="life").remote() for worker in self._workers
            ]
            try:
                told = _wait_for(beats, time.monotonic() + self._rank_timeout_s)
                self.num_steps, self.num_cached_tokens = map(sum, zip(*told, strict=True))
            except Exception as error:  # noqa: BLE001 - whatever it is, the replica is of no use
                self._fail(InfrastructureError(f"A rank of the replica was lost: {error}"))

    def _fail(self, error: InfrastructureError) -> None:
        """Let all calls, those in flight and later ones, end with an error; once and for good."""
        with self._lock:
            self.failure = self.failure or error
            left = list(self._unsettled)
        for answer in left:
            fail(answer, InfrastructureError(str(self.failure)))


def remove_ranks(run_id: str, living: Collection[str] = ()) -> None:
    """Remove all ranks of a run but those of `living` actors (ids), if Ray still answers.

    Ray keeps their room until the job ends, also where the actor that asked for it was killed.
    """

    def remove() -> None:
        with suppress(Exception):  # the head may be gone, and the run ends with that error
            for group in ray.util.placement_group_table().values():
                prefix, _, actor_id = group["name"].rpartition(" ")
                is_ours = f"{prefix} " == _prefix(run_id) and actor_id not in living
                if is_ours and group["state"] != "REMOVED":
                    _remove(group["name"])

    remover = threading.Thread(target=remove, name="remover", daemon=True)
    remover.start()
    remover.join(ANSWER_S)


def _prefix(run_id: str) -> str:
    return f"granite-ray {run_id} ranks of "


def _remove(name: str) -> None:
    """Remove the placement group of this name, if there is one, and with it what runs in it."""
    with suppress(ValueError):  # there is none
        remove_placement_group(get_placement_group(name))


def _wait_for(references: list[Any], deadline: float) -> list[Any]:
    """Return all values; raise what the first that fails has raised, without waiting for others."""
    pending = references
    while pending:
        done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise InfrastructureError(
                f"{len(pending)} of {len(references)} ranks do not answer in time"
            )
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            raise own_error(error) from error
    values: list[Any] = ray.get(references)
    return values


async def _listen(asked: Any, answer: Future[Any], on_token: OnToken | None) -> None:
    """Settle a caller's future as a rank settles its own; pass on the tokens before."""
    try:
        if on_token is None:
            settle(answer, await asked)
            return
        async for reference in asked:
            item = await reference
            if isinstance(item, Completion):
                settle(answer, item)
                return
            for token_id, logprobs in item:
                on_token(token_id, logprobs)
        fail(answer, InfrastructureError("A rank ended a call without an answer."))
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets it
        fail(answer, own_error(error))
