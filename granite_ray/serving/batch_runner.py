"""Runs the batches that were accepted, of all callers, until each has ended; then waits for more.

One runner at a time holds the lease of the store. What is answered is stored piece by piece, so a
runner that comes later does only what is missing.
"""

import asyncio
import logging
import uuid
from contextlib import suppress

from granite_ray.errors import CorruptInputError, InfrastructureError, LeaseError
from granite_ray.io.lease import Lease
from granite_ray.serving.batch_documents import DocumentWork
from granite_ray.serving.batch_requests import RequestWork
from granite_ray.serving.batch_run import BatchRun, UnitAsker
from granite_ray.serving.batch_store import Batch, Status
from granite_ray.serving.batch_work import BatchWork, UnusableInputError
from granite_ray.serving.errors import ApiError
from granite_ray.serving.gateway import Gateway

LEASE_S = 15.0
POLL_S = 1.0
LOOK_S = 5.0
"""How often the storage is asked for batches that another gateway accepted."""
MAX_BATCHES_AT_ONCE = 8

logger = logging.getLogger(__name__)


class BatchRunner:
    """The one who answers batches, from `run` until it is cancelled."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._store = gateway.batches
        self._asker = UnitAsker(gateway.config.serve.max_batch_in_flight)

    async def run(self) -> None:
        """Run batches for ever; what fails is tried again, the lease first of all."""
        while True:
            lease = Lease(self._store.storage, uuid.uuid4().hex, LEASE_S)
            try:
                await asyncio.to_thread(lease.acquire)
            except (LeaseError, InfrastructureError):
                await asyncio.sleep(POLL_S)  # another gateway is still there, or storage fails
                continue
            try:
                await self._run_all(lease)
            except (LeaseError, InfrastructureError, FileExistsError) as error:
                logger.warning("batch runner begins again error=%s", error)
            except Exception:
                # The batches of all callers wait for this loop: no bug may end it unheard.
                logger.exception("batch runner failed, and begins again")
            finally:
                with suppress(InfrastructureError, FileExistsError):
                    lease.release()
            await asyncio.sleep(POLL_S)

    async def _run_all(self, lease: Lease) -> None:
        """Start what is accepted and look after what runs, while the lease is ours."""
        running: dict[str, asyncio.Task[None]] = {}
        names = self._gateway.keys.names
        try:
            while True:
                if lease.is_lost:
                    raise LeaseError("Another gateway runs the batches.")
                for batch in await asyncio.to_thread(self._store.unfinished, names):
                    if batch.batch_id not in running and len(running) < MAX_BATCHES_AT_ONCE:
                        task = asyncio.create_task(self._run(batch))
                        task.add_done_callback(lambda _: self._gateway.has_new_batch.set())
                        running[batch.batch_id] = task
                await self._wait_for_news()
                for batch_id in [one for one, task in running.items() if task.done()]:
                    await running.pop(batch_id)
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def _wait_for_news(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._gateway.has_new_batch.wait(), LOOK_S)
        self._gateway.has_new_batch.clear()

    async def _run(self, batch: Batch) -> None:
        """Bring one batch to its end; storage that fails is for the next try."""
        logger.info("batch begins id=%s caller=%s", batch.batch_id, batch.name)
        status: Status
        try:
            work = await asyncio.to_thread(open_work, self._gateway, batch)
            status = await BatchRun(self._gateway, batch, work, self._asker).run()
        except UnusableInputError as error:
            status = await self._fail(batch, error.problems)
        except CorruptInputError:
            status = await self._fail(batch, ("The file cannot be read to its end.",))
        except (InfrastructureError, FileExistsError):
            raise
        except Exception:
            # A bug must cost this batch alone, and not every batch for ever.
            logger.exception("batch failed id=%s", batch.batch_id)
            status = await self._fail(batch, ("The server failed on this batch.",))
        logger.info("batch ends id=%s caller=%s status=%s", batch.batch_id, batch.name, status)

    async def _fail(self, batch: Batch, problems: tuple[str, ...]) -> Status:
        state = await asyncio.to_thread(self._store.state, batch)
        failed = state.moved("failed", problems=problems)
        await asyncio.to_thread(self._store.write_state, batch, failed)
        return "failed"


def open_work(gateway: Gateway, batch: Batch) -> BatchWork:
    """Read a batch's input; it blocks.

    Raises:
        UnusableInputError: It cannot be a batch.
        StorageError: It cannot be read now.
    """
    try:
        if batch.question is None:
            return RequestWork(gateway, batch)
        return DocumentWork(gateway, batch)
    except ApiError as error:
        raise UnusableInputError([error.message]) from error
