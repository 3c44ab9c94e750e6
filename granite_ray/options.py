"""What is asked of a run beside its config, and what stands around it."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from granite_ray.io.storage import Storage
from granite_ray.stages import MakeEngine

OpenStorage = Callable[[str], Storage]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What is asked of one run, beside the config."""

    limit: int | None = None
    """Do the first so many documents of the plan; never deletes nor writes a snapshot."""
    restart: bool = False
    """Answer every document again; the new answers replace the old ones when complete."""
    allow_failed: bool = False
    """End with 0 instead of 3 where documents failed within `job.max_failed_fraction`."""
    allow_vanished: bool = False
    """Accept another source root, and any share of vanished files."""
    redrive: bool = False
    """Run failed rows again; other rows are taken over into the next revision of their shards."""


NOTHING_SPECIAL = RunOptions()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What opens storages and builds engines, and where progress is shown."""

    open_storage: OpenStorage
    make_engine: MakeEngine
    console: Console | None
