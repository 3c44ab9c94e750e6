"""The prompts that the embedded model learns: caught where granite_ray's own tasks render them.

A task is run on a text that stands for any text, against a listener in an engine's place. What
stands before and after that text in a prompt is the same for every document.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from granite_ray.config import TaskConfig
from granite_ray.quickstart.make_tokenizer import CONTEXT_LENGTH
from granite_ray.quickstart.training.records import ENTRY_FIELDS
from granite_ray.quickstart.training.timetable import Kind
from granite_ray.records import Chunk, Completion, Document, Grammar, Prompt, SamplingParams
from granite_ray.tasks import TaskLimits, make_task
from granite_ray.tokenizer import Tokenizer

MARK = "\u2603\u2602\u2601"
"""Stands for a text; no prompt contains it otherwise."""

SECTION_INSTRUCTIONS = (
    None,
    "Name the archive section of the Debian package that this text describes.",
    "Which section of the Debian archive does this package belong to?",
    "Choose the archive section for the package described here.",
    "Sort this package into its section.",
    "Decide which section the described software goes into.",
    "Label the description with its archive section.",
)
SYNOPSIS_INSTRUCTIONS = (
    None,
    "Write the one-line synopsis of the Debian package that this text describes.",
    "Summarize the description of this package in one short line.",
    "Give a short description of this package, in one line.",
    "Say in a few words what this package is.",
    "Condense this text into a single short phrase.",
)
ENTRY_INSTRUCTIONS = (
    None,
    "Extract the fields of this Debian changelog entry.",
    "Read the changelog entry and fill in the record.",
    "Which package was uploaded, by whom, and which bugs and CVE ids does the entry name?",
    "Find these fields in the changelog.",
)
SUMMARIZE = {"kind": "summarize", "length": "sentence", "max_tokens": 48}
COPIED = {"type": "string", "x-copy": True}
EXTRACT = {
    "kind": "extract",
    "schema": {
        "type": "object",
        "properties": {
            name: {"type": "array", "items": COPIED} if is_list else COPIED
            for name, is_list in ENTRY_FIELDS
        },
        "required": [name for name, _ in ENTRY_FIELDS],
    },
}
LIMITS = TaskLimits(CONTEXT_LENGTH)
NUM_CHUNKS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class PromptShape:
    """Token ids around the text that a prompt is about."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(slots=True)
class _Listener:
    """Answers everything in the same way and remembers what it was asked."""

    tokenizer: Tokenizer
    answer: str
    prompts: list[tuple[int, ...]] = field(default_factory=list)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        grammar: Grammar | None = None,  # noqa: ARG002
    ) -> Completion:
        self.prompts.append(prompt.token_ids)
        return Completion(self.answer, len(prompt.token_ids), sampling.max_tokens, "stop")

    async def score(self, prompt: Prompt, choices: Sequence[tuple[int, ...]]) -> list[float]:
        self.prompts.append(prompt.token_ids)
        return [0.0] * len(choices)

    def count(self, text: str) -> int:
        return self.tokenizer.count(text)


class PromptShapes:
    """Shapes of the prompts about sections, synopses and changelog entries."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def classify(self, labels: Sequence[str]) -> list[PromptShape]:
        """Return the ways to ask which of some labels fits a text."""
        return self._shapes(_classify(labels), SECTION_INSTRUCTIONS)

    def summarize(self) -> list[PromptShape]:
        """Return the ways to ask for a text's summary."""
        return self._shapes(SUMMARIZE, SYNOPSIS_INSTRUCTIONS)

    def extract(self) -> list[PromptShape]:
        """Return the ways to ask for the record of a changelog entry."""
        return self._shapes(EXTRACT, ENTRY_INSTRUCTIONS)

    def exam(self, labels: Sequence[str]) -> dict[Kind, PromptShape]:
        """Return the one way in which each thing is asked to see how well it is known."""
        asked: dict[Kind, tuple[dict[str, Any], str | None]] = {
            "section": (_classify(labels), SECTION_INSTRUCTIONS[1]),
            "synopsis": (SUMMARIZE, SYNOPSIS_INSTRUCTIONS[1]),
            "entry": (EXTRACT, ENTRY_INSTRUCTIONS[1]),
        }
        return {
            kind: self._hear({**values, "instruction": instruction}, num_chunks=1)[0]
            for kind, (values, instruction) in asked.items()
        }

    def _shapes(
        self, values: Mapping[str, Any], instructions: Iterable[str | None]
    ) -> list[PromptShape]:
        shapes = {
            shape
            for instruction in instructions
            for order in ("instruction_first", "document_first")
            for number in NUM_CHUNKS
            for shape in self._hear(
                {**values, "instruction": instruction, "prompt_order": order}, number
            )
        }
        return sorted(shapes, key=lambda shape: (shape.before, shape.after))

    def _hear(self, values: Mapping[str, Any], num_chunks: int) -> list[PromptShape]:
        config: TaskConfig = TypeAdapter(TaskConfig).validate_python(values)
        answer = MARK if values["kind"] == "summarize" else "{}"
        listener = _Listener(self._tokenizer, answer)
        mark = tuple(self._tokenizer.encode_text(MARK))
        chunks = tuple(Chunk(index, 0, len(MARK), mark) for index in range(num_chunks))
        document = Document("", "", 0, MARK, "", chunks)
        asyncio.run(make_task(config, self._tokenizer, LIMITS).run(document, listener))
        return [_around(prompt, mark) for prompt in listener.prompts]


def _classify(labels: Sequence[str]) -> dict[str, Any]:
    return {"kind": "classify", "labels": list(labels)}


def _around(prompt: tuple[int, ...], mark: tuple[int, ...]) -> PromptShape:
    """Cut a prompt at the text; where several parts are merged, they become one."""
    size = len(mark)
    places = [at for at in range(len(prompt) - size + 1) if prompt[at : at + size] == mark]
    assert places, "the text stands nowhere in its prompt"
    return PromptShape(prompt[: places[0]], prompt[places[-1] + size :])
