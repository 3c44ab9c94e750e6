"""One pass over a corpus, for one job or for several that ask of the same documents.

plan shards → read documents → prepare chunks → generate answers → merge results → commit shards
"""

import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace

from granite_ray.checkpoint import open_checkpoint
from granite_ray.cluster import Cluster
from granite_ray.config import JobConfig
from granite_ray.errors import GraniteRayError, InfrastructureError
from granite_ray.fingerprint import make_fingerprint
from granite_ray.interrupts import Interrupts
from granite_ray.io.commit import Generation
from granite_ray.io.sources import check_collisions
from granite_ray.io.storage import OpenedStorages
from granite_ray.logs import set_up_logging
from granite_ray.model.architecture import read_architecture
from granite_ray.options import RunOptions, Surroundings
from granite_ray.output import HeldOutput, hold_output
from granite_ray.parallel.place import check_size
from granite_ray.planning import InputPlan, limit_plan, plan_input
from granite_ray.progress import ProgressView
from granite_ray.records import output_schema
from granite_ray.report import RunReport
from granite_ray.resume import Resumption, check_source, resume_plan
from granite_ray.run import TOO_MANY_FAILED, Run, commit_shards
from granite_ray.stages import ShardWork, StageContext, task_limits
from granite_ray.tasks import make_task
from granite_ray.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def run_pass(jobs: Sequence["PassJob"], surroundings: Surroundings) -> None:
    """Run jobs that share a pass; afterwards each has its report and, where it failed, its error.

    A job that fails for a reason of its own breaks the pass off; the others are marked as left.
    """
    job, engine = jobs[0].config.job, jobs[0].config.engine
    set_up_logging(job)
    with (
        ExitStack() as views,
        Interrupts() as interrupts,
        Cluster(job, engine, on_start=interrupts.install) as cluster,
    ):
        for each in jobs:
            each.view = views.enter_context(_view(each, surroundings, is_alone=len(jobs) == 1))
        try:
            plan = _plan(jobs, cluster)
            for each in jobs:
                with each.ending():
                    each.open(plan)
            opened = [each for each in jobs if each.is_open]
            _commit(opened, plan, cluster, interrupts)
            for each in opened:
                with each.ending():
                    each.complete(plan)
        except BaseException as error:
            for each in jobs:
                each.end(error)
            if not isinstance(error, GraniteRayError):
                raise


class PassJob:
    """One job on its way through a pass. Made, it has its task; open, it holds its output.

    Raises:
        ConfigError: If the checkpoint or the task refuses the config. No weights are loaded.
    """

    view: ProgressView
    run: Run

    def __init__(self, config: JobConfig, options: RunOptions, surroundings: Surroundings) -> None:
        self.config = config
        self.checkpoint = open_checkpoint(
            config.model, weights_needed=config.engine.backend != "fake"
        )
        if config.engine.backend == "native":
            num_experts = read_architecture(self.checkpoint.config).num_local_experts
            check_size(config.engine.expert_parallel_size, num_experts)
        tokenizer = load_tokenizer(self.checkpoint.tokenizer_path)
        self.task = make_task(config.task, tokenizer, task_limits(config, self.checkpoint))
        self.storages = OpenedStorages(surroundings.open_storage)
        self.sink = self.storages(config.sink.path)
        run_id = uuid.uuid4().hex[:12]
        self.report = RunReport(run_id, config.task.kind, self.checkpoint.name, self.sink.root)
        self.error: GraniteRayError | None = None
        self.is_open = self.is_left = self._has_ended = False
        self._options = options
        self._surroundings = surroundings
        self._held = ExitStack()

    def differs_from(self, other: "PassJob") -> list[str]:
        """Name what keeps two jobs from sharing a pass: nothing where they ask of the same chunks.

        Chunks of another length would be another job's answers, so the room that a prompt leaves
        counts where `chunking.max_tokens` does not bound it.
        """
        mine, theirs = self._needs(), other._needs()
        return [name for name in mine if mine[name] != theirs[name]]

    def _needs(self) -> dict[str, object]:
        config, task = self.config, self.task
        return {
            "source": config.source,
            "chunking": config.chunking,
            "model": config.model,
            "engine": config.engine,
            "job.ray_address": config.job.ray_address,
            "the columns that their prompts read": task.columns,
            "the room for a chunk (set chunking.max_tokens to what both leave)": (
                task.max_chunk_tokens
            ),
        }

    @property
    def name(self) -> str:
        """What the job is called where several share a console."""
        return "/".join(self.sink.root.split("/")[-2:])  # the last folder may be the date alone

    def say(self, line: str) -> None:
        """Tell a person something before the job has begun."""
        if self._surroundings.console:
            self._surroundings.console.print(line, highlight=False, markup=False, soft_wrap=True)
        logger.info("%s", line, extra={"job": self.report.run_id})

    def open(self, plan: InputPlan) -> None:
        """Take hold of the output, and find out what is to be done.

        Raises:
            GraniteRayError: If it cannot be had, or holds something else.
        """
        config, options = self.config, self._options
        self.context = self._stage_context(plan)
        fingerprint = make_fingerprint(config, self.checkpoint.identity, self.context.schema)
        held = hold_output(self.sink, self.report, config.job.lease_s, self.view.say)
        self._output = output = self._held.enter_context(held)
        self._held.enter_context(_counted_retries(self.storages, self.report))
        self.is_open = True
        output.look(config, fingerprint, restart=options.restart)
        self.context = replace(self.context, generation=output.generation)
        self._plan = limit_plan(plan, options.limit, config.source)
        self.resumption = resume_plan(self._plan, output, redrive=options.redrive)
        self._check_source(plan, output, self.resumption)
        output.claim(config)
        self.run = Run(config.job, output, self.view)
        self.run.begin(self._plan, self.resumption)

    def complete(self, plan: InputPlan) -> None:
        """Judge the run, make its files the results, and let go of the output.

        Raises:
            GraniteRayError: If the storage fails, or another run has taken the output over.
        """
        self.run.judge(self._plan, allow_failed=self._options.allow_failed)
        if self._options.limit is None and self.report.exit_code != TOO_MANY_FAILED:
            self._output.complete(self.run.files, plan.root)
        self.end(None)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End this job, and none other, by the error that comes up inside."""
        try:
            yield
        except GraniteRayError as error:
            self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Write the report and let go of the output, once. What goes wrong then is the error."""
        if self._has_ended:
            return
        self._has_ended, self.is_open = True, False
        self.error = error if isinstance(error, GraniteRayError) else None
        try:
            if error is None:
                self._held.close()
            else:
                self._held.__exit__(type(error), error, error.__traceback__)
        except GraniteRayError as raised:
            self.error = raised
        ended = self.error.exit_code if self.error else self.report.exit_code
        logger.info(
            "run ended",
            extra={
                "job": self.report.run_id,
                "exit_code": ended,
                "counts": asdict(self.report.documents),
                "reason": str(self.error or ""),
            },
        )

    def leave(self) -> None:
        """Let go of the output: a sibling has broken the pass off, and this job comes again."""
        self.is_left = True
        self.end(InfrastructureError("Another job ended the pass that this one shared with it."))

    def _check_source(self, plan: InputPlan, output: HeldOutput, resumption: Resumption) -> None:
        if not self._options.allow_vanished:
            # What lies beyond a limit has not vanished, and is not deleted either.
            is_limited = self._options.limit is not None
            share = 1.0 if is_limited else self.config.sink.max_vanished_fraction
            check_source(plan, output.snapshot, resumption, share)

    def _stage_context(self, plan: InputPlan) -> StageContext:
        schema = output_schema(self.task.output_fields, plan.columns.keep_fields)
        own_names = schema.names[: len(schema.names) - len(plan.columns.keep_fields)]
        check_collisions(plan.columns, own_names)
        constants = {"task": self.config.task.kind, "checkpoint": self.checkpoint.name}
        return StageContext(
            config=self.config,
            checkpoint=self.checkpoint,
            columns=plan.columns,
            source_root=plan.root,
            schema=schema.with_metadata(constants),
            max_chunk_tokens=self.task.max_chunk_tokens,
            generation=Generation(""),
            run_id=self.report.run_id,
            open_storage=self._surroundings.open_storage,
            make_engine=self._surroundings.make_engine,
        )


def _plan(jobs: Sequence[PassJob], cluster: Cluster) -> InputPlan:
    """Plan the input that the jobs have in common."""
    first = jobs[0]
    if first.checkpoint.tokenizer_path != first.checkpoint.path:
        first.view.say(f"{first.config.model.path} has no tokenizer: the embedded one stands in")
    first.view.say("planning")
    with ExitStack() as timers:
        for job in jobs:
            timers.enter_context(job.report.timed("plan"))
        columns = sorted(first.task.columns)
        return plan_input(first.config.source, columns, first.storages, cluster)


def _commit(
    jobs: Sequence[PassJob], plan: InputPlan, cluster: Cluster, interrupts: Interrupts
) -> None:
    """Do what the jobs have to do. Where one alone is to blame, it ends and the others leave."""
    if not jobs:
        return
    runs, contexts = [job.run for job in jobs], [job.context for job in jobs]
    try:
        commit_shards(runs, _work(jobs, plan), contexts, cluster, interrupts)
    except GraniteRayError as error:
        if any(run.error is error for run in runs):
            for job in jobs:
                if job.run.error is not error:
                    job.leave()
        raise


def _work(jobs: Sequence[PassJob], plan: InputPlan) -> list[tuple[ShardWork, ...]]:
    """Return for each shard, in the order of the plan, what the jobs have to do of it."""
    works: dict[str, list[ShardWork]] = {shard.shard_id: [] for shard in plan.shards}
    for at, job in enumerate(jobs):
        for work in job.resumption.work:
            works.setdefault(work.shard.shard_id, []).append(replace(work, job=at))
    return [tuple(work) for work in works.values() if work]


def _view(job: PassJob, surroundings: Surroundings, *, is_alone: bool) -> ProgressView:
    label = "" if is_alone else f"{job.name}: "
    console = None if job.config.job.log_format == "json" else surroundings.console
    return ProgressView(console, job.sink, job.report.run_id, label)


@contextmanager
def _counted_retries(storages: OpenedStorages, report: RunReport) -> Iterator[None]:
    """Add the driver's own repeated calls to the report, however the run ends."""
    try:
        yield
    finally:
        report.storage_retries += storages.num_retries
