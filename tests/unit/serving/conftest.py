"""The whole application in this process: real routes, files and engines; no Ray, no port."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import yaml
from openai import AsyncOpenAI

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.config import ServerConfig, parse_section
from granite_ray.engine.factory import make_engine
from granite_ray.io.storage import open_storage
from granite_ray.serving.answerer import Answerer
from granite_ray.serving.batch_runner import BatchRunner
from granite_ray.serving.calls import Replicas, ServedModel
from granite_ray.serving.gateway import Gateway
from granite_ray.serving.keys import load_keys
from granite_ray.serving.routes import make_app

KEY = "gr-alice-key"
OTHER_KEY = "gr-bob-key"
BASE = "http://127.0.0.1/"
FAKE = {"backend": "fake"}
NATIVE = {"backend": "native", "device": "cpu", "cache_gib": 0.2, "max_num_seqs": 16}


class Server:
    """A running application, and clients of it."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.app = make_app(gateway)

    def http(self, key: str | None = KEY, **headers: str) -> httpx2.AsyncClient:
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx2.AsyncClient(
            transport=transport, base_url=BASE, headers=headers, timeout=60, trust_env=False
        )

    def openai(self, key: str = KEY, max_retries: int = 0) -> AsyncOpenAI:
        return AsyncOpenAI(
            api_key=key,
            base_url=BASE + "v1",
            http_client=self.http(None),
            max_retries=max_retries,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Server"]:
        """Answer batches too."""
        runner = asyncio.create_task(BatchRunner(self.gateway).run())
        try:
            yield self
        finally:
            runner.cancel()
            await asyncio.gather(runner, return_exceptions=True)

    async def ended(self, batch_id: str, key: str = KEY) -> Any:
        """The batch once it has ended."""
        client = self.openai(key)
        async with asyncio.timeout(120):
            while True:
                batch = await client.batches.retrieve(batch_id)
                if batch.status in ("completed", "failed", "expired", "cancelled"):
                    return batch
                await asyncio.sleep(0.05)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return open_checkpoint(server_config({}).model)


@pytest.fixture(scope="module")
def answerers(checkpoint: Checkpoint) -> Iterator[Callable[..., Answerer]]:
    """Engines by their config, each loaded once."""
    loaded: dict[str, Answerer] = {}

    def load(config: ServerConfig) -> Answerer:
        key = f"{config.engine} {config.chunking}"
        if key not in loaded:
            loaded[key] = Answerer(
                checkpoint, config, make_engine(checkpoint, config.model, config.engine, 1)
            )
        return loaded[key]

    yield load
    for answerer in loaded.values():
        answerer.shutdown()


@pytest.fixture
def serve(
    checkpoint: Checkpoint, answerers: Callable[..., Answerer], tmp_path: Path
) -> Callable[..., Server]:
    """Make a server of config sections; `replicas` may stand in for the engine."""

    def make(replicas: Replicas | None = None, **sections: Any) -> Server:
        keys = write_keys(tmp_path)
        serving = {"keys_path": str(keys), "store_path": str(tmp_path / "store")}
        serving |= sections.pop("serve", {})
        config = server_config({"serve": serving, "engine": FAKE, **sections})
        model = ServedModel(
            checkpoint.name, checkpoint.tokenizer_path, checkpoint.max_model_len, 1_700_000_000
        )
        keys_found = load_keys(config.serve.keys_path)
        storage = open_storage(config.serve.store_path)
        answering = replicas or answerers(config)
        return Server(Gateway(config, model, keys_found, storage, answering))

    return make


def server_config(values: dict[str, Any]) -> ServerConfig:
    return parse_section(ServerConfig, values, Path())


def write_keys(folder: Path, **limits: Any) -> Path:
    """Two tenants; limits are the first one's."""
    entries = [
        {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()}
        for name, key in (("alice", KEY), ("bob", OTHER_KEY))
    ]
    entries[0] |= limits
    path = folder / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": entries}))
    return path


Running = AbstractAsyncContextManager[Server]
