"""One batch on its way: the pieces that are missing, then its files, then its end.

Every step can be done twice: whoever dies in between, a later run arrives at the same files.
"""

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from granite_ray.errors import InfrastructureError
from granite_ray.serving.batch_store import Batch, BatchState, Status
from granite_ray.serving.batch_work import PIECE_SIZE, BatchWork, Unit
from granite_ray.serving.calls import ReplicaDiedError
from granite_ray.serving.errors import ApiError
from granite_ray.serving.gateway import Gateway

POLL_S = 1.0
MAX_SHARED_DEATHS = 2
"""Replicas that may die around a unit before it is asked by itself."""
MAX_LONE_DEATHS = 2
"""Replicas that may die around a unit that is asked by itself before it has failed."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
TRANSIENT = (429, 503, 504)


class UnitAsker:
    """Asks the replicas for the units of all batches, a bounded number at once.

    Args:
        max_in_flight: Units at once.
        first_wait_s: Seconds until a unit is asked again, for the first time; then twice as many.
    """

    def __init__(self, max_in_flight: int, first_wait_s: float = FIRST_WAIT_S) -> None:
        self._first_wait_s = first_wait_s
        self.pieces = asyncio.Semaphore(max(1, max_in_flight // PIECE_SIZE))
        self._alone = asyncio.Lock()

    async def ask(self, unit: Unit) -> Any:
        """Ask until there is an answer, as long as it takes.

        A unit around which replicas die is asked by itself; one that kills them then has failed.
        """
        deaths, wait_s = 0, self._first_wait_s
        while True:
            try:
                if deaths < MAX_SHARED_DEATHS:
                    return await unit(False)
                async with self._alone:
                    return await unit(deaths >= MAX_SHARED_DEATHS + MAX_LONE_DEATHS)
            except ReplicaDiedError:
                deaths += 1
            except InfrastructureError:
                pass  # nobody can answer now
            except ApiError as error:
                if error.status not in TRANSIENT:
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


class BatchRun:
    """One batch, from wherever it stands to its end."""

    def __init__(self, gateway: Gateway, batch: Batch, work: BatchWork, asker: UnitAsker) -> None:
        self._files = gateway.files
        self._store = gateway.batches
        self._batch = batch
        self._work = work
        self._asker = asker
        self._state = BatchState()
        self._writing = asyncio.Lock()

    async def run(self) -> Status:
        """Answer what is missing, make the files, and return how the batch has ended.

        Raises:
            StorageError: The storage fails.
        """
        self._state = await asyncio.to_thread(self._store.state, self._batch)
        end = await self._answer()
        await self._finish(end)
        return end

    async def _answer(self) -> Status:
        stored = await asyncio.to_thread(self._store.pieces, self._batch)
        counts = [self._work.count(data) for data in stored.values()]
        await self._move(
            self._state.moved(
                "in_progress",
                num_total=self._work.num_units,
                num_completed=sum(good for good, _ in counts),
                num_failed=sum(bad for _, bad in counts),
            )
        )
        missing = [piece for piece in self._work.pieces if piece not in stored]
        answering = asyncio.ensure_future(
            gather_or_cancel([self._answer_piece(piece) for piece in missing])
        )
        try:
            while not answering.done():
                await asyncio.wait([answering], timeout=POLL_S)
                if not answering.done() and (end := await self._early_end()) is not None:
                    return end
            await answering
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        return "completed"

    async def _early_end(self) -> Status | None:
        if time.time() > self._batch.expires_at:
            return "expired"
        is_cancelled = await asyncio.to_thread(self._store.is_cancelled, self._batch)
        return "cancelled" if is_cancelled else None

    async def _answer_piece(self, piece: str) -> None:
        async with self._asker.pieces:
            answers = await self._answer_together(piece)
            if answers is None:
                units = await asyncio.to_thread(self._work.units, piece)
                answers = await gather_or_cancel([self._asker.ask(unit) for unit in units])
            data = await asyncio.to_thread(self._work.encode, piece, answers)
            await asyncio.to_thread(self._store.put_piece, self._batch, piece, data)
        good, bad = self._work.count(data)
        await self._move(
            replace(
                self._state,
                num_completed=self._state.num_completed + good,
                num_failed=self._state.num_failed + bad,
            )
        )

    async def _answer_together(self, piece: str) -> Sequence[Any] | None:
        """Answer a piece by one call; None where its units must be asked one by one."""
        try:
            return await self._work.answer_together(piece)
        except InfrastructureError:
            return None  # a replica has died over it, or none can be had
        except ApiError as error:
            if error.status not in TRANSIENT:
                raise
            return None

    async def _finish(self, end: Status) -> None:
        """Make files of what is answered, and end the batch."""
        await self._move(self._state.moved("cancelling" if end == "cancelled" else "finalizing"))
        stored = await asyncio.to_thread(self._store.pieces, self._batch)
        unfinished = {"expired": "batch_expired", "cancelled": "batch_cancelled"}.get(end)
        output = await asyncio.to_thread(self._work.assemble, stored, unfinished)
        error_name = f"{self._batch.batch_id}_error.jsonl"
        ids = {
            "output_file_id": await self._put(output.results_name, output.results),
            "error_file_id": await self._put(error_name, output.errors),
        }
        await self._move(self._state.moved(end, **ids))
        await asyncio.to_thread(self._store.drop_pieces, self._batch)

    async def _put(self, filename: str, data: bytes | None) -> str | None:
        """Store a file under an id that is the same however often this is done."""
        if data is None:
            return None
        digest = hashlib.sha256(f"{self._batch.batch_id} {filename}".encode()).hexdigest()
        file_id = f"file-{digest[:32]}"
        name = self._batch.name
        await asyncio.to_thread(self._files.put, name, filename, data, "batch_output", file_id)
        return file_id

    async def _move(self, state: BatchState) -> None:
        """Write how far the batch is, one after the other: each replaces the one before."""
        self._state = state
        async with self._writing:
            await asyncio.to_thread(self._store.write_state, self._batch, self._state)


async def gather_or_cancel(calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Return all answers, or raise the first failure with no call left running."""
    running = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*running)
    finally:
        for call in running:
            call.cancel()
        await asyncio.gather(*running, return_exceptions=True)
