import json
from typing import Any

import pyarrow as pa
import pytest
from pydantic import BaseModel

from granite_ray.config import (
    ClassifyConfig,
    ExtractConfig,
    GenerateConfig,
    JobConfig,
    SummarizeConfig,
    parse_config,
)
from granite_ray.fingerprint import make_fingerprint

IDENTITY = {"files": {"config.json": "ab"}, "weights": {"model.safetensors": "cd"}}
SCHEMA = pa.schema([("document_id", pa.string()), ("summary", pa.string())])

SCHEMA_A_B = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
SCHEMA_B_A = {"type": "object", "properties": dict(reversed(SCHEMA_A_B["properties"].items()))}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

TASKS: dict[str, dict[str, Any]] = {
    "summarize": {"kind": "summarize"},
    "classify": {"kind": "classify", "labels": ["a", "b"]},
    "extract": {"kind": "extract", "schema": SCHEMA_A_B},
    "generate": {"kind": "generate", "template": "{{ text }}"},
}
TASK_MODELS = {
    "summarize": SummarizeConfig,
    "classify": ClassifyConfig,
    "extract": ExtractConfig,
    "generate": GenerateConfig,
}

# Every field of the config must stand in one of these tables, with another value than the base has.
CHANGES_ANSWERS: dict[str, Any] = {
    "source.text_column": "body",
    "source.id_column": "id",
    "chunking.max_tokens": 100,
    "chunking.overlap_tokens": 5,
    "chunking.max_chunks": 3,
    "chunking.max_failed_chunks": 1,
    "chunking.boundary": "sentence",
    "model.dtype": "float32",
    "model.load_format": "dummy",
    "model.max_model_len": 512,
    "engine.backend": "fake",
}
CHANGES_NO_ANSWER: dict[str, Any] = {
    "source.path": ["other"],
    "source.format": "jsonl",
    "source.keep_columns": ["url"],  # they change the output schema, which has its own test
    "source.filter": [["language", "==", "en"]],
    "source.documents_per_shard": 7,
    "source.bytes_per_shard": "1MiB",
    "source.on_bad_file": "skip",
    "source.on_duplicate": "error",
    "model.path": "elsewhere",  # the checkpoint's identity counts, not its place
    "engine.device": "cpu",
    "engine.num_replicas": 2,
    "engine.expert_parallel_size": 2,
    "engine.rank_timeout_s": 9.0,
    "engine.fake_tokens_per_s": 9.0,
    "engine.max_num_seqs": 3,
    "engine.max_num_batched_tokens": 999,
    "engine.block_size": 32,
    "engine.cuda_graphs": True,
    "engine.cache_gib": 1.5,
    "sink.path": "other",
    "sink.max_vanished_fraction": 0.1,
    "job.max_failed_fraction": 0.9,
    "job.lease_s": 5.0,
    "job.grace_s": 5.0,
    "job.scheduling_timeout_s": 5.0,
    "job.ray_address": "auto",
    "job.log_format": "json",
    "serve.host": "localhost",
    "serve.port": 9,
    "serve.keys_path": "keys.yaml",
    "serve.store_path": "store",
    "serve.tasks": {"short": {"kind": "summarize"}},
    "serve.max_in_flight": 9,
    "serve.max_batch_in_flight": 9,
    "serve.max_body_mib": 9.0,
    "serve.max_file_mib": 9.0,
    "serve.max_documents": 9,
    "serve.max_tokens": 9,
    "serve.max_batch_requests": 9,
    "serve.timeout_s": 9.0,
    "serve.body_timeout_s": 9.0,
    "serve.batch_hours": 9.0,
    "serve.drain_s": 9.0,
}
TASK_CHANGES: dict[str, Any] = {
    "instruction": "Other",
    "template": "{{ instruction }} {{ text }}",
    "examples": [{"input": "x", "output": "a"}],
    "system_prompt": "Be brief.",
    "language": "German",
    "max_tokens": 9,
    "temperature": 0.5,
    "seed": 4,
    "prompt_order": "document_first",
    "length": "long",
    "style": "plain",
    "focus": "dates",
    "key_points": 2,
    "labels": ["b", "a"],
    "multi_label": True,
    "abstain_below": 0.2,
    "calibration": "contextual",
    "schema": SCHEMA_B_A,
    "documents_column": "passages",
    "tools": [TOOL],
}


def make_config(kind: str = "summarize", **changes: Any) -> JobConfig:
    values: dict[str, dict[str, Any]] = {
        "source": {"path": "in"},
        "sink": {"path": "out"},
        "task": dict(TASKS[kind]),
    }
    if changes.get("source.on_duplicate") == "error":
        values["source"]["id_column"] = "id"
    for name, value in changes.items():
        section, field = name.split(".")
        values.setdefault(section, {})[field] = value
    return parse_config(values)


def fingerprint_of(config: JobConfig) -> str:
    return make_fingerprint(config, IDENTITY, SCHEMA)


def field_names(model: type[BaseModel], prefix: str = "") -> set[str]:
    return {prefix + (field.alias or name) for name, field in model.model_fields.items()}


def test_every_field_of_the_config_has_a_decision() -> None:
    sections = {
        name: field.annotation for name, field in JobConfig.model_fields.items() if name != "task"
    }
    names = set().union(*(field_names(model, f"{name}.") for name, model in sections.items()))
    assert names == CHANGES_ANSWERS.keys() | CHANGES_NO_ANSWER.keys()
    assert not CHANGES_ANSWERS.keys() & CHANGES_NO_ANSWER.keys()
    task_names = set().union(*(field_names(model) for model in TASK_MODELS.values()))
    assert task_names == TASK_CHANGES.keys() | {"kind"}


@pytest.mark.parametrize("name", CHANGES_ANSWERS)
def test_a_field_that_can_change_an_answer_changes_the_fingerprint(name: str) -> None:
    assert fingerprint_of(make_config(**{name: CHANGES_ANSWERS[name]})) != fingerprint_of(
        make_config()
    )


@pytest.mark.parametrize("name", CHANGES_NO_ANSWER)
def test_a_field_that_cannot_change_an_answer_does_not(name: str) -> None:
    base = make_config(**{"source.id_column": "id"} if name == "source.on_duplicate" else {})
    assert fingerprint_of(make_config(**{name: CHANGES_NO_ANSWER[name]})) == fingerprint_of(base)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind, model in TASK_MODELS.items()
        for name in sorted(field_names(model) - {"kind"})
    ],
)
def test_every_field_of_a_task_changes_the_fingerprint(kind: str, name: str) -> None:
    changed = make_config(kind, **{f"task.{name}": TASK_CHANGES[name]})
    assert fingerprint_of(changed) != fingerprint_of(make_config(kind))


def test_tasks_of_different_kinds_have_different_fingerprints() -> None:
    assert len({fingerprint_of(make_config(kind)) for kind in TASKS}) == len(TASKS)


def test_checkpoint_and_output_schema_are_part_of_it() -> None:
    config = make_config()
    other_schema = SCHEMA.append(pa.field("url", pa.string()))
    nested = SCHEMA.append(pa.field("url", pa.struct([pa.field("a", pa.int32())])))
    deeper = SCHEMA.append(pa.field("url", pa.struct([pa.field("a", pa.int64())])))
    prints = [
        make_fingerprint(config, IDENTITY, SCHEMA),
        make_fingerprint(config, IDENTITY | {"revision": "1"}, SCHEMA),
        *(make_fingerprint(config, IDENTITY, schema) for schema in (other_schema, nested, deeper)),
    ]
    assert len(set(prints)) == len(prints)


def test_the_order_of_facts_about_the_checkpoint_and_metadata_do_not_count() -> None:
    config = make_config()
    reordered = dict(reversed(IDENTITY.items()))
    labelled = SCHEMA.with_metadata({"made": "today"})
    assert make_fingerprint(config, reordered, labelled) == fingerprint_of(config)


def test_a_config_read_back_from_its_dump_has_the_same_fingerprint() -> None:
    for kind in TASKS:
        config = make_config(kind)
        again = JobConfig.model_validate(json.loads(json.dumps(config.dump())))
        assert fingerprint_of(again) == fingerprint_of(config)


def test_it_is_a_sha256_in_hex() -> None:
    assert len(bytes.fromhex(fingerprint_of(make_config()))) == 32
