"""Prompts as token ids: template pieces, in which control tokens count, around document pieces.

All that is the same for every document is rendered and encoded once; for each document only lists
of token ids are joined. Knows the tokenizer, not the engine.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

from granite_ray.errors import RowFailure
from granite_ray.records import Chunk, Document, Prompt
from granite_ray.tasks.frames import (
    BASE_STOP,
    TURN,
    Frame,
    json_escaped,
    text_slot,
    title_slot,
)
from granite_ray.tasks.templates import (
    Piece,
    Plain,
    Slot,
    TokenizedText,
    UserTemplate,
    plain_text,
)
from granite_ray.tokenizer import Tokenizer

OWN_NAMES = frozenset({"instruction", "chunk_label"})
"""Template variables that are neither the text nor a column."""

LONGEST_LABEL = " (part 99999 of 99999)"
MAX_CACHED_TEXTS = 4096
MAX_CACHED_FRAMES = 256

Run = list[int] | Slot
"""Token ids that are the same for every document, or a place that the document fills."""


@dataclass(frozen=True, slots=True)
class PromptWords:
    """The words of one kind of prompt: all that does not depend on the document.

    `examples` are pairs of input and answer; `text_names` are the template variables that mean
    the document's text.
    """

    template: str
    instruction: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    system_prompt: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    text_names: frozenset[str] = frozenset({"text"})


@dataclass(frozen=True, slots=True)
class Filling:
    """What one document puts into a prompt; `documents` are pairs of title and text."""

    text: TokenizedText
    columns: Mapping[str, Any] = field(default_factory=dict)
    chunk_label: str = ""
    documents: tuple[tuple[str, str], ...] = ()


def chunk_filling(document: Document, chunk: Chunk) -> Filling:
    """Return what `chunk` puts into a prompt; a piece of a longer text says which piece it is."""
    text = TokenizedText(document.text[chunk.start : chunk.end], chunk.token_ids)
    num_chunks = len(document.chunks)
    label = f" (part {chunk.index + 1} of {num_chunks})" if num_chunks > 1 else ""
    return Filling(text, document.columns, label)


class PromptTemplate:
    """One kind of prompt, ready to be filled with documents.

    `columns` are the source columns that it reads; `num_tokens` is what it takes without a
    document (columns not counted, since they differ).
    """

    def __init__(self, words: PromptWords, tokenizer: Tokenizer) -> None:
        self._words = words
        self._tokenizer = tokenizer
        self._user = UserTemplate(words.template)
        self._frame = Frame(
            words.system_prompt,
            tuple((self._example_turn(text), answer) for text, answer in words.examples),
            words.tools,
        )
        self._encode_template = lru_cache(MAX_CACHED_TEXTS)(tokenizer.encode_template)
        self._runs_with = lru_cache(MAX_CACHED_FRAMES)(self._make_runs)
        self.shows_text = bool(self._user.names & words.text_names)
        self.shows_instruction = "instruction" in self._user.names
        self.columns = self._user.names - words.text_names - OWN_NAMES
        self._asks_after_text = self._user.is_static and self._has_words_after_text()
        self.stop = () if tokenizer.has_chat_template else BASE_STOP
        self.num_tokens = self._count_tokens()

    def fill(self, filling: Filling) -> Prompt:
        """Return the prompt for one document.

        Raises:
            RowFailure: A column that the template reads is missing or unsuitable.
        """
        missing = self.columns - filling.columns.keys()
        if missing:
            raise RowFailure("invalid_column", f"task.template reads {min(missing)!r}, not given")
        runs = self._runs_with(tuple(bool(title) for title, _ in filling.documents))
        values = self._slot_values(filling)
        token_ids: list[int] = []
        junctions = [len(runs[0])] if isinstance(runs[0], list) else []
        for run in runs:
            if isinstance(run, list):
                token_ids += run
            elif run == TURN:
                token_ids += self._encode_turn(filling)
            else:
                token_ids += self._encode_value(values[run.name], as_json=run.as_json)
                if self._asks_after_text and run.name in self._words.text_names:
                    junctions.append(len(token_ids))
        return Prompt(tuple(token_ids), tuple(junctions))

    def check_takes_documents(self) -> None:
        """Refuse a checkpoint whose prompts have no place for documents."""
        self._runs_with((True,))

    def _make_runs(self, has_title: tuple[bool, ...]) -> list[Run]:
        """Return the prompt for documents with and without titles, encoded as far as is known."""
        pieces = self._frame.render(self._tokenizer, has_title)
        if self._user.is_static:
            turn = self._user.render({name: self._constant(name) for name in self._user.names})
            place = pieces.index(TURN)
            pieces[place : place + 1] = turn
        return self._encode(pieces)

    def _encode(self, pieces: Iterable[Piece]) -> list[Run]:
        """Encode what is known: runs of template text as one, each plain text by itself."""
        runs: list[Run] = []
        for piece in _join_template_text(pieces):
            if isinstance(piece, Slot):
                runs.append(piece)
                continue
            known = self._encode_known(piece)
            if runs and isinstance(runs[-1], list):
                runs[-1].extend(known)
            else:
                runs.append(list(known))
        return runs

    def _encode_known(self, piece: str | Plain) -> Sequence[int]:
        if isinstance(piece, str):
            return self._encode_template(piece)
        if piece.token_ids is not None:
            return piece.token_ids
        return self._tokenizer.encode_text(piece.text)

    def _encode_value(self, value: str, *, as_json: bool) -> Sequence[int]:
        if as_json:
            return self._tokenizer.encode_text(json_escaped(value))
        if isinstance(value, TokenizedText):
            return value.token_ids
        return self._tokenizer.encode_text(value)

    def _encode_turn(self, filling: Filling) -> list[int]:
        """Render and encode a user turn that has logic in it."""
        values: dict[str, object] = {name: filling.columns[name] for name in self.columns}
        values |= dict.fromkeys(self._words.text_names, filling.text)
        values |= {"instruction": self._words.instruction, "chunk_label": filling.chunk_label}
        runs = self._encode(self._user.render(values))
        return [token_id for run in runs if isinstance(run, list) for token_id in run]

    def _slot_values(self, filling: Filling) -> dict[str, str]:
        values = {name: plain_text(filling.columns[name]) for name in self.columns}
        for index, (title, text) in enumerate(filling.documents):
            values[title_slot(index).name] = title
            values[text_slot(index).name] = text
        values |= dict.fromkeys(self._words.text_names, filling.text)
        return values | {"chunk_label": filling.chunk_label}

    def _constant(self, name: str) -> object:
        """Return what a static template is rendered with: the instruction, or a place to fill."""
        return self._words.instruction if name == "instruction" else Slot(name)

    def _has_words_after_text(self) -> bool:
        """Tell whether the question stands behind the document, which other questions may share."""
        turn = self._user.render({name: self._constant(name) for name in self._user.names})
        is_text = [isinstance(p, Slot) and p.name in self._words.text_names for p in turn]
        after = turn[len(turn) - is_text[::-1].index(True) :] if any(is_text) else []
        return any(isinstance(p, Plain) or (isinstance(p, str) and p.strip()) for p in after)

    def _example_turn(self, text: str) -> tuple[Piece, ...]:
        """Return an example's user turn: the same template, with empty columns."""
        values: dict[str, object] = dict.fromkeys(self._user.names, "")
        values |= dict.fromkeys(self._words.text_names, text)
        return tuple(self._user.render(values | {"instruction": self._words.instruction}))

    def _count_tokens(self) -> int:
        num_tokens = sum(len(run) for run in self._runs_with(()) if isinstance(run, list))
        if not self._user.is_static:  # at most: all branches of the template at once
            num_tokens += len(self._encode_template(self._user.text))
            num_tokens += self._tokenizer.count(self._words.instruction)
        if "chunk_label" in self._user.names:
            num_tokens += self._tokenizer.count(LONGEST_LABEL)
        return num_tokens


def _join_template_text(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join neighbouring template texts: encoded as one they are the tokens the model was taught."""
    for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_text:
            yield "".join(str(piece) for piece in group)
        else:
            yield from group
