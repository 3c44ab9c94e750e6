"""`run_job`: one config from documents to typed rows, resumable at any point.

plan shards → read documents → prepare chunks → generate answers → merge results → commit shards
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.cluster import Cluster
from granite_ray.config import JobConfig
from granite_ray.engine.factory import make_engine
from granite_ray.errors import ConfigError
from granite_ray.fingerprint import make_fingerprint
from granite_ray.interrupts import Interrupts
from granite_ray.io.commit import Generation
from granite_ray.io.sources import check_collisions
from granite_ray.io.storage import OpenedStorages, Storage, absolute, open_storage
from granite_ray.model.architecture import read_architecture
from granite_ray.output import hold_output, read_job
from granite_ray.parallel.place import check_size
from granite_ray.planning import InputPlan, limit_plan, plan_input
from granite_ray.progress import ProgressView
from granite_ray.records import output_schema
from granite_ray.report import RunReport
from granite_ray.resume import check_source, resume_plan
from granite_ray.run import TOO_MANY_FAILED, Run
from granite_ray.stages import MakeEngine, StageContext, task_limits
from granite_ray.tasks import Task, make_task
from granite_ray.tokenizer import load_tokenizer

QUICKSTART_CORPUS = Path(__file__).parent / "quickstart" / "corpus"
EMBEDDED_SOURCES = {
    "quickstart": QUICKSTART_CORPUS / "packages.parquet",
    "quickstart-changelogs": QUICKSTART_CORPUS / "changelogs.parquet",
}
"""What these names mean as `source.path`."""

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


@dataclass(frozen=True, slots=True)
class _Model:
    """What answers: the checkpoint, and the task with its prompts. No weights are loaded."""

    checkpoint: Checkpoint
    task: Task


def run_job(
    config: JobConfig,
    options: RunOptions = RunOptions(),
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
    config = _with_absolute_paths(config)
    model = _load_model(config)
    storages = OpenedStorages(open_storage)
    sink = storages(config.sink.path)
    report = RunReport(uuid.uuid4().hex[:12], config.task.kind, model.checkpoint.name, sink.root)
    with (
        ProgressView(console, sink, report.run_id) as view,
        Interrupts() as interrupts,
        Cluster(config.job, config.engine, on_start=interrupts.install) as cluster,
    ):
        if model.checkpoint.tokenizer_path != model.checkpoint.path:
            view.say(f"{config.model.path} has no tokenizer: the embedded one stands in")
        view.say("planning")
        with report.timed("plan"):
            plan = plan_input(config.source, sorted(model.task.columns), storages, cluster)
        context = _stage_context(config, model, plan, report.run_id, open_storage, make_engine)
        fingerprint = make_fingerprint(config, model.checkpoint.identity, context.schema)
        with (
            hold_output(sink, report, config.job.lease_s, view.say) as output,
            _counted_retries(storages, report),
        ):
            output.look(config, fingerprint, restart=options.restart)
            context = replace(context, generation=output.generation)
            to_do = limit_plan(plan, options.limit, config.source)
            resumption = resume_plan(to_do, output, redrive=options.redrive)
            if not options.allow_vanished:
                # What lies beyond a limit has not vanished, and is not deleted either.
                share = config.sink.max_vanished_fraction if options.limit is None else 1.0
                check_source(plan, output.snapshot, resumption, share)
            output.claim(config)
            run = Run(config.job, output, view, cluster, interrupts)
            run.commit_shards(to_do, resumption, context)
            run.judge(to_do, allow_failed=options.allow_failed)
            if options.limit is None and report.exit_code != TOO_MANY_FAILED:
                output.complete(run.files, plan.root)
    return report


def redrive_job(
    path: str,
    options: RunOptions = RunOptions(redrive=True),
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


@contextmanager
def _counted_retries(storages: OpenedStorages, report: RunReport) -> Iterator[None]:
    """Add the driver's own repeated calls to the report, however the run ends."""
    try:
        yield
    finally:
        report.storage_retries += storages.num_retries


def _with_absolute_paths(config: JobConfig) -> JobConfig:
    """Workers, and a later redrive, may stand in another folder."""
    paths = tuple(str(EMBEDDED_SOURCES.get(path) or absolute(path)) for path in config.source.path)
    source = config.source.model_copy(update={"path": paths})
    sink = config.sink.model_copy(update={"path": absolute(config.sink.path)})
    model = config.model
    if model.path != "quickstart" and Path(model.path).expanduser().is_dir():
        model = model.model_copy(update={"path": absolute(model.path)})
    return config.model_copy(update={"source": source, "sink": sink, "model": model})


def _load_model(config: JobConfig) -> _Model:
    """Open the checkpoint and make the task: all that they refuse is refused here."""
    checkpoint = open_checkpoint(config.model, weights_needed=config.engine.backend != "fake")
    if config.engine.backend == "native":
        num_experts = read_architecture(checkpoint.config).num_local_experts
        check_size(config.engine.expert_parallel_size, num_experts)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    return _Model(checkpoint, make_task(config.task, tokenizer, task_limits(config, checkpoint)))


def _stage_context(
    config: JobConfig,
    model: _Model,
    plan: InputPlan,
    run_id: str,
    open_storage: OpenStorage,
    make_engine: MakeEngine,
) -> StageContext:
    schema = output_schema(model.task.output_fields, plan.columns.keep_fields)
    check_collisions(
        plan.columns, schema.names[: len(schema.names) - len(plan.columns.keep_fields)]
    )
    constants = {"task": config.task.kind, "checkpoint": model.checkpoint.name}
    return StageContext(
        config=config,
        checkpoint=model.checkpoint,
        columns=plan.columns,
        source_root=plan.root,
        schema=schema.with_metadata(constants),
        max_chunk_tokens=model.task.max_chunk_tokens,
        generation=Generation(""),
        run_id=run_id,
        open_storage=open_storage,
        make_engine=make_engine,
    )
