"""The records that travel between the stations, the `LLM` protocol, and the declared Arrow schemas.

Records are frozen and plain. Nothing here reads, decides or computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa

from granite_ray.errors import ErrorType

Status = Literal["ok", "failed"]
FinishReason = Literal["stop", "length"]


# plan ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ShardPart:
    """A row range of one input file, as planned.

    `path` is relative to the source root; `identity` is the etag, or size and mtime. Rows are
    half-open and count documents-to-be before `source.filter`; `num_rows` is None where the
    format does not tell without a scan (text counts one). `start_byte` lets a reader of plain
    JSONL seek to `start_row`.
    """

    path: str
    identity: str
    start_row: int = 0
    stop_row: int | None = None
    start_byte: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """A deterministic slice of the input: the unit of commit, retry and resume."""

    shard_id: str
    parts: tuple[ShardPart, ...]


# read, prepare ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class RowError:
    """What is wrong with one document; `message` holds no text of it."""

    error_type: ErrorType
    message: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous piece of a document: `document.text[start:end]` in Unicode code points."""

    index: int
    start: int
    end: int
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Document:
    """One text with an id, as given, cut into chunks.

    `columns` are the other columns that the task's prompt sees. `error` is set where reading or
    preparing found the document bad; it then has no chunks.
    """

    document_id: str | None
    source_file: str
    source_row: int
    text: str
    content_hash: str
    chunks: tuple[Chunk, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    error: RowError | None = None


# generate, merge ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids sent to the model.

    `junctions` are positions, ascending, up to which other prompts begin in the same way: the end
    of what all prompts of the job share, the end of a document that several questions share. An
    engine may keep what it has computed up to there.
    """

    token_ids: tuple[int, ...]
    junctions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Temperature 0 is greedy; `seed` belongs to the request alone.

    Of what the temperature leaves, `top_k` keeps the likeliest tokens (0: all), `top_p` the fewest
    whose probabilities sum to it, `min_p` those at least that likely compared with the likeliest.
    `repetition_penalty` divides positive logits of tokens seen so far, prompt included, and
    multiplies negative ones. `num_logprobs` asks for the log-probability of each chosen token and
    of so many alternatives.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_logprobs: int | None = None


COPY_KEYWORD = "x-copy"
"""The schema keyword of strings that are copied from the text."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A JSON Schema (as JSON text, already checked) that the completion must satisfy.

    Strings that the schema marks with `x-copy` are spans of `source`, never empty ones.
    """

    json_schema: str
    source: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one chosen token, and of the likeliest tokens in its place.

    Natural logarithms of what the model says, before temperature, filters and grammar.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote for one prompt, without the stop token or stop string.

    `token_ids` are those chosen, the stop token left out; `logprobs` has one entry for each, where
    asked for. `num_cached_tokens` of the prompt were not computed again.
    """

    text: str
    num_prompt_tokens: int
    num_completion_tokens: int
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = field(default=0, compare=False)


class LLM(Protocol):
    """What a task program asks of an engine. Calls in flight together are batched together.

    A prompt that does not fit the context raises `RowFailure("too_long")`, naming both lengths.
    """

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, grammar: Grammar | None = None
    ) -> Completion:
        """Continue `prompt`."""
        ...

    async def score(self, prompt: Prompt, choices: Sequence[tuple[int, ...]]) -> list[float]:
        """Return the log-probability of each choice's token ids right after `prompt`."""
        ...

    def count(self, text: str) -> int:
        """Count the tokens of plain text (control tokens switched off)."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """What the task says of one document: `values` by task column, or `error`."""

    values: Mapping[str, Any]
    num_chunks: int = 0
    num_failed_chunks: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: RowError | None = None


# Arrow ───────────────────────────────────────────────────────────────────────────────────────────

CHUNK_TYPE = pa.struct(
    [
        pa.field("start", pa.int32()),
        pa.field("end", pa.int32()),
        pa.field("token_ids", pa.list_(pa.int32())),
    ]
)

RAW_FIELDS = (
    pa.field("document_id", pa.string()),  # null where the row has none
    pa.field("text", pa.large_binary()),  # bytes as read; null where the row has none
    pa.field("columns", pa.large_string()),  # JSON object of the columns that the prompt sees
    pa.field("error_type", pa.string()),  # set where the row itself cannot be read
    pa.field("error_message", pa.string()),
    pa.field("source_file", pa.string()),
    pa.field("source_row", pa.int64()),
)
"""One row as read, nothing checked, in the order of the input; the kept columns follow."""

PREPARED_FIELDS = (
    pa.field("document_id", pa.string()),
    pa.field("text", pa.large_string()),
    pa.field("columns", pa.large_string()),  # JSON object of the columns that the prompt sees
    pa.field("chunks", pa.large_list(CHUNK_TYPE)),
    pa.field("content_hash", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("source_file", pa.string()),
    pa.field("source_row", pa.int64()),
)
"""One prepared document a row, in the order of the input; the kept columns follow."""


def prepared_schema(keep_fields: Sequence[pa.Field]) -> pa.Schema:
    """Return the schema of a prepared shard."""
    return pa.schema([*PREPARED_FIELDS, *keep_fields])


def output_schema(task_fields: Sequence[pa.Field], keep_fields: Sequence[pa.Field]) -> pa.Schema:
    """Return the schema of a committed shard: DESIGN's common columns around the task's own."""
    return pa.schema(
        [
            pa.field("document_id", pa.string()),
            pa.field("status", pa.string(), nullable=False),
            *task_fields,
            pa.field("error_type", pa.string()),
            pa.field("error_message", pa.string()),
            pa.field("num_chunks", pa.int32(), nullable=False),
            pa.field("num_failed_chunks", pa.int32(), nullable=False),
            pa.field("num_prompt_tokens", pa.int64(), nullable=False),
            pa.field("num_completion_tokens", pa.int64(), nullable=False),
            pa.field("finish_reason", pa.string()),
            pa.field("content_hash", pa.string()),
            pa.field("task", pa.string(), nullable=False),
            pa.field("checkpoint", pa.string(), nullable=False),
            pa.field("source_file", pa.string(), nullable=False),
            pa.field("source_row", pa.int64(), nullable=False),
            *keep_fields,
        ]
    )
