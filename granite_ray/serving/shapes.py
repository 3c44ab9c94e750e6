"""What callers may send, field by field; unknown fields are refused. OpenAI's names and meanings.

Each shape becomes a record of `calls`. No field names a path or a URL.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from granite_ray.errors import ConfigError
from granite_ray.records import COPY_KEYWORD, SamplingParams
from granite_ray.serving.calls import CompletionCall
from granite_ray.serving.conversation import Message, NamedTool, Shape, Tool, bad, check_unicode
from granite_ray.tasks.schema import check_schema, compile_grammar

MAX_CHOICES = 8
MAX_MESSAGES = 1_000
MAX_PROMPTS = 32
MAX_TOOLS = 128
MAX_ALTERNATIVES = 20
MAX_SEED = 2**63 - 1

StopText = Annotated[str, StringConstraints(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class SchemaFormat(Shape):
    """The schema that an answer must satisfy."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Shape):
    """What form an answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StreamOptions(Shape):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(Shape):
    """What both kinds of completion have in common. Penalties other than 0 are not supported."""

    model: str
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=100_000)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED - MAX_CHOICES)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    user: str | None = None

    def sampling(self, seed: int, num_logprobs: int | None) -> SamplingParams:
        """Return how tokens are chosen; `seed` stands in where none is given."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=self.max_tokens or 1,
            temperature=self.temperature,
            seed=(seed if self.temperature else 0) if self.seed is None else self.seed,
            stop=stop,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            num_logprobs=num_logprobs,
        )


class ChatRequest(Sampled):
    """A conversation to go on with."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    def to_call(self, seed: int, most_tokens: int) -> CompletionCall:
        """Return the call.

        Raises:
            ApiError: 400 where fields do not go together, or a schema cannot be used.
        """
        max_tokens = self.max_completion_tokens or self.max_tokens
        _check_most(max_tokens, most_tokens, "max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad("top_logprobs needs logprobs: true.", "top_logprobs")
        check_unicode([tool.model_dump() for tool in self.tools or ()], "tools")
        tools = tuple(tool.to_plain() for tool in self.tools or ())
        choice = self._tool_choice()
        must_call = choice not in ("auto", "none")
        if must_call and choice not in ("required", *(tool["function"]["name"] for tool in tools)):
            raise bad("tool_choice names a function that tools does not have.", "tool_choice")
        if must_call and not tools:
            raise bad("tool_choice needs tools.", "tool_choice")
        schema = None if self.response_format is None else json_schema(self.response_format)
        if schema is not None and tools and choice != "none":
            raise bad("response_format and tools exclude each other here.", "response_format")
        if must_call:
            for tool in tools:
                _check_parameters(tool["function"].get("parameters"))
        return CompletionCall(
            sampling=self.sampling(seed, (self.top_logprobs or 0) if self.logprobs else None),
            most_tokens=most_tokens,
            max_tokens=max_tokens,
            messages=tuple(message.to_turn() for message in self.messages),
            num_choices=self.n,
            tools=tools,
            tool_choice=choice,
            json_schema=schema,
        )

    def _tool_choice(self) -> str:
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        return self.tool_choice or "auto"


class CompletionRequest(Sampled):
    """Prompts to continue: texts, in which control tokens mean nothing, or lists of token ids."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_ALTERNATIVES)
    best_of: Literal[1] | None = None

    def to_call(self, seed: int, most_tokens: int) -> CompletionCall:
        """Return the call; raises as `ChatRequest.to_call`."""
        max_tokens = self.max_tokens or 16  # OpenAI's own default
        _check_most(max_tokens, most_tokens, "max_tokens")
        prompts = self.prompts()
        if self.echo and (self.logprobs is not None or not isinstance(prompts[0], str)):
            raise bad("echo goes with prompts of text and without logprobs.", "echo")
        if self.suffix is not None and not isinstance(prompts[0], str):
            raise bad("suffix goes with prompts of text.", "suffix")
        return CompletionCall(
            sampling=self.sampling(seed, self.logprobs),
            most_tokens=most_tokens,
            max_tokens=max_tokens,
            prompts=prompts,
            suffix=self.suffix,
            num_choices=self.n,
        )

    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Return the prompts one by one."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (tuple(self.prompt),)
        return tuple(one if isinstance(one, str) else tuple(one) for one in self.prompt)


def json_schema(form: ResponseFormat) -> str | None:
    """Return the schema that a response must satisfy, checked, as JSON text.

    Raises:
        ApiError: 400, naming what of it cannot be used.
    """
    if form.type == "text":
        return None
    if form.type == "json_object":
        return '{"type":"object"}'
    if form.json_schema is None:
        raise bad("response_format.type json_schema needs json_schema.", "response_format")
    where = "response_format.json_schema.schema"
    return _checked(form.json_schema.schema_, where)


def _check_parameters(parameters: dict[str, Any] | None) -> None:
    if parameters and parameters.get("properties"):
        _checked(parameters, "tools[].function.parameters")


def _checked(schema: dict[str, Any], where: str) -> str:
    check_unicode(schema, where)
    try:
        definition = check_schema(schema)
        if f'"{COPY_KEYWORD}"' in json.dumps(definition):
            raise ConfigError(f"task.schema has {COPY_KEYWORD}; use /v1/extract for copies.")
        return compile_grammar(definition).json_schema
    except ConfigError as error:
        raise bad(str(error).replace("task.schema", where), where) from error


def _check_most(max_tokens: int | None, most_tokens: int, name: str) -> None:
    if max_tokens is not None and max_tokens > most_tokens:
        raise bad(f"{name} is {max_tokens}; this server allows {most_tokens}.", name)
