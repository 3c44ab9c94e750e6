"""The Ray actor that holds one rank of a replica: its process, its device, its engine."""

import os
from collections.abc import Sequence
from typing import Any

import ray

from granite_ray.engine.factory import Engine
from granite_ray.parallel.place import RankPlace
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from granite_ray.stages import ReplicaContext, local_checkpoint


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait. Call it before torch is loaded.

    They spin by default, which on busy cores makes one batch take twenty times as long as another.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class RankWorker:
    """The actor that holds one rank."""

    def __init__(self, context: ReplicaContext) -> None:
        wait_passively()
        self._context = context
        self._engine: Engine | None = None
        self._meeting: Any = None

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
        if self._engine.failure is not None:
            raise self._engine.failure
        return self._engine.num_steps, self._engine.num_cached_tokens
