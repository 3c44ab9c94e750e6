"""A record asked of each chunk under a grammar, merged, validated, and fit for its Arrow struct."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
import pyarrow as pa

from granite_ray.config import TaskSection
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import COPY_KEYWORD, Completion, Document, Grammar
from granite_ray.tasks.answers import read_json
from granite_ray.tasks.base import MeteredLLM, gather_chunks, sampling_params
from granite_ray.tasks.copies import has_copies
from granite_ray.tasks.keywords import Definition
from granite_ray.tasks.merge import MergedRecord, merge_records
from granite_ray.tasks.prompts import Filling, PromptTemplate
from granite_ray.tasks.schema import check_schema, compile_grammar, without_keyword
from granite_ray.tasks.shapes import Shape, arrow_value, declared_path, pointer, shape_of


class RecordSchema:
    """A user's schema, ready to ask with.

    A document of one chunk is asked for the record itself. Of several chunks each is asked for
    what it knows: there every property may be null and every list short. Strings marked `x-copy`
    are copied from the chunk that is asked.

    `shown` is the definition as the model sees it: without the mark, which it could not heed.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.definition = check_schema(schema)
        self.has_copies = has_copies(self.definition)
        self.shown = without_keyword(self.definition, COPY_KEYWORD)
        self.shape = shape_of(self.definition)
        self.field = pa.field("fields", self.shape.arrow_type)
        self._validator = _validator(self.definition)
        self._whole = _Form.of(self.definition, self.shape)
        self._partial = _Form.of(relaxed(self.definition, self.shape), self.shape)

    def form(self, num_chunks: int) -> "_Form":
        """Return what one chunk of so many must write."""
        return self._whole if num_chunks == 1 else self._partial

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise RowFailure unless the whole record is valid."""
        _check(record, self._validator, self.shape)

    def check_examples(self, config: TaskSection) -> None:
        """Refuse examples whose outputs are not valid records."""
        for index, example in enumerate(config.examples):
            try:
                output = example.output
                self.check(json.loads(output) if isinstance(output, str) else output)
            except (ValueError, RowFailure) as error:
                raise ConfigError(
                    f"task.examples[{index}].output is no record of task.schema: {error}."
                ) from error


@dataclass(frozen=True, slots=True)
class _Form:
    """A grammar, and the check that an answer followed it."""

    grammar: Grammar
    validator: jsonschema.Draft202012Validator
    shape: Shape

    @classmethod
    def of(cls, definition: Definition, shape: Shape) -> "_Form":
        validator = _validator(without_keyword(definition, "uniqueItems"))
        return cls(compile_grammar(definition), validator, shape)

    def grammar_over(self, text: str) -> Grammar:
        """Return the grammar of an answer that may copy strings from a chunk's text."""
        return replace(self.grammar, source=text)

    def read(self, completion: Completion) -> dict[str, Any]:
        """Return the record that was written."""
        record = read_json(completion)
        _check(record, self.validator, self.shape)
        return dict(record)


@dataclass(frozen=True, slots=True)
class RecordQuestion:
    """How a task asks for its record."""

    config: TaskSection
    schema: RecordSchema
    template: PromptTemplate
    max_failed_chunks: int

    async def ask(
        self, fillings: Mapping[int, Filling], document: Document, llm: MeteredLLM
    ) -> MergedRecord:
        """Ask each filling, given by chunk index, and merge the answers into a valid record."""
        form = self.schema.form(len(fillings))

        async def ask(chunk_index: int, filling: Filling) -> tuple[int, dict[str, Any]]:
            sampling = sampling_params(self.config, document, "record", chunk_index)
            prompt = self.template.fill(filling)
            grammar = form.grammar_over(filling.text) if self.schema.has_copies else form.grammar
            return chunk_index, form.read(await llm.generate(prompt, sampling, grammar))

        calls = [ask(index, filling) for index, filling in fillings.items()]
        answers = await gather_chunks(calls, llm, self.max_failed_chunks)
        records = [answer for answer in answers if answer is not None]
        merged = merge_records(records, self.schema.shape)
        self.schema.check(merged.values)
        return merged

    def column(self, merged: MergedRecord) -> Any:
        """Return the record as the value of its Arrow struct."""
        return arrow_value(merged.values, self.schema.shape)


def relaxed(node: Any, shape: Shape) -> Any:
    """Return a definition in which properties may be null and lists short.

    What becomes a JSON string stays strict: it is taken whole from one chunk.
    """
    if shape.kind not in ("object", "array") or node == {"type": "null"}:
        return node
    for keyword in ("anyOf", "oneOf"):
        if keyword in node:
            return {**node, keyword: [relaxed(below, shape) for below in node[keyword]]}
    if shape.kind == "array":
        return {key: value for key, value in node.items() if key != "minItems"}
    properties = {
        name: {"anyOf": [relaxed(below, shape.properties[name]), {"type": "null"}]}
        for name, below in node["properties"].items()
    }
    return {**node, "properties": properties}


def _validator(definition: Definition) -> jsonschema.Draft202012Validator:
    """Return the check of finished answers.

    Patterns are left to the grammar, which matches in linear time: Python's matcher can be made to
    take for ever, and reads some patterns otherwise.
    """
    return jsonschema.Draft202012Validator(without_keyword(definition, "pattern"))


def _check(record: Any, validator: jsonschema.Draft202012Validator, shape: Shape) -> None:
    error = next(validator.iter_errors(record), None)
    if error is not None:
        # Neither error.message, which quotes the value, nor keys that the model chose itself.
        place = declared_path(error.absolute_path, shape)
        problem = f"the value at {place or '/'} breaks {error.validator!r}"
        if error.validator == "required":
            missing = next(name for name in error.validator_value if name not in error.instance)
            problem = f"no chunk gives the required {pointer(place, missing)}"
        raise RowFailure("schema_violation", problem)
