"""What all routes share: who answers, what it costs, what is stored. No HTTP, no Ray."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from granite_ray.config import ServerConfig, TaskConfig
from granite_ray.errors import InfrastructureError
from granite_ray.io.storage import Storage
from granite_ray.serving.answering import TaskCache
from granite_ray.serving.batch_store import BatchStore
from granite_ray.serving.calls import (
    CompletionCall,
    Delta,
    DocumentsCall,
    Refusal,
    Replicas,
    Reply,
    ServedModel,
)
from granite_ray.serving.errors import ApiError, refused, unavailable
from granite_ray.serving.files import FileStore
from granite_ray.serving.keys import Caller, Keys
from granite_ray.serving.limits import Limits
from granite_ray.serving.metrics import Metrics
from granite_ray.tokenizer import load_tokenizer

Found = TypeVar("Found")
logger = logging.getLogger(__name__)


class Gateway:
    """The one place through which requests and batches reach the replicas."""

    def __init__(
        self,
        config: ServerConfig,
        model: ServedModel,
        keys: Keys,
        storage: Storage,
        replicas: Replicas,
    ) -> None:
        self.config = config
        self.model = model
        self.keys = keys
        self.replicas = replicas
        self.files = FileStore(storage)
        self.batches = BatchStore(storage)
        self.limits = Limits(config.serve.max_in_flight)
        self.metrics = Metrics(lambda: self.limits.num_in_flight)
        self.tasks = TaskCache(
            load_tokenizer(model.tokenizer_path), model.max_model_len, config.chunking
        )
        self.has_new_batch = asyncio.Event()

    async def complete(self, call: CompletionCall, caller: Caller | None = None) -> Reply:
        """Answer a call; one without a caller is a batch's, which nobody waits for.

        Raises:
            ApiError: It is refused, the limits are reached, or nobody can answer now.
            InfrastructureError: As the last, for a batch, which tries again.
        """
        is_interactive = caller is not None
        reply = await self._ask(
            lambda: self.replicas.complete(call, is_interactive=is_interactive), caller
        )
        self._note(reply, is_interactive=is_interactive)
        return reply

    async def stream(
        self, call: CompletionCall, caller: Caller
    ) -> AsyncGenerator[Delta | Reply | Refusal]:
        """Answer as it is written; whatever ends it early is its last item."""
        seconds = self.config.serve.timeout_s
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            with self.limits.admitted(caller):
                async with aclosing(self.replicas.stream(call)) as items:
                    # Each item by itself: whoever takes the first may be another than takes the
                    # next, and a time limit belongs to the one that set it.
                    while (item := await _next(items, deadline)) is not None:
                        if isinstance(item, Reply):
                            self._note(item, is_interactive=True)
                        yield item
        except ApiError as error:
            yield Refusal(error.status, error.message, error.code, error.retry_after_s is not None)
        except TimeoutError:
            yield Refusal(504, f"No answer in {seconds:g} s.", "timeout", is_transient=True)
        except InfrastructureError:
            yield Refusal(503, unavailable().message, "unavailable", is_transient=True)

    async def answer(
        self,
        raw: pa.Table,
        task: TaskConfig,
        text_column: str = "text",
        caller: Caller | None = None,
        *,
        is_deadly: bool = False,
    ) -> pa.Table:
        """Return the rows of documents; raises as `complete`."""
        is_interactive = caller is not None
        call = DocumentsCall(raw, task, text_column, is_deadly)
        rows = await self._ask(
            lambda: self.replicas.answer(call, is_interactive=is_interactive), caller
        )
        self._note_rows(rows, is_interactive=is_interactive)
        return rows

    def _note_rows(self, rows: pa.Table, *, is_interactive: bool) -> None:
        """Count what rows have cost."""
        num_failed = pc.sum(pc.equal(rows["status"], "failed")).as_py() or 0
        num_ok = rows.num_rows - num_failed
        self.metrics.note_documents(num_ok, num_failed, is_interactive=is_interactive)
        sums = [
            pc.sum(rows[name]).as_py() or 0
            for name in ("num_prompt_tokens", "num_completion_tokens")
        ]
        self.metrics.note_tokens(*sums, is_interactive=is_interactive)

    async def is_ready(self) -> bool:
        """Tell whether a replica answers."""
        try:
            async with asyncio.timeout(5):
                await self.replicas.check()
        except (InfrastructureError, TimeoutError):
            return False
        return True

    async def _ask(
        self, ask: "Callable[[], Awaitable[Found | Refusal]]", caller: Caller | None
    ) -> Found:
        if caller is None:
            return _unwrapped(await ask())
        seconds = self.config.serve.timeout_s
        with self.limits.admitted(caller):
            try:
                async with asyncio.timeout(seconds):
                    return _unwrapped(await ask())
            except TimeoutError:
                raise ApiError(
                    504, f"No answer in {seconds:g} s.", "timeout", retry_after_s=1
                ) from None
            except InfrastructureError as error:
                logger.warning("no replica answered error=%s", error)
                raise unavailable() from error

    def _note(self, reply: Reply, *, is_interactive: bool) -> None:
        self.metrics.note_tokens(
            reply.num_prompt_tokens, reply.num_completion_tokens, is_interactive=is_interactive
        )


async def _next(
    items: AsyncGenerator[Delta | Reply | Refusal], deadline: float
) -> Delta | Reply | Refusal | None:
    async with asyncio.timeout_at(deadline):
        return await anext(items, None)


def new_seed() -> int:
    """Return a seed for who gave none."""
    return secrets.randbelow(2**62)


def _unwrapped(found: Found | Refusal) -> Found:
    if isinstance(found, Refusal):
        raise refused(found)
    return found
