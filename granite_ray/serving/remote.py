"""The replicas of a deployment, as the gateway asks them. The one place that knows Serve's errors.

A call is cancelled there when it is cancelled here.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pyarrow as pa
import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from granite_ray.errors import InfrastructureError
from granite_ray.serving.calls import (
    CompletionCall,
    Delta,
    DocumentsCall,
    Refusal,
    ReplicaDiedError,
    Reply,
)

logger = logging.getLogger(__name__)


class RemoteReplicas:
    """All replicas behind a handle; see `Replicas` for what its methods promise."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def complete(
        self, call: CompletionCall, *, is_interactive: bool = True
    ) -> Reply | Refusal:
        """Answer at once."""
        reply: Reply | Refusal = await _answer(
            self._handle.complete.remote(call, is_interactive=is_interactive)
        )
        return reply

    async def stream(self, call: CompletionCall) -> AsyncGenerator[Delta | Reply | Refusal]:
        """Answer as it is written."""
        items: Any = self._streaming.stream.remote(call)
        try:
            async for item in items:
                yield item
        except Exception as error:
            raise _translated(error) from error
        finally:
            items.cancel()

    async def answer(
        self, call: DocumentsCall, *, is_interactive: bool = True
    ) -> pa.Table | Refusal:
        """Return the rows that a job would write for these documents."""
        rows: pa.Table | Refusal = await _answer(
            self._handle.answer.remote(call, is_interactive=is_interactive)
        )
        return rows

    async def check(self) -> None:
        """Raise InfrastructureError where nothing can answer now."""
        await _answer(self._handle.check.remote())


async def _answer(response: Any) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:
        raise _translated(error) from error


def _translated(error: Exception) -> InfrastructureError:
    """Tell a replica that died over a call from one that cannot be had."""
    if isinstance(error, ray.exceptions.RayActorError):
        return ReplicaDiedError("The replica died over this call.")
    if isinstance(error, ray.exceptions.RayTaskError):
        # What a replica says goes to the log; callers get plain words.
        logger.error("replica failed error=%s", error)
        return InfrastructureError("The replica failed.")
    if isinstance(error, RayServeException | ray.exceptions.RayError):
        return InfrastructureError("No replica can be had.")
    raise error
