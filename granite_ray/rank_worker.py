"""The Ray actor that holds one rank of a replica: its process, its device, its engine."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any

import ray

from granite_ray.engine.factory import Engine
from granite_ray.parallel.place import RankPlace
from granite_ray.records import (
    Completion,
    Grammar,
    Prompt,
    SamplingParams,
    TokenLogprobs,
)
from granite_ray.stages import ReplicaContext, local_checkpoint

LOST_TIMEOUTS = 2
"""A rank that nobody asks for a sign of life so many times `engine.rank_timeout_s` ends itself."""
LOST_STARTS = 4
"""As many times `job.scheduling_timeout_s` before it is asked for the first."""
CHECK_S = 1.0

SPINS = 20_000
"""How often a thread of OpenMP looks for work before it sleeps: about as long as a step has gaps.
By default it looks for milliseconds, which on busy cores makes one batch take twenty times as long
as another; one that sleeps at once is woken so often that a job takes one and a half times as long:
`GOMP_SPINCOUNT=0 granite-ray run configs/quickstart_synopses.yaml` shows it, beside one without.
"""

ChosenToken = tuple[int, TokenLogprobs | None]


def wait_briefly() -> None:
    """Let OpenMP's threads sleep soon while they wait. Call it before torch is loaded."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


class RankWorker:
    """The actor that holds one rank."""

    def __init__(self, context: ReplicaContext) -> None:
        wait_briefly()
        self._context = context
        self._engine: Engine | None = None
        self._meeting: Any = None
        # Until it is first asked, it is loading; the replica gives up before that time.
        self._deadline = time.monotonic() + LOST_STARTS * context.config.job.scheduling_timeout_s
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def open_meeting(self) -> tuple[str, int]:
        """Return where the ranks meet; the leader's process holds the place open."""
        host = ray.util.get_node_ip_address()
        if self._context.config.engine.backend == "fake":
            return host, 0  # it shares nothing
        from granite_ray.parallel.groups import open_meeting  # loads torch

        self._meeting, port = open_meeting(host, self._context.config.job.scheduling_timeout_s)
        return host, port

    def load(self, rank: int, meeting: tuple[str, int], num_threads: int | None) -> None:
        """Build this rank's engine; comes back when those of all ranks are built."""
        config = self._context.config
        place = RankPlace(
            rank=rank,
            size=config.engine.expert_parallel_size,
            host=ray.util.get_node_ip_address(),
            meeting=meeting,
            patience_s=config.job.scheduling_timeout_s,
            timeout_s=config.engine.rank_timeout_s,
        )
        self._engine = self._context.make_engine(
            local_checkpoint(self._context), config.model, config.engine, num_threads, place
        )

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        grammar: Grammar | None,
        is_interactive: bool,
    ) -> Completion:
        """Continue a prompt on this rank."""
        assert self._engine is not None, "not loaded"
        return await self._engine.generate(prompt, sampling, grammar, is_interactive=is_interactive)

    async def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        grammar: Grammar | None,
        is_interactive: bool,
    ) -> AsyncGenerator[list[ChosenToken] | Completion]:
        """Continue a prompt on this rank; yield its tokens as they are chosen, and then the whole.

        Tokens that are chosen while others travel come together.
        """
        assert self._engine is not None, "not loaded"
        loop = asyncio.get_running_loop()
        chosen: asyncio.Queue[ChosenToken | None] = asyncio.Queue()

        def on_token(token_id: int, logprobs: TokenLogprobs | None) -> None:
            with suppress(RuntimeError):  # the loop is gone, and so is who listens
                loop.call_soon_threadsafe(chosen.put_nowait, (token_id, logprobs))

        work = asyncio.ensure_future(
            self._engine.generate(
                prompt, sampling, grammar, is_interactive=is_interactive, on_token=on_token
            )
        )
        work.add_done_callback(lambda _: chosen.put_nowait(None))
        try:
            while (token := await chosen.get()) is not None:
                tokens = [token]
                while not chosen.empty() and (token := chosen.get_nowait()) is not None:
                    tokens.append(token)
                yield tokens
                if token is None:
                    break
            yield await work
        finally:
            work.cancel()

    async def score(
        self, prompt: Prompt, choices: Sequence[tuple[int, ...]], is_interactive: bool
    ) -> list[float]:
        """Weigh choices on this rank."""
        assert self._engine is not None, "not loaded"
        return await self._engine.score(prompt, choices, is_interactive=is_interactive)

    def beat(self) -> tuple[int, int]:
        """Return the steps made, and prompt tokens found computed, so far.

        Raises:
            InfrastructureError: If the engine has failed.
        """
        assert self._engine is not None, "not loaded"
        patience_s = LOST_TIMEOUTS * self._context.config.engine.rank_timeout_s
        self._deadline = time.monotonic() + patience_s
        if self._engine.failure is not None:
            raise self._engine.failure
        return self._engine.num_steps, self._engine.num_cached_tokens

    def _watch(self) -> None:
        """End this process once nobody asks for its life any more.

        Ray ends it with its replica, unless the daemon of its node is what is lost.
        """
        while time.monotonic() < self._deadline:
            time.sleep(CHECK_S)
        os._exit(1)
