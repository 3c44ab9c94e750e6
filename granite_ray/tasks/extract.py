"""Typed records: each chunk is asked under a grammar, and the records are merged.

Every string of the record is located in the document.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from granite_ray.config import ExtractConfig
from granite_ray.records import LLM, Document, Result
from granite_ray.tasks.base import MeteredLLM, TaskLimits, chunk_tokens, free_tokens, run_metered
from granite_ray.tasks.evidence import find_evidence
from granite_ray.tasks.fields import RecordQuestion, RecordSchema
from granite_ray.tasks.prompts import PromptTemplate, chunk_filling
from granite_ray.tasks.wording import check_shows_text, compact_json, prompt_words, text_examples
from granite_ray.tokenizer import Tokenizer

DEFAULT_INSTRUCTION = "Extract a record from the document, using only what the document says."

EVIDENCE_TYPE = pa.struct(
    [
        pa.field("path", pa.string()),
        pa.field("value", pa.string()),
        pa.field("start", pa.int32()),  # null where the value stands nowhere in the text
        pa.field("end", pa.int32()),
        pa.field("chunk_index", pa.int32()),
    ]
)
CONFLICT_TYPE = pa.struct(
    [
        pa.field("path", pa.string()),
        pa.field("values", pa.list_(pa.string())),
        pa.field("chunk_indexes", pa.list_(pa.int32())),
    ]
)


class Extract:
    """One record a document, with evidence, and what chunks disagreed on."""

    kind = "extract"

    def __init__(self, config: ExtractConfig, tokenizer: Tokenizer, limits: TaskLimits) -> None:
        self._schema = RecordSchema(config.schema_)
        self._schema.check_examples(config)
        instruction = (
            f"{config.instruction or DEFAULT_INSTRUCTION} Answer with JSON that follows this "
            f"JSON Schema:\n{compact_json(self._schema.shown)}"
        )
        words = prompt_words(config, instruction, text_examples(config), limits.text_column)
        template = PromptTemplate(words, tokenizer)
        check_shows_text(template)
        self._question = RecordQuestion(config, self._schema, template, limits.max_failed_chunks)
        self.output_fields = (
            self._schema.field,
            pa.field("evidence", pa.list_(EVIDENCE_TYPE)),
            pa.field("conflicts", pa.list_(CONFLICT_TYPE)),
        )
        self.columns = template.columns
        free = free_tokens(limits, template.num_tokens, config.max_tokens)
        self.max_chunk_tokens = chunk_tokens(limits, free)

    async def run(self, document: Document, llm: LLM) -> Result:
        """Extract one document's record."""
        return await run_metered(document, llm, self._answer)

    async def _answer(self, document: Document, llm: MeteredLLM) -> Mapping[str, Any]:
        fillings = {chunk.index: chunk_filling(document, chunk) for chunk in document.chunks}
        merged = await self._question.ask(fillings, document, llm)
        evidence = find_evidence(merged, self._schema.shape, document)
        return {
            "fields": self._question.column(merged),
            "evidence": [asdict(one) for one in evidence],
            "conflicts": [asdict(one) for one in merged.conflicts],
        }
