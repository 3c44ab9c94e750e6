"""What does HTTP cost? Requests at once through `granite-ray serve`, and straight at the engine.

Both run the embedded checkpoint on one replica, with the same prompts and the same lengths; each
has the machine to itself. Then interactive requests are timed with and without a batch of
documents beside them.
"""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import yaml

from granite_ray.checkpoint import open_checkpoint
from granite_ray.config import ServerConfig, parse_section
from granite_ray.engine.factory import make_engine
from granite_ray.records import SamplingParams
from granite_ray.serving.answerer import Answerer
from granite_ray.serving.calls import CompletionCall, Reply

LEVELS = (1, 8, 64)
ENGINE = {"backend": "native", "device": "cpu", "max_num_seqs": 64, "cache_gib": 1.0}

Ask = Callable[[int], Awaitable[int]]
"""Sends request number so-and-so; returns the tokens of its answer."""


@dataclass
class Timing:
    tokens_per_s: float
    requests_per_s: float
    latencies_s: list[float]

    def words(self) -> str:
        cuts = statistics.quantiles(self.latencies_s, n=100)
        return (
            f"{self.requests_per_s:8.2f} requests/s {self.tokens_per_s:9.1f} tokens/s   "
            f"p50 {cuts[49]:6.2f} s   p95 {cuts[94]:6.2f} s   p99 {cuts[98]:6.2f} s"
        )


def prompt(number: int) -> str:
    return f"Package {number}: a library that reads archives, lists what is in them and extracts it"


async def load(ask: Ask, concurrency: int, num_requests: int) -> Timing:
    """Keep so many requests in flight until all are answered."""
    numbers = iter(range(num_requests))
    latencies: list[float] = []
    num_tokens = 0

    async def worker() -> None:
        nonlocal num_tokens
        for number in numbers:
            started = time.monotonic()
            tokens = await ask(number)
            num_tokens += tokens
            latencies.append(time.monotonic() - started)

    started = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    seconds = time.monotonic() - started
    return Timing(num_tokens / seconds, num_requests / seconds, latencies)


def model_of(options: argparse.Namespace) -> dict[str, str]:
    if options.model == "quickstart":
        return {"path": options.model}
    return {"path": options.model, "load_format": "dummy"}


async def bare(levels: list[int], options: argparse.Namespace) -> dict[int, Timing]:
    config = parse_section(ServerConfig, {"engine": ENGINE, "model": model_of(options)}, Path())
    checkpoint = open_checkpoint(config.model)
    engine = make_engine(checkpoint, config.model, config.engine, options.threads)
    answerer = Answerer(checkpoint, config, engine)

    async def ask(number: int) -> int:
        sampling = SamplingParams(options.tokens, seed=number)
        call = CompletionCall(sampling, options.tokens, options.tokens, prompts=(prompt(number),))
        reply = await answerer.complete(call)
        assert isinstance(reply, Reply)
        return reply.num_completion_tokens

    await load(ask, 8, 8)
    timings = {level: await load(ask, level, options.requests) for level in levels}
    answerer.shutdown()
    return timings


@contextmanager
def server(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    config = {
        "model": model_of(options),
        "engine": ENGINE,
        "serve": {"port": 0, "store_path": str(folder / "store"), "max_documents": 32},
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "granite_ray.cli", "serve", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("serving "):
                yield line.split()[-1].rstrip("/")
                break
        else:
            raise SystemExit("the server did not start")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def http_ask(client: httpx2.AsyncClient, model: str, num_tokens: int) -> Ask:
    async def ask(number: int) -> int:
        body = {
            "model": model,
            "prompt": prompt(number),
            "max_tokens": num_tokens,
            "temperature": 0,
            "seed": number,
        }
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        return int(response.json()["usage"]["completion_tokens"])

    return ask


async def begin_batch(client: httpx2.AsyncClient, num_documents: int) -> str:
    documents = [prompt(number) * 4 for number in range(num_documents)]
    task = {"kind": "summarize", "length": "sentence", "max_tokens": 64}
    response = await client.post("/v1/summarize", json={"documents": documents, "task": task})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


async def over_http(
    url: str, options: argparse.Namespace
) -> tuple[dict[int, Timing], list[Timing]]:
    limits = httpx2.Limits(max_connections=256)
    async with httpx2.AsyncClient(
        base_url=url, timeout=900, limits=limits, trust_env=False
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        ask = http_ask(client, model, options.tokens)
        await load(ask, 8, 8)
        timings = {level: await load(ask, level, options.requests) for level in LEVELS}
        alone = await load(ask, 1, options.interactive)
        batch_id = await begin_batch(client, options.documents)
        while (await client.get(f"/v1/batches/{batch_id}")).json()["status"] != "in_progress":
            await asyncio.sleep(0.2)
        beside = await load(ask, 1, options.interactive)
        batch = (await client.get(f"/v1/batches/{batch_id}")).json()
        print(f"batch while timed: {json.dumps(batch['request_counts'])}, {batch['status']}")
        await client.post(f"/v1/batches/{batch_id}/cancel")
        return timings, [alone, beside]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=128, help="at each concurrency")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--interactive", type=int, default=30, help="requests beside the batch")
    parser.add_argument("--documents", type=int, default=1000, help="of the batch")
    parser.add_argument("--threads", type=int, default=2, help="of the bare engine")
    parser.add_argument("--model", default="quickstart", help="or a folder of shapes, run as dummy")
    options = parser.parse_args()
    engine = asyncio.run(bare(list(LEVELS), options))
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), options) as url:
        http, (alone, beside) = asyncio.run(over_http(url, options))
    for level in LEVELS:
        kept = http[level].tokens_per_s / engine[level].tokens_per_s
        print(f"concurrency {level}")
        print(f"  engine {engine[level].words()}")
        print(f"  http   {http[level].words()}   kept {kept:.1%}")
    print(f"interactive, alone               {alone.words()}")
    print(f"interactive, beside a batch      {beside.words()}")


if __name__ == "__main__":
    main()
