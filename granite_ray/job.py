"""`run_job` and its kin: configs from documents to typed rows, resumable at any point."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from granite_ray.config import JobConfig
from granite_ray.engine.factory import make_engine
from granite_ray.errors import ConfigError, GraniteRayError
from granite_ray.interrupts import InterruptedRunError
from granite_ray.io.storage import absolute, open_storage
from granite_ray.options import NOTHING_SPECIAL, OpenStorage, RunOptions, Surroundings
from granite_ray.output import read_job
from granite_ray.passes import PassJob, run_pass
from granite_ray.report import RunReport
from granite_ray.stages import MakeEngine

__all__ = ["EndedJob", "RunOptions", "absolute_paths", "redrive_job", "run_job", "run_jobs"]

QUICKSTART_CORPUS = Path(__file__).parent / "quickstart" / "corpus"
EMBEDDED_SOURCES = {
    "quickstart": QUICKSTART_CORPUS / "packages.parquet",
    "quickstart-changelogs": QUICKSTART_CORPUS / "changelogs.parquet",
}
"""What these names mean as `source.path`."""


@dataclass(frozen=True, slots=True)
class EndedJob:
    """How one of several jobs ended; `error` is what `run_job` would have raised."""

    report: RunReport
    error: GraniteRayError | None = None

    @property
    def exit_code(self) -> int:
        """As `run_job` would have ended."""
        return self.report.exit_code if self.error is None else self.error.exit_code


def run_job(
    config: JobConfig,
    options: RunOptions = NOTHING_SPECIAL,
    *,
    open_storage: OpenStorage = open_storage,
    make_engine: MakeEngine = make_engine,
    console: Console | None = None,
) -> RunReport:
    """Run or resume a job; return its report (`exit_code` 0, 3 or 4).

    Args:
        config: The job.
        options: What is asked of this run.
        open_storage: Opens the source and the sink; a wrapper can stand between.
        make_engine: Builds the engine of each replica; a wrapper can stand between.
        console: Where progress is shown; None shows nothing.

    Raises:
        GraniteRayError: Whatever ends the run otherwise; it carries the exit code.
    """
    surroundings = Surroundings(open_storage, make_engine, console)
    [ended] = _run_jobs([config], options, surroundings)
    if ended.error is not None:
        raise ended.error
    return ended.report


def run_jobs(
    configs: Sequence[JobConfig],
    options: RunOptions = NOTHING_SPECIAL,
    *,
    open_storage: OpenStorage = open_storage,
    make_engine: MakeEngine = make_engine,
    console: Console | None = None,
) -> list[EndedJob]:
    """Run or resume several jobs; return how each ended, in their order.

    Jobs that agree in source, chunks, model and engine share one pass: a shard is read and
    prepared once, and all of them answer it side by side on the same replicas. Others follow
    one after the other. A job that fails for a reason of its own leaves the others alone.

    Args:
        configs: The jobs, each with an output of its own.
        options: What is asked of each.
        open_storage: Opens sources and sinks.
        make_engine: Builds the engine of each replica.
        console: Where progress is shown.

    Raises:
        ConfigError: If one of them is refused before any has begun.
    """
    paths = [absolute_paths(config).sink.path for config in configs]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"sink.path {path} is that of two jobs. Give each its own.")
    return _run_jobs(configs, options, Surroundings(open_storage, make_engine, console))


def redrive_job(
    path: str,
    options: RunOptions = NOTHING_SPECIAL,
    *,
    open_storage: OpenStorage = open_storage,
    make_engine: MakeEngine = make_engine,
    console: Console | None = None,
) -> RunReport:
    """Run the failed rows of an output again, from its stored config; return the report.

    Args:
        path: The job's `sink.path`.
        options: What else is asked of this run.
        open_storage: Opens the source and the sink.
        make_engine: Builds the engine of each replica.
        console: Where progress is shown.

    Raises:
        ConfigError: If there is no job.
        GraniteRayError: As `run_job`.
    """
    stored = read_job(open_storage(path))
    if stored is None:
        raise ConfigError(f"{path} holds no job. Give the sink.path of one that has run.")
    config = JobConfig.model_validate(
        stored["config"] | {"sink": stored["config"]["sink"] | {"path": path}}
    )
    options = replace(options, redrive=True)
    return run_job(
        config, options, open_storage=open_storage, make_engine=make_engine, console=console
    )


def absolute_paths(config: JobConfig) -> JobConfig:
    """Spell local paths in full: workers, and a later redrive, may stand in another folder.

    What the package carries keeps its name, which means the same on another machine.
    """
    paths = tuple(p if p in EMBEDDED_SOURCES else absolute(p) for p in config.source.path)
    source = config.source.model_copy(update={"path": paths})
    sink = config.sink.model_copy(update={"path": absolute(config.sink.path)})
    model = config.model
    if model.path != "quickstart" and Path(model.path).expanduser().is_dir():
        model = model.model_copy(update={"path": absolute(model.path)})
    return config.model_copy(update={"source": source, "sink": sink, "model": model})


def _with_embedded_source(config: JobConfig) -> JobConfig:
    paths = tuple(str(EMBEDDED_SOURCES.get(path, path)) for path in config.source.path)
    return config.model_copy(update={"source": config.source.model_copy(update={"path": paths})})


def _run_jobs(
    configs: Sequence[JobConfig], options: RunOptions, surroundings: Surroundings
) -> list[EndedJob]:
    resolved = [_with_embedded_source(absolute_paths(config)) for config in configs]
    jobs = {at: PassJob(config, options, surroundings) for at, config in enumerate(resolved)}
    ended: dict[int, EndedJob] = {}
    while jobs:
        first = next(iter(jobs.values()))
        apart = {at: job.differs_from(first) for at, job in jobs.items()}
        sharing = [at for at, names in apart.items() if not names]
        for at in sorted(apart.keys() - sharing):
            first.say(f"{jobs[at].name} follows: its pass is another, by {', '.join(apart[at])}")
        run_pass([jobs[at] for at in sharing], surroundings)
        for at in sharing:
            job = jobs.pop(at)
            if job.is_left:  # its turn comes again, without the one that broke the pass off
                jobs[at] = PassJob(resolved[at], options, surroundings)
            else:
                ended[at] = EndedJob(job.report, job.error)
            if isinstance(job.error, InterruptedRunError):
                ended |= {left: EndedJob(rest.report, job.error) for left, rest in jobs.items()}
                return [ended[at] for at in range(len(configs))]
    return [ended[at] for at in range(len(configs))]
