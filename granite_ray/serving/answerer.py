"""All that one replica answers: a checkpoint's engine behind the calls of the gateway."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

import pyarrow as pa

from granite_ray.checkpoint import Checkpoint
from granite_ray.config import ServerConfig
from granite_ray.engine.factory import Engine
from granite_ray.errors import InfrastructureError
from granite_ray.programs import StallWatch
from granite_ray.serving.answering import DocumentAnswerer
from granite_ray.serving.calls import CompletionCall, Delta, DocumentsCall, Refusal, Reply
from granite_ray.serving.completing import Completer
from granite_ray.tokenizer import load_tokenizer


class Answerer:
    """One replica's engine, loaded already; see `Replicas` for what its methods promise."""

    def __init__(self, checkpoint: Checkpoint, config: ServerConfig, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        longest = checkpoint.max_model_len
        self._completer = Completer(self._engine, tokenizer, longest)
        self._documents = DocumentAnswerer(
            self._engine, tokenizer, checkpoint.name, longest, config
        )
        self._stall = StallWatch(config.job.scheduling_timeout_s)
        self._num_in_flight = 0
        self._error: InfrastructureError | None = None

    @property
    def num_steps(self) -> int:
        """Steps of the engine so far: they stand still where nothing is asked."""
        return self._engine.num_steps

    async def complete(
        self, call: CompletionCall, *, is_interactive: bool = True
    ) -> Reply | Refusal:
        """Answer at once."""
        with self._watched():
            return await self._completer.complete(call, is_interactive=is_interactive)

    async def stream(self, call: CompletionCall) -> AsyncGenerator[Delta | Reply | Refusal]:
        """Answer as it is written."""
        with self._watched():
            async with aclosing(self._completer.stream(call)) as items:
                async for item in items:
                    yield item

    async def answer(
        self, call: DocumentsCall, *, is_interactive: bool = True
    ) -> pa.Table | Refusal:
        """Return the rows that a job would write for these documents."""
        with self._watched():
            return await self._documents.answer(call, is_interactive=is_interactive)

    async def check(self) -> None:
        """Raise InfrastructureError where the engine is broken or hangs."""
        broken = self._engine.failure or self._error
        if broken is not None:
            raise InfrastructureError(str(broken))
        if self._stall.look(time.monotonic(), self._num_in_flight, self._engine.num_steps):
            raise InfrastructureError(
                f"The engine hangs: {self._num_in_flight} calls are in flight, and it has made no "
                f"step for {self._config.job.scheduling_timeout_s:g} s."
            )

    def shutdown(self) -> None:
        """End the engine within a bounded time."""
        self._engine.shutdown()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Count a call while it is in flight, and remember where the engine broke."""
        self._num_in_flight += 1
        try:
            yield
        except InfrastructureError as error:
            self._error = error
            raise
        finally:
            self._num_in_flight -= 1
