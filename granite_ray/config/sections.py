"""The sections of a `JobConfig` but for the task's."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, field_validator, model_validator

from granite_ray.config.base import Section
from granite_ray.config.serve import DEFAULT_TASK, ServeConfig
from granite_ray.config.task import GenerateConfig, TaskConfig


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _condition(value: object) -> object:
    if isinstance(value, list | tuple) and len(value) == 3:
        return dict(zip(("column", "operator", "value"), value, strict=True))
    return value


class FilterCondition(Section):
    """One condition on a column, written `[column, operator, value]`."""

    column: str
    """Column (or Hive partition key) of the source."""
    operator: Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in"]
    """How the column is compared."""
    value: str | int | float | bool | list[str | int | float | bool]
    """What it is compared with; a list for `in` and `not in`."""

    @model_validator(mode="after")
    def _list_where_needed(self) -> "FilterCondition":
        if isinstance(self.value, list) != (self.operator in ("in", "not in")):
            raise ValueError(f"operator {self.operator!r} takes {_wanted_value(self.operator)}")
        return self


def _wanted_value(operator: str) -> str:
    return "a list of values" if operator in ("in", "not in") else "one value"


class SourceConfig(Section):
    """Where the documents come from and how they are cut into shards."""

    path: Annotated[
        tuple[str, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=str | tuple[str, ...]),
    ] = Field(min_length=1)
    """Folder, file or glob, local or `s3://bucket/…`; or a list of them."""
    format: Literal["parquet", "jsonl", "text"] = "parquet"
    """`jsonl` may be compressed (`.gz`, `.zst`); `text` is one document a file."""
    text_column: str = "text"
    """Column that holds the text."""
    id_column: str | None = None
    """Column that names a document; without it the id is `<file>#<row>`."""
    keep_columns: tuple[str, ...] = ()
    """Columns carried over to the results; those of JSONL become strings."""
    filter: tuple[
        Annotated[
            FilterCondition,
            BeforeValidator(
                _condition, json_schema_input_type=FilterCondition | tuple[str, str, Any]
            ),
        ],
        ...,
    ] = ()
    """Conditions that a document must all meet, such as `[[language, "==", en]]`."""
    documents_per_shard: int = Field(default=500, gt=0)
    """Documents in a shard, at most: the unit of commit and of work lost by a crash."""
    bytes_per_shard: ByteSize = Field(default=ByteSize(128 * 1024**2), gt=0)
    """Uncompressed bytes in a shard, at most (estimated), such as `64MiB`."""
    on_bad_file: Literal["fail", "skip"] = "fail"
    """Whether an unreadable input file stops the job (exit 4) or is listed in the report."""
    on_duplicate: Literal["allow", "error"] = "allow"
    """`error` refuses a corpus in which an id occurs twice (exit 2); it needs `id_column`."""

    @model_validator(mode="after")
    def _check_columns(self) -> "SourceConfig":
        if self.on_duplicate == "error" and self.id_column is None:
            raise ValueError("on_duplicate 'error' needs source.id_column, which names the id")
        if len(set(self.keep_columns)) != len(self.keep_columns):
            raise ValueError("keep_columns names a column twice")
        return self


class ChunkingConfig(Section):
    """How a text longer than the context is cut."""

    max_tokens: int | None = Field(default=None, gt=0)
    """Longest chunk, in tokens; by default what the model's context leaves free."""
    overlap_tokens: int = Field(default=0, ge=0)
    """Tokens that a chunk repeats of the one before."""
    max_chunks: int = Field(default=256, gt=0)
    """A document with more chunks fails with `too_long`."""
    max_failed_chunks: int = Field(default=0, ge=0)
    """Chunks of a document that may fail before its row fails."""
    boundary: Literal["heading", "paragraph", "sentence", "token"] = "paragraph"
    """Where to cut for preference; where that is not possible, at the next finer boundary."""

    @model_validator(mode="after")
    def _overlap_fits(self) -> "ChunkingConfig":
        if self.max_tokens is not None and self.overlap_tokens * 2 > self.max_tokens:
            raise ValueError(
                f"overlap_tokens is {self.overlap_tokens}, more than half of max_tokens "
                f"({self.max_tokens}); choose at most {self.max_tokens // 2}"
            )
        return self


class ModelConfig(Section):
    """Which checkpoint runs."""

    path: str = "quickstart"
    """Checkpoint folder, hub id, or `quickstart` for the embedded one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the weights; `auto` takes the checkpoint's own."""
    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy` fills the checkpoint's shapes with random numbers."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Longest prompt plus answer, in tokens; by default the checkpoint's own context."""


class EngineConfig(Section):
    """How one replica runs, and how many there are."""

    backend: Literal["native", "transformers", "fake"] = "native"
    """`native` is ours, `transformers` the reference; `fake` answers at once, without a model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where the cluster has one."""
    num_replicas: Annotated[int, Field(gt=0)] | tuple[int, int] = 1
    """Replicas, or a range `[1, 8]` that follows the work."""
    expert_parallel_size: int = Field(default=1, ge=1)
    """Ranks of one replica, each with a device of its own, which divide its experts among them."""
    rank_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that one rank may keep the others waiting before its replica is given up."""
    fake_tokens_per_s: float | None = Field(default=None, gt=0)
    """Speed of the fake backend, prompt and answer tokens together; by default unlimited."""
    max_num_seqs: int = Field(default=64, gt=0)
    """Sequences that may run at once in one replica."""
    max_num_batched_tokens: int = Field(default=4096, gt=0)
    """Tokens of one step in one replica; padding counts on the `transformers` backend."""
    block_size: int = Field(default=16, gt=0)
    """Token positions of one block of the cache; prefixes are shared in whole blocks. Take 256 on a
    GPU: torch's attention reads only such blocks in place."""
    cuda_graphs: bool = False
    """Launch decodes as CUDA graphs; not yet proved on a GPU, and without effect on a CPU."""
    cache_gib: float | None = Field(default=None, gt=0)
    """GiB for keys, values and Mamba state; by default 80 % of what is free on a GPU after the
    weights, on a CPU half of the free memory times the replica's share of the cores."""

    @field_validator("num_replicas")
    @classmethod
    def _range_in_order(cls, value: int | tuple[int, int]) -> object:
        if isinstance(value, tuple) and not 1 <= value[0] <= value[1]:
            raise ValueError(f"{list(value)} is not a range: write [least, most] with least >= 1")
        return value

    @model_validator(mode="after")
    def _ranks_can_run(self) -> "EngineConfig":
        if self.expert_parallel_size > 1 and self.backend == "transformers":
            raise ValueError(
                f"expert_parallel_size is {self.expert_parallel_size}, and backend transformers "
                "runs on one rank; take backend native, or expert_parallel_size 1"
            )
        if self.expert_parallel_size > 1 and self.cuda_graphs:
            raise ValueError(
                "cuda_graphs cannot hold what ranks exchange; leave it out, or take "
                "expert_parallel_size 1"
            )
        return self


class SinkConfig(Section):
    """Where the results go."""

    path: str
    """Folder, local or `s3://bucket/…`; it belongs to one job."""
    max_vanished_fraction: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the last run's documents whose files may have vanished before it is refused."""


class JobSection(Section):
    """How the job behaves as a whole."""

    max_failed_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of documents that may fail; beyond it the job stops with exit 4."""
    lease_s: float = Field(default=30.0, gt=0)
    """Seconds without a heartbeat after which another run may take this output over."""
    grace_s: float = Field(default=30.0, ge=0)
    """Seconds that shards in flight get to finish after SIGTERM or SIGINT."""
    scheduling_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds to wait for resources, for a replica to load, and for any one step of its engine."""
    log_format: Literal["text", "json"] = "text"
    """`json` writes log lines as JSON objects with job, shard and attempt, never any text of a
    document; a run then shows no live view."""
    ray_address: str | None = None
    """Ray cluster to join, such as `auto`; without it RAY_ADDRESS, else a local Ray for the job."""


class JobConfig(Section):
    """One job: documents in, typed rows out."""

    source: SourceConfig
    """Where the documents come from."""
    task: TaskConfig
    """What the model is asked."""
    chunking: ChunkingConfig = ChunkingConfig()
    """How long texts are cut."""
    model: ModelConfig = ModelConfig()
    """Which checkpoint runs."""
    engine: EngineConfig = EngineConfig()
    """How it runs."""
    sink: SinkConfig
    """Where the results go."""
    job: JobSection = JobSection()
    """How the job behaves."""
    serve: ServeConfig = ServeConfig()
    """How `granite-ray serve` answers; a job takes no notice of it."""

    def prompt_columns(self, template_columns: frozenset[str]) -> tuple[str, ...]:
        """Return the columns besides the text that a prompt sees, sorted."""
        columns = set(template_columns)
        if isinstance(self.task, GenerateConfig) and self.task.documents_column:
            columns.add(self.task.documents_column)
        return tuple(sorted(columns - {self.source.text_column}))

    def dump(self) -> dict[str, Any]:
        """Return the config as plain data that `JobConfig.model_validate` reads back."""
        return self.model_dump(mode="json", by_alias=True)


class ServerConfig(Section):
    """What is served: the file that `granite-ray serve` takes, which may be a job's file too."""

    model: ModelConfig = ModelConfig()
    """Which checkpoint runs."""
    chunking: ChunkingConfig = ChunkingConfig()
    """How long texts are cut."""
    engine: EngineConfig = EngineConfig()
    """How it runs."""
    job: JobSection = JobSection()
    """Which Ray is joined, and how long to wait for resources and for a step of the engine."""
    serve: ServeConfig = ServeConfig()
    """How it answers."""
    task: TaskConfig | None = None
    """A job's own task, served as `default`."""
    source: SourceConfig | None = None
    """A job's; requests bring their own documents."""
    sink: SinkConfig | None = None
    """A job's; see `serve.store_path`."""

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """The tasks that a request can ask for by name."""
        own = {} if self.task is None else {DEFAULT_TASK: self.task}
        return own | self.serve.tasks

    def dump(self) -> dict[str, Any]:
        """Return the config as plain data that `ServerConfig.model_validate` reads back."""
        return self.model_dump(mode="json", by_alias=True)
