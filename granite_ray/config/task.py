"""The `task` section: what the model is asked, told apart by `task.kind`.

Files that a task names (template, schema, tools) are read here, once, so that a loaded config is
complete: workers and a later redrive need nothing else.
"""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator

from granite_ray.config.base import Section

NO_FILES = None
"""As `base_folder` of the validation's context: what a request says may name neither files nor
classes."""
MAX_FILE_BYTES = 1_000_000
"""Templates, schemas and tool lists beyond this are refused."""


def _read_named_file(value: str, info: ValidationInfo) -> str:
    """Read a file named in the config, relative to the config's folder."""
    base = (info.context or {}).get("base_folder", Path())
    if base is NO_FILES:
        raise ValueError("it must be written out in the request: files cannot be named here")
    path = Path(base) / value
    if not path.is_file():
        raise ValueError(f"{value!r} is not a file (looked in {path.parent.resolve()})")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{value!r} is larger than {MAX_FILE_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def _template_text(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str) and "{{" not in value and "{%" not in value:
        return _read_named_file(value, info)
    return value


def _json_of(value: str, info: ValidationInfo) -> object:
    try:
        return json.loads(_read_named_file(value, info))
    except json.JSONDecodeError as error:
        raise ValueError(f"{value!r} is not valid JSON: {error}") from error


def _schema_of(value: object, info: ValidationInfo) -> object:
    if isinstance(value, type) and issubclass(value, BaseModel):
        return value.model_json_schema()
    if not isinstance(value, str):
        return value
    module, colon, name = value.partition(":")
    may_import = (info.context or {}).get("base_folder", Path()) is not NO_FILES
    if may_import and colon and all(part.isidentifier() for part in [*module.split("."), name]):
        return _schema_of_class(module, name)
    return _json_of(value, info)


def _schema_of_class(module: str, name: str) -> object:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"'{module}:{name}' cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ValueError(f"'{module}:{name}' is not a pydantic model class")
    return found.model_json_schema()


def _tools_of(value: object, info: ValidationInfo) -> object:
    return _json_of(value, info) if isinstance(value, str) else value


TemplateText = Annotated[str, BeforeValidator(_template_text)]
JsonSchema = Annotated[
    dict[str, Any], BeforeValidator(_schema_of, json_schema_input_type=str | dict[str, Any])
]
Tools = Annotated[
    tuple[dict[str, Any], ...],
    BeforeValidator(_tools_of, json_schema_input_type=str | tuple[dict[str, Any], ...]),
]


class Example(Section):
    """One worked example shown to the model before the document."""

    input: str
    """The example's document text."""
    output: str | dict[str, Any]
    """The answer expected for it: text, a label, or an object for `extract`."""


class TaskSection(Section):
    """What every task has."""

    instruction: str | None = None
    """Replaces the task's own instruction."""
    template: TemplateText | None = None
    """Jinja file (or inline Jinja) of the user turn over `text`, columns and `instruction`."""
    examples: tuple[Example, ...] = ()
    """Few-shot examples, shown as earlier turns."""
    system_prompt: str | None = None
    """The system turn; without it the checkpoint's own default stands."""
    language: str | None = None
    """Language of the answers, such as `German`; without it the model decides."""
    max_tokens: int = Field(default=512, gt=0)
    """Longest answer of one prompt, in tokens."""
    temperature: float = Field(default=0.0, ge=0.0, le=5.0)
    """0 is greedy; above it answers are sampled with `task.seed`."""
    seed: int = 0
    """Seeds sampling; each document draws its own numbers from it."""
    prompt_order: Literal["instruction_first", "document_first"] = "instruction_first"
    """Whether the instruction or the document comes first in the user turn."""


class SummarizeConfig(TaskSection):
    """One summary a document."""

    kind: Literal["summarize"]
    """The task."""
    length: Literal["sentence", "short", "medium", "long"] = "short"
    """One sentence, about 3 sentences, one paragraph, or several paragraphs."""
    style: str | None = None
    """How it is written, such as `plain language` or `bullet points`."""
    focus: str | None = None
    """What it should concentrate on."""
    key_points: int = Field(default=0, ge=0, le=20)
    """How many key points to list beside the summary; 0 for none."""


class ClassifyConfig(TaskSection):
    """One label, or several, a document."""

    kind: Literal["classify"]
    """The task."""
    labels: tuple[str, ...] | dict[str, Any]
    """The labels; or a tree: a mapping of each label to its sub-labels (list, mapping or null)."""
    multi_label: bool = False
    """Whether a document may have any number of labels."""
    abstain_below: float = Field(default=0.0, ge=0.0, le=1.0)
    """Below this probability there is no label; with `multi_label` each label's bar (0: 0.5)."""
    calibration: Literal["none", "contextual"] = "none"
    """`contextual` divides by the probabilities that labels get for an empty document."""

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: tuple[str, ...] | dict[str, Any]) -> object:
        check_labels(labels)
        return labels


class ExtractConfig(TaskSection):
    """One typed record a document."""

    kind: Literal["extract"]
    """The task."""
    schema_: JsonSchema = Field(alias="schema")
    """JSON Schema file, `module:PydanticClass`, or the schema itself."""


class GenerateConfig(TaskSection):
    """Any template over any columns."""

    kind: Literal["generate"]
    """The task."""
    template: TemplateText
    """Jinja file (or inline Jinja text) of the user turn over `text` and the columns."""
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    """JSON Schema that the answer must satisfy; without it the answer is text."""
    documents_column: str | None = None
    """Column of documents to answer from: a list of texts, or of objects with title and text."""
    tools: Tools = ()
    """JSON file with the functions that the model may call, in the OpenAI shape."""


TaskConfig = Annotated[
    SummarizeConfig | ClassifyConfig | ExtractConfig | GenerateConfig,
    Field(discriminator="kind"),
]


def check_labels(labels: object, where: str = "") -> None:
    """Check a list or tree of labels; raise ValueError that names the place."""
    names = list(labels) if isinstance(labels, dict | list | tuple) else None
    if names is None or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"labels{where} must be a list or mapping of non-empty strings")
    if len(names) < 2:
        raise ValueError(f"labels{where} has {len(names)} entries; classification needs at least 2")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"labels{where} has {twice!r} twice")
    if isinstance(labels, dict):
        for name, below in labels.items():
            if below:
                check_labels(below, f"{where}.{name}")
