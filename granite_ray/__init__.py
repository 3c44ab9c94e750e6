"""IBM Granite language models over whole document corpora on Ray.

plan shards → read documents → prepare chunks → generate answers → merge results → commit shards
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite_ray.config import JobConfig, load_config
    from granite_ray.errors import GraniteRayError
    from granite_ray.evaluation import Evaluation, evaluate
    from granite_ray.io.results import read_results
    from granite_ray.job import EndedJob, RunOptions, redrive_job, run_job, run_jobs
    from granite_ray.report import RunReport

__all__ = [
    "EndedJob",
    "Evaluation",
    "GraniteRayError",
    "JobConfig",
    "RunOptions",
    "RunReport",
    "evaluate",
    "load_config",
    "read_results",
    "redrive_job",
    "run_job",
    "run_jobs",
]

# A node whose daemon stands still neither answers nor refuses. Ray asks after five minutes of
# silence whether a peer is there, and waits two more: longer than job.scheduling_timeout_s. Its
# servers allow being asked every minute (src/ray/rpc/grpc_server.cc). These are read as `ray` is
# imported: a program that imports it first keeps Ray's own.
os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "65000")
os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "20000")

# A job starts many processes, each of which imports this package and needs little of it.
_MODULES = {
    "config": ("JobConfig", "load_config"),
    "errors": ("GraniteRayError",),
    "evaluation": ("Evaluation", "evaluate"),
    "io.results": ("read_results",),
    "job": ("EndedJob", "RunOptions", "redrive_job", "run_job", "run_jobs"),
    "report": ("RunReport",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what a public name stands for when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return [*globals(), *__all__]
