"""Engines that hang on purpose, each in its own way, and a storage that takes its time."""

import asyncio
import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from granite_ray.checkpoint import Checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import Engine
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from tests.faults import TracedEngines

Way = Literal["waits", "holds_process"]


@dataclass(frozen=True, slots=True)
class HangingEngines:
    """Makes engines of which the first few never answer; see `TracedEngines` for what they note.

    `waits`: the call waits for ever, all else in its process goes on. `holds_process`: nothing in
    its process goes on, as in native code that does not come back.
    """

    folder: str
    num_hanging: int
    how: Way = "waits"

    def __call__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        engine: EngineConfig,
        num_threads: int | None = None,
    ) -> Engine:
        inner = self.traced(checkpoint, model, engine, num_threads)
        first = [process_id for process_id, _ in self.traced.replicas()[: self.num_hanging]]
        return HangingEngine(inner, self.how) if os.getpid() in first else inner

    @property
    def traced(self) -> TracedEngines:
        """What makes the engines inside."""
        return TracedEngines(self.folder)


class HangingEngine:
    """An engine that answers no call, and makes no step."""

    num_calls = num_steps = num_cached_tokens = 0

    def __init__(self, inner: Engine, how: Way) -> None:
        self._how = how
        self._never: list[asyncio.Future[Any]] = []  # what nobody holds, asyncio takes away
        self.count, self.shutdown = inner.count, inner.shutdown

    async def generate(self, *_: Prompt | SamplingParams | Grammar | None) -> Completion:
        if self._how == "holds_process":
            hold_process()
        return await self._wait()

    async def score(self, *_: Prompt | Sequence[tuple[int, ...]]) -> list[float]:
        return await self._wait()

    async def _wait(self) -> Any:
        self._never.append(asyncio.get_running_loop().create_future())
        return await self._never[-1]


def hold_process() -> None:
    """Lock a mutex twice, in native code that keeps the interpreter's lock; no signal ends that."""
    native, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(128)
    native.pthread_mutex_lock(mutex)
    native.pthread_mutex_lock(mutex)


@dataclass(frozen=True, slots=True)
class SlowUpload:
    """Holds every upload of a results file up; see `FaultyStorage`."""

    delay_s: float

    def __call__(self, name: str, path: str, when: str) -> None:
        if (name, when) == ("put_if_absent", "before") and "results/" in path:
            time.sleep(self.delay_s)
