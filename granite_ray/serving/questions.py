"""What is asked of documents, from a request's body to a task's config and raw rows.

A request's own task section is taken as a stranger's: nothing in it names a file or a class, and
its template only writes variables out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError

from granite_ray.config import ClassifyConfig, TaskConfig, describe_errors
from granite_ray.config.task import NO_FILES
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.io.columns import SourceColumns, check_collisions
from granite_ray.io.raw import empty_row, fill_row, raw_schema
from granite_ray.records import output_schema
from granite_ray.serving.conversation import Shape, check_unicode
from granite_ray.serving.errors import ApiError
from granite_ray.serving.gateway import Gateway
from granite_ray.tasks import Task
from granite_ray.tasks.templates import only_writes_variables

MAX_LABELS = 512
MAX_EXAMPLES = 64
MAX_KEPT = 64
REQUEST_NAME = "documents"
"""What stands as `source_file` in rows of documents that came in the request itself."""

Kind = Literal["summarize", "classify", "extract", "generate"]
Column = str
TASKS: TypeAdapter[TaskConfig] = TypeAdapter(TaskConfig)


class DocumentsRequest(Shape):
    """Documents and what to do with them: in the request, or in a file uploaded before."""

    documents: list[str | dict[str, Any]] | None = Field(default=None, min_length=1)
    """Texts, or objects with the text and other columns."""
    input_file_id: str | None = None
    """A Parquet or JSONL file; the answer is a batch then."""
    task: str | dict[str, Any] | None = None
    """The name of one of the server's tasks, or a task section as in a job's config."""
    model: str | None = None
    """The served model, for clients that always send one."""
    text_column: str = "text"
    """As `source.text_column`."""
    id_column: str | None = None
    """As `source.id_column`."""
    keep_columns: list[str] = Field(default=[], max_length=MAX_KEPT)
    """As `source.keep_columns`."""
    format: Literal["json", "jsonl", "parquet"] = "json"
    """Whether rows come as one object, one a line as they are ready, or as a file."""


class Question:
    """A request about documents that has been checked.

    Raises:
        ApiError: 400, naming the field.
    """

    def __init__(self, gateway: Gateway, kind: Kind, request: DocumentsRequest) -> None:
        self.request = request
        self.config = _task_config(gateway, kind, request)
        self.task = _task(gateway, self.config, request.text_column)
        self.columns = _columns(self.task, request)

    def raw(self, documents: Sequence[str | Mapping[str, Any]]) -> pa.Table:
        """Return documents as a job reads them from lines of JSON."""
        rows = [self._raw_row(number, one) for number, one in enumerate(documents)]
        return pa.Table.from_pylist(rows, schema=raw_schema(self.columns))

    def _raw_row(self, number: int, document: str | Mapping[str, Any]) -> dict[str, Any]:
        values = {self.request.text_column: document} if isinstance(document, str) else document
        raw = empty_row(REQUEST_NAME, number, self.columns)
        try:
            fill_row(raw, values, self.columns)
        except RowFailure as failure:
            raw |= {"error_type": failure.error_type, "error_message": failure.message}
        return raw


def _task_config(gateway: Gateway, kind: Kind, request: DocumentsRequest) -> TaskConfig:
    named = gateway.config.tasks
    asked = request.task
    if asked is None:
        fitting = [name for name, task in named.items() if task.kind == kind]
        if len(fitting) == 1:
            return named[fitting[0]]
        asked = {}
    if isinstance(asked, str):
        if asked not in named or named[asked].kind != kind:
            fitting = sorted(name for name, task in named.items() if task.kind == kind)
            raise _bad(f"task is no {kind} task of this server's; it has {fitting}.")
        return named[asked]
    if asked.get("kind", kind) != kind:
        raise _bad(f"task.kind must be {kind} on this route, or absent.")
    return _strangers_task({**asked, "kind": kind}, gateway.config.serve.max_tokens)


def _strangers_task(values: Mapping[str, Any], most_tokens: int) -> TaskConfig:
    """Read a task section that may name nothing outside of itself."""
    check_unicode(values, "task")
    try:
        config = TASKS.validate_python(values, context={"base_folder": NO_FILES})
    except ValidationError as error:
        raise _bad(_spelled(error)) from None
    except RecursionError:
        raise _bad("task is nested too deeply.") from None
    if config.max_tokens > most_tokens:
        raise _bad(f"task.max_tokens is {config.max_tokens}; this server allows {most_tokens}.")
    if len(config.examples) > MAX_EXAMPLES:
        raise _bad(f"task.examples has {len(config.examples)} entries; at most {MAX_EXAMPLES}.")
    if isinstance(config, ClassifyConfig) and _num_labels(config.labels) > MAX_LABELS:
        raise _bad(f"task.labels has more than {MAX_LABELS} labels.")
    if config.template is not None and not _is_harmless(config.template):
        raise _bad(
            "task.template may only write variables out, {{ name }}, in a request. Templates with "
            "logic belong into serve.tasks of the server's config."
        )
    return config


def _is_harmless(template: str) -> bool:
    try:
        return only_writes_variables(template)
    except (ConfigError, RecursionError) as error:
        message = str(error) if isinstance(error, ConfigError) else "it is nested too deeply"
        raise _bad(message) from None


def _task(gateway: Gateway, config: TaskConfig, text_column: str) -> Task:
    try:
        return gateway.tasks.task(config, text_column)
    except ConfigError as error:
        raise _bad(str(error)) from error


def _columns(task: Task, request: DocumentsRequest) -> SourceColumns:
    """Return what is read of each document; kept columns become strings, as those of JSONL do."""
    columns = SourceColumns(
        text_column=request.text_column,
        id_column=request.id_column,
        prompt_columns=tuple(sorted(task.columns - {request.text_column})),
        keep_fields=tuple(pa.field(name, pa.string()) for name in request.keep_columns),
        filter=(),
    )
    if len(set(request.keep_columns)) != len(request.keep_columns):
        raise ApiError(400, "keep_columns names a column twice.", "invalid_value")
    try:
        check_collisions(columns, output_schema(task.output_fields, ()).names)
    except ConfigError as error:
        message = str(error).replace("source.keep_columns", "keep_columns")
        raise ApiError(400, message, "invalid_value", param="keep_columns") from error
    return columns


def _num_labels(labels: object) -> int:
    if isinstance(labels, Mapping):
        return len(labels) + sum(_num_labels(below) for below in labels.values())
    return len(labels) if isinstance(labels, list | tuple) else 0


def _spelled(error: ValidationError) -> str:
    """Say what is wrong with the section, with `task.` before its fields, in one line."""
    # Without the values: they may be a document's text, in an example.
    lines = describe_errors(error, with_values=False).splitlines()
    kinds = ("summarize.", "classify.", "extract.", "generate.")
    for kind in kinds:
        lines = [line.removeprefix(kind) for line in lines]
    return " ".join(f"task.{line}" for line in lines)[:2000]


def _bad(message: str) -> ApiError:
    return ApiError(400, message, "invalid_task", param="task")
