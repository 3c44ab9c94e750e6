"""What surrounds the user's turn: the checkpoint's chat template, or headings where it has none.

The result is pieces, so that examples and documents stay plain text inside template text.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from granite_ray.errors import ConfigError
from granite_ray.tasks.templates import Piece, Plain, Slot
from granite_ray.tokenizer import Tokenizer

TURN = Slot("user turn")
"""Where the content of the last user turn goes."""

BASE_USER = "### Task\n"
BASE_ANSWER = "\n\n### Answer\n"
BASE_STOP = ("\n### Task",)
"""A checkpoint without a chat template sees turns under headings and stops before the next one."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The words around the user's turn; `examples` are pairs of a user turn and its answer."""

    system_prompt: str | None = None
    examples: tuple[tuple[tuple[Piece, ...], str], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    def render(self, tokenizer: Tokenizer, has_title: Sequence[bool] = ()) -> list[Piece]:
        """Return the whole prompt's pieces, with `TURN` and slots for each document.

        Args:
            tokenizer: Brings the chat template.
            has_title: For each document, whether it has a title: templates look at that.
        """
        if tokenizer.has_chat_template:
            return _chat_pieces(self, tokenizer, has_title)
        return _plain_pieces(self, has_title)


def title_slot(index: int) -> Slot:
    """Return the place of a document's title in the frame."""
    return Slot(f"document title {index}")


def text_slot(index: int) -> Slot:
    """Return the place of a document's text in the frame."""
    return Slot(f"document text {index}")


def _chat_pieces(frame: Frame, tokenizer: Tokenizer, has_title: Sequence[bool]) -> list[Piece]:
    marks = Marks()
    messages = []
    if frame.system_prompt is not None:
        messages.append({"role": "system", "content": frame.system_prompt})
    for turn, answer in frame.examples:
        messages.append({"role": "user", "content": marks.put(*turn)})
        messages.append({"role": "assistant", "content": marks.put(Plain(answer))})
    messages.append({"role": "user", "content": marks.put(TURN)})
    documents = [
        {
            "title": marks.put(title_slot(index)) if titled else "",
            "text": marks.put(text_slot(index)),
        }
        for index, titled in enumerate(has_title)
    ]
    rendered = tokenizer.render_chat(
        messages, documents=documents or None, tools=list(frame.tools) or None
    )
    pieces = marks.split(rendered)
    if pieces.count(TURN) != 1:
        raise ConfigError(
            "model.path: the checkpoint's chat template does not write the user's turn as it is "
            "given. Use a checkpoint with Granite's own chat template."
        )
    if has_title and not any(_is_named(piece, text_slot(0).name) for piece in pieces):
        raise ConfigError(
            "task.documents_column is set, but the checkpoint's chat template has no place for "
            "documents. Write the column into task.template instead."
        )
    return pieces


def _plain_pieces(frame: Frame, has_title: Sequence[bool]) -> list[Piece]:
    if frame.tools:
        raise ConfigError(
            "task.tools needs a chat template, and the checkpoint of model.path has none. "
            "Choose an instruct checkpoint."
        )
    pieces: list[Piece] = []
    if frame.system_prompt is not None:
        pieces.append(f"{frame.system_prompt}\n\n")
    for index, titled in enumerate(has_title):
        title: list[Piece] = [title_slot(index), "\n"] if titled else []
        pieces += ["### Document\n", *title, text_slot(index), "\n\n"]
    for turn, answer in frame.examples:
        pieces += [BASE_USER, *turn, BASE_ANSWER, Plain(answer), "\n\n"]
    return [*pieces, BASE_USER, TURN, BASE_ANSWER]


def _is_named(piece: Piece, name: str) -> bool:
    return isinstance(piece, Slot) and piece.name == name


class Marks:
    """Stand-ins that a chat template copies, and what they stand for.

    A mark cannot be guessed, and it holds a quote: where that came back escaped, the template
    wrote it into a JSON string, and what it stands for must be escaped as well.
    """

    def __init__(self) -> None:
        self._key = secrets.token_hex(16)
        self._meanings: list[tuple[Piece, ...]] = []

    def put(self, *pieces: Piece) -> str:
        """Return a stand-in for `pieces`."""
        self._meanings.append(pieces)
        return f'{self._key}"{len(self._meanings) - 1}-{self._key}'

    def split(self, rendered: str) -> list[Piece]:
        """Return template text and, for each mark, what it stands for."""
        pattern = rf'{self._key}(\\?)"(\d+)-{self._key}'
        # With two groups, re.split gives: text, backslash, index, text, backslash, index, … text.
        parts = re.split(pattern, rendered)
        pieces: list[Piece] = [parts[0]]
        for escape, index, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            meaning = self._meanings[int(index)]
            pieces += [_as_json(piece) for piece in meaning] if escape else meaning
            pieces.append(text)
        return pieces


def _as_json(piece: Piece) -> Piece:
    match piece:
        case Slot(name=name):
            return Slot(name, as_json=True)
        case Plain(text=text):
            return Plain(json_escaped(text))
        case _:
            return json_escaped(piece)


def json_escaped(text: str) -> str:
    """Write a text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
