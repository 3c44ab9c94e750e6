"""The application as Ray Serve runs it: one gateway, and the replicas that hold the engine.

Thin shells around `app` and `answerer`. `build` is the import path for `serve deploy`.
"""

import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.cluster import ReplicaResources, size_replicas
from granite_ray.config import ServerConfig, load_server_config
from granite_ray.engine.factory import make_engine
from granite_ray.errors import ConfigError
from granite_ray.io.storage import absolute, open_storage
from granite_ray.rank_worker import wait_briefly
from granite_ray.ranks import remove_ranks
from granite_ray.serving.answerer import Answerer
from granite_ray.serving.answering import TaskCache
from granite_ray.serving.calls import (
    CompletionCall,
    Delta,
    DocumentsCall,
    Refusal,
    Reply,
    ServedModel,
)
from granite_ray.serving.gateway import Gateway
from granite_ray.serving.guard import App
from granite_ray.serving.keys import load_keys
from granite_ray.serving.remote import RemoteReplicas
from granite_ray.serving.routes import make_app
from granite_ray.stages import MakeEngine, local_checkpoint
from granite_ray.tokenizer import load_tokenizer
from granite_ray.workers import start_engine

HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 30.0
SPARE_CALLS = 16
"""Health checks and questions of readiness beside the calls that the limits allow."""
GATEWAY_CPUS = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What a replica needs of its surroundings; see `ReplicaContext`."""

    config: ServerConfig
    checkpoint: Checkpoint
    run_id: str
    make_engine: MakeEngine


class GraniteDeployment:
    """One replica: the model is loaded once, and everything in flight shares its engine."""

    def __init__(self, context: ServerContext, resources: ReplicaResources) -> None:
        wait_briefly()
        if resources.rank_bundle is not None:
            # Ray keeps the room of ranks whose replica was killed, and nobody could have it.
            remove_ranks(context.run_id, living=_living_actors())
        checkpoint = local_checkpoint(context)
        self._engine = start_engine(context, checkpoint, resources)
        self._answerer = Answerer(checkpoint, context.config, self._engine)

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)  # none where the constructor failed
        if engine is not None:
            engine.shutdown()

    async def complete(self, call: CompletionCall, *, is_interactive: bool) -> Reply | Refusal:
        """Answer at once."""
        return await self._answerer.complete(call, is_interactive=is_interactive)

    async def stream(self, call: CompletionCall) -> AsyncGenerator[Delta | Reply | Refusal]:
        """Answer as it is written."""
        async with aclosing(self._answerer.stream(call)) as items:
            async for item in items:
                yield item

    async def answer(self, call: DocumentsCall, *, is_interactive: bool) -> pa.Table | Refusal:
        """Return the rows that a job would write for these documents."""
        return await self._answerer.answer(call, is_interactive=is_interactive)

    async def check(self) -> None:
        """Raise where the engine is broken or hangs."""
        await self._answerer.check()

    async def check_health(self) -> None:
        """Tell Serve, which replaces a replica that raises."""
        await self._answerer.check()

    async def num_steps(self) -> int:
        """Steps of the engine so far."""
        return self._answerer.num_steps


@serve.ingress()
class GatewayDeployment:
    """The one process that callers reach."""

    def __init__(
        self, config: ServerConfig, model: ServedModel, engine: "DeploymentHandle[Any]"
    ) -> None:
        _log_beside_serve()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._gateway = Gateway(
            config,
            model,
            load_keys(config.serve.keys_path),
            open_storage(config.serve.store_path),
            RemoteReplicas(engine),
        )

    async def __serve_build_asgi_app__(self) -> App:
        """Return what answers HTTP here."""
        return make_app(self._gateway)


def _living_actors() -> frozenset[str]:
    """Return the ids of all actors with a name that live, all replicas among them."""
    handles = [
        ray.get_actor(actor["name"], actor["namespace"])
        for actor in ray.util.list_named_actors(all_namespaces=True)
    ]
    return frozenset(handle._actor_id.hex() for handle in handles)


def _log_beside_serve() -> None:
    """Write our log, the request log in it, where Serve writes its own."""
    own = logging.getLogger("granite_ray")
    own.setLevel(logging.INFO)
    for handler in logging.getLogger("ray.serve").handlers:
        own.addHandler(handler)


def build(args: Mapping[str, str]) -> serve.Application:
    """Return the application for `serve run` and `serve deploy`.

    Args:
        args: `config`, the path of the file that `granite-ray serve` takes.

    Raises:
        ConfigError: It cannot work; nothing has started.
    """
    if set(args) != {"config"}:
        raise ConfigError("args must be exactly config: the path of the server's YAML file.")
    return make_application(load_server_config(args["config"]))


def make_application(config: ServerConfig) -> serve.Application:
    """Return the application; Ray runs already.

    Raises:
        ConfigError: It cannot work.
    """
    config = with_absolute_paths(config)
    checkpoint = check_server(config)
    names = checkpoint.name, checkpoint.tokenizer_path, checkpoint.max_model_len
    model = ServedModel(*names, created=int(time.time()))
    resources = size_replicas(config.engine)
    engine = serve.deployment(name="engine", **engine_options(config, resources))
    gateway = serve.deployment(
        name="gateway",
        num_replicas=1,  # limits are exact, and one process runs the batches
        max_ongoing_requests=2 * config.serve.max_in_flight + SPARE_CALLS,
        graceful_shutdown_timeout_s=config.serve.drain_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options={"num_cpus": GATEWAY_CPUS},
    )
    context = ServerContext(config, checkpoint, uuid.uuid4().hex[:12], make_engine)
    replicas = engine(GraniteDeployment).bind(context, resources)
    application: serve.Application = gateway(GatewayDeployment).bind(config, model, replicas)
    return application


def check_server(config: ServerConfig) -> Checkpoint:
    """Open the checkpoint, the keys and every task: all that they refuse is refused here.

    Raises:
        ConfigError: Naming the field.
    """
    load_keys(config.serve.keys_path)
    checkpoint = open_checkpoint(config.model, weights_needed=config.engine.backend != "fake")
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    cache = TaskCache(tokenizer, checkpoint.max_model_len, config.chunking)
    for name, task in config.tasks.items():
        try:
            cache.task(task)
        except ConfigError as error:
            raise ConfigError(f"Task {name!r}: {error}") from error
    return checkpoint


def with_absolute_paths(config: ServerConfig) -> ServerConfig:
    """Replicas stand in other folders."""
    paths = {"store_path": absolute(config.serve.store_path)}
    if config.serve.keys_path is not None:
        paths["keys_path"] = absolute(config.serve.keys_path)
    model = config.model
    if model.path != "quickstart" and Path(model.path).expanduser().is_dir():
        model = model.model_copy(update={"path": absolute(model.path)})
    return config.model_copy(
        update={"serve": config.serve.model_copy(update=paths), "model": model}
    )


def engine_options(config: ServerConfig, resources: ReplicaResources) -> dict[str, Any]:
    """Return what Serve is told of the replicas."""
    serving, wanted = config.serve, config.engine.num_replicas
    options: dict[str, Any] = {
        # Interactive calls never wait for a place that a batch holds.
        "max_ongoing_requests": serving.max_in_flight + serving.max_batch_in_flight + SPARE_CALLS,
        "graceful_shutdown_timeout_s": serving.drain_s,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "ray_actor_options": {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus},
    }
    if isinstance(wanted, int):
        return {**options, "num_replicas": wanted}
    least, most = wanted
    return {
        **options,
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": config.engine.max_num_seqs,
        },
    }
