"""Conversations and tools as callers may send them; unknown fields are refused. OpenAI's names.

The base of all shapes, and what refuses them, stand here too.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from granite_ray.serving.errors import ApiError

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Shape(BaseModel):
    """Base of all that is received: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(Shape):
    """A part of a message; pictures and sounds are not understood."""

    type: Literal["text"]
    text: str


class CalledFunction(Shape):
    """What an earlier turn called; `arguments` is a JSON object as text."""

    name: FunctionName
    arguments: str = "{}"


class ToolCall(Shape):
    """A call that an earlier turn made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_plain(self) -> dict[str, Any]:
        """Return the call as chat templates take it.

        Raises:
            ApiError: 400 where its arguments are no JSON object.
        """
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError) as error:
            raise bad("arguments of a tool call are no JSON.", "messages") from error
        if not isinstance(arguments, dict):
            raise bad("arguments of a tool call are no JSON object.", "messages")
        return {
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }


class Message(Shape):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def to_turn(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        parts = self.content if isinstance(self.content, list) else None
        text = self.content if parts is None else "\n".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": text or ""}
        if self.tool_calls:
            turn["tool_calls"] = [call.to_plain() for call in self.tool_calls]
        return turn


class Function(Shape):
    """A function that the model may call; `parameters` is a JSON Schema of an object."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: Function

    def to_plain(self) -> dict[str, Any]:
        """Return the tool as chat templates take it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class NamedFunction(Shape):
    """A function by its name."""

    name: FunctionName


class NamedTool(Shape):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


def check_unicode(value: Any, name: str) -> None:
    """Refuse JSON data with half of a surrogate pair in it, which no tokenizer can read.

    Raises:
        ApiError: 400.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad(f"{name} holds half of a surrogate pair.", name) from None


def bad(message: str, param: str) -> ApiError:
    """Return the refusal of a value."""
    return ApiError(400, message, "invalid_value", param=param)
