"""The user's choices of words → `PromptWords`; what would stay without effect is refused."""

import json
from collections.abc import Iterable
from typing import Any

from granite_ray.config import TaskSection
from granite_ray.errors import ConfigError
from granite_ray.tasks.prompts import PromptTemplate, PromptWords
from granite_ray.tasks.templates import UserTemplate

INSTRUCTION_FIRST = "{{ instruction }}\n\nDocument{{ chunk_label }}:\n{{ text }}"
DOCUMENT_FIRST = "Document{{ chunk_label }}:\n{{ text }}\n\n{{ instruction }}"


def prompt_words(
    config: TaskSection,
    instruction: str,
    examples: Iterable[tuple[str, str]],
    text_column: str,
) -> PromptWords:
    """Return the words of a prompt that shows a chunk of a document.

    Args:
        config: The task's section.
        instruction: What to do, with `task.instruction` applied.
        examples: Pairs of a document and what the model should write for it.
        text_column: A second name of the text, for templates.
    """
    words = PromptWords(
        template=config.template or default_template(config),
        instruction=with_language(config, instruction),
        examples=tuple(examples),
        system_prompt=config.system_prompt,
        text_names=frozenset({"text", text_column}),
    )
    if config.template is not None:
        _check_effects(config, UserTemplate(config.template).names)
    return words


def default_template(config: TaskSection) -> str:
    """Return the user turn of a task without `task.template`."""
    return DOCUMENT_FIRST if config.prompt_order == "document_first" else INSTRUCTION_FIRST


def with_language(config: TaskSection, instruction: str) -> str:
    """Ask for the language of the answer."""
    return f"{instruction} Write in {config.language}.".strip() if config.language else instruction


def text_examples(config: TaskSection) -> list[tuple[str, str]]:
    """Return `task.examples` as pairs, answers as the model would write them."""
    return [
        (
            example.input,
            example.output if isinstance(example.output, str) else compact_json(example.output),
        )
        for example in config.examples
    ]


def compact_json(value: Any) -> str:
    """Write a value as JSON without spare white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def check_shows_text(template: PromptTemplate) -> None:
    """Refuse a template that never shows the document."""
    if not template.shows_text:
        raise ConfigError(
            "task.template never shows the document. Write {{ text }} where it belongs."
        )


def _check_effects(config: TaskSection, names: frozenset[str]) -> None:
    for option in ("instruction", "language"):
        if getattr(config, option) and "instruction" not in names:
            raise ConfigError(
                f"task.{option} is set, but task.template has no place for it. "
                "Write {{ instruction }} into the template, or remove the option."
            )
    if config.prompt_order == "document_first":
        raise ConfigError(
            "task.prompt_order has no effect beside task.template, which sets the order. "
            "Remove one of them."
        )
