"""`granite-ray serve`: the application in the foreground, from its start to its drained end."""

import logging
import socket
import threading
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from rich.console import Console

from granite_ray.cluster import Cluster
from granite_ray.config import ServerConfig
from granite_ray.errors import ConfigError, InfrastructureError
from granite_ray.interrupts import Interrupts
from granite_ray.serving.app import check_server, make_application, with_absolute_paths

APP_NAME = "granite-ray"
POLL_S = 0.2


def run_server(config: ServerConfig, console: Console | None = None) -> int:
    """Serve until SIGINT or SIGTERM, then let requests in flight finish; return 0.

    Args:
        config: What is served.
        console: Where it is told when and where it answers.

    Raises:
        ConfigError: It cannot work; nothing has started.
        InfrastructureError: Ray cannot be had, or the replicas do not start.
    """
    config = with_absolute_paths(config)
    check_server(config)
    host, port = _address(config)
    with (
        Interrupts() as interrupts,
        Cluster(config.job, config.engine, on_start=interrupts.install) as cluster,
        interrupts.deferred(),
    ):
        _say(console, "starting Ray and the replicas")
        cluster.place_replicas()
        _refuse_second_serve()
        try:
            _start(config, host, port)
            interrupts.install()
            shown = f"[{host}]" if ":" in host else host
            _say(console, f"serving {config.model.path} at http://{shown}:{port}/")
            while interrupts.signal_number is None:
                threading.Event().wait(POLL_S)
            _say(console, f"stopping: requests in flight have {config.serve.drain_s:g} s")
            serve.delete(APP_NAME)
        finally:
            serve.shutdown()
    return 0


def _start(config: ServerConfig, host: str, port: int) -> None:
    quiet = {"enable_access_log": False, "log_level": "INFO"}
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"host": host, "port": port}
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=quiet)
    try:
        serve.run(make_application(config), name=APP_NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise InfrastructureError(f"The replicas did not start: {error}") from error


def _address(config: ServerConfig) -> tuple[str, int]:
    """Return host and port, and refuse a port that is taken; 0 becomes a free one.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    host, port = config.serve.host, config.serve.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return host, probe.getsockname()[1]
    except OSError as error:
        raise ConfigError(
            f"serve.host {host} with serve.port {port} cannot be listened on: {error.strerror}. "
            "Choose another port; 0 takes a free one."
        ) from error


def _refuse_second_serve() -> None:
    """Another Serve on this cluster has its own address, and would be shut down with ours."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    if any(actor["name"].startswith("SERVE_CONTROLLER") for actor in actors):
        raise InfrastructureError(
            "This Ray cluster has Serve running already. Deploy there with `serve deploy` (see "
            "configs/serve_deploy.yaml), or stop it."
        )


def _say(console: Console | None, message: str) -> None:
    if console is not None:
        console.print(message, highlight=False, markup=False, soft_wrap=True)
