"""A conversation that somebody sends → a prompt: the checkpoint's template around plain text.

Every text of the conversation stays plain: no turn, tool or argument can forge a role.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from granite_ray.errors import ConfigError
from granite_ray.records import Prompt
from granite_ray.tasks.frames import BASE_ANSWER, BASE_STOP, BASE_USER, Marks
from granite_ray.tasks.templates import Piece, Plain
from granite_ray.tokenizer import Tokenizer

HARMLESS = re.compile(r"[A-Za-z0-9_$.-]{1,64}")
"""Names and keywords that templates may look at; no control token looks like one."""

TOOL_CALL_START = "<tool_call>\n"
"""How an answer that must be a call begins."""


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    must_call: bool = False,
) -> Prompt:
    """Return the prompt after which the model writes the next turn.

    Args:
        messages: `role`, `content` and perhaps `tool_calls`, in the OpenAI shape, arguments as
            objects.
        tokenizer: Brings the chat template.
        tools: Functions that may be called, in the OpenAI shape.
        must_call: Begin the answer as a call of a tool.

    Raises:
        ConfigError: The template refuses these turns, or there is none for tools.
    """
    if tokenizer.has_chat_template:
        pieces = _template_pieces(messages, tokenizer, tools)
    elif tools:
        raise ConfigError("tools need a chat template, and this checkpoint has none.")
    else:
        pieces = _plain_pieces(messages)
    return _encode([*pieces, TOOL_CALL_START] if must_call else pieces, tokenizer)


def chat_stop(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the strings that end an answer where the checkpoint has no token for it."""
    return () if tokenizer.has_chat_template else BASE_STOP


def _template_pieces(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]
) -> list[Piece]:
    marks = Marks()
    turns = []
    for message in messages:
        turn = {"role": message["role"], "content": ""}
        if message.get("content"):
            turn["content"] = marks.put(Plain(message["content"]))
        if message.get("tool_calls"):
            turn["tool_calls"] = _marked(message["tool_calls"], marks)
        turns.append(turn)
    listed = [_marked(tool, marks) for tool in tools] or None
    return marks.split(tokenizer.render_chat(turns, tools=listed))


def _marked(value: Any, marks: Marks) -> Any:
    """Return JSON data with stand-ins for all strings but harmless words."""
    if isinstance(value, str):
        return value if HARMLESS.fullmatch(value) or not value else marks.put(Plain(value))
    if isinstance(value, Mapping):
        return {_marked(key, marks): _marked(below, marks) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(below, marks) for below in value]
    return value


def _plain_pieces(messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    pieces: list[Piece] = []
    for message in messages:
        content = Plain(message.get("content") or "")
        if message["role"] == "assistant":
            pieces += [BASE_ANSWER, content, "\n\n"]
        elif message["role"] == "system":
            pieces += [content, "\n\n"]
        else:
            pieces += [BASE_USER, content]
    return [*pieces, BASE_ANSWER]


def _encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Prompt:
    """Encode neighbouring template text as one, each plain text by itself."""
    token_ids: list[int] = []
    last_turn = 0
    for is_template, group in groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_template:
            token_ids += tokenizer.encode_template("".join(str(piece) for piece in group))
            continue
        for piece in group:
            assert isinstance(piece, Plain)
            last_turn = len(token_ids)
            token_ids += tokenizer.encode_text(piece.text)
    # A conversation goes on: what stands before its last turn will come again.
    return Prompt(tuple(token_ids), (last_turn,) if last_turn else ())
