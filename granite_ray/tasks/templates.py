"""A user turn's Jinja text → pieces that keep apart what the template says and what data says.

Whether a piece is template text is decided by its Python type, which Jinja hands through, and never
by what it contains: no document can write its way into the template's part.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from granite_ray.errors import ConfigError, RowFailure

STATEMENTS = (nodes.Output, nodes.If, nodes.For, nodes.Assign, nodes.AssignBlock)
"""Statements whose output reaches us one piece at a time; others would blend data into text."""

ROW_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What an expression of a template can raise on the values of one row."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place that a document fills; `as_json` where it stands inside a JSON string."""

    name: str
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Plain:
    """Text in which control tokens mean nothing. `token_ids` are its own, where known."""

    text: str
    token_ids: Sequence[int] | None = None


class TokenizedText(str):
    """A text whose token ids are known already. Whatever a filter makes of it is a plain `str`."""

    __slots__ = ("token_ids",)
    token_ids: Sequence[int]

    def __new__(cls, text: str, token_ids: Sequence[int]) -> "TokenizedText":
        tokenized = super().__new__(cls, text)
        tokenized.token_ids = token_ids
        return tokenized


Piece = str | Plain | Slot
"""`str` is template text: the only kind in which control tokens are read as such."""


class UserTemplate:
    """The Jinja text of one user turn.

    `names` are the variables that it reads. A static one only writes variables out, so its pieces
    are the same for every document.
    """

    def __init__(self, source: str) -> None:
        environment = _make_environment()
        with _read_errors():
            tree = environment.parse(source)
            _check_statements(tree)
            self._template = environment.from_string(source)
        self.names = frozenset(meta.find_undeclared_variables(tree))
        self.text = "".join(data.data for data in tree.find_all(nodes.TemplateData))
        self.is_static = _is_static(tree)

    def render(self, values: Mapping[str, object]) -> list[Piece]:
        """Write the turn for one document, or with `Slot`s as values if the template is static.

        Raises:
            RowFailure: The values do not suit the template.
        """
        try:
            return [_piece(part) for part in self._template.generate(values)]
        except ROW_ERRORS as error:
            raise RowFailure(
                "invalid_column",
                f"task.template cannot be filled from this row's columns ({type(error).__name__})",
            ) from error


def only_writes_variables(source: str) -> bool:
    """Tell whether a template has no logic, without compiling it: that computes constants already.

    Raises:
        ConfigError: It is no template.
    """
    with _read_errors():
        return _is_static(_make_environment().parse(source))


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.clear()
    return environment


@contextmanager
def _read_errors() -> Iterator[None]:
    """Turn what Jinja says of a template into ours."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        reason = (error.message or "it cannot be read").rstrip(".")
        raise ConfigError(
            f"task.template, line {error.lineno}: {reason}. Correct the template."
        ) from error


class _Inserted(str):
    """What one `{{ … }}` gave; `value` is it before it became text."""

    __slots__ = ("value",)
    value: object

    def __str__(self) -> str:
        return self  # Jinja calls str() on all that it writes; this keeps the type


def _finalize(value: object) -> _Inserted:
    inserted = _Inserted(plain_text(value))
    inserted.value = value
    return inserted


def _piece(part: str) -> Piece:
    if not isinstance(part, _Inserted):
        return part
    if isinstance(part.value, Slot):
        return part.value
    known = part.value.token_ids if isinstance(part.value, TokenizedText) else None
    return Plain(str.__str__(part), known)


def plain_text(value: Any) -> str:
    """Write a column's value as text: nothing for null, JSON for lists and objects."""
    if isinstance(value, jinja2.Undefined):
        return str(value)  # raises: the template reads a column that the row does not have
    if value is None or isinstance(value, Slot):
        return ""
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _check_statements(tree: nodes.Template) -> None:
    for statement in tree.find_all(nodes.Stmt):
        is_recursive = isinstance(statement, nodes.For) and statement.recursive
        if not isinstance(statement, STATEMENTS) or is_recursive:
            name = "a recursive for" if is_recursive else type(statement).__name__.lower()
            raise ConfigError(
                f"task.template, line {statement.lineno}: {name} cannot be used here. "
                "A template may use {{ … }}, if, for and set."
            )


def _is_static(tree: nodes.Template) -> bool:
    return all(
        isinstance(statement, nodes.Output)
        and all(isinstance(part, nodes.TemplateData | nodes.Name) for part in statement.nodes)
        for statement in tree.body
    )
