"""What others build on does not change unnoticed: names, the config's schema, the output columns.

A change that is meant: `python -m tests.test_surface` writes the snapshots anew.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest

import granite_ray
from granite_ray.config import config_schema, parse_config
from granite_ray.records import output_schema
from granite_ray.tasks import TaskLimits, make_task
from granite_ray.tokenizer import load_tokenizer
from tests.tiny import write_tokenizer

SNAPSHOTS = Path(__file__).parent / "snapshots"
RECORD = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "year": {"type": ["integer", "null"]},
        "price": {"type": "number"},
        "is_open": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "author": {"type": "object", "properties": {"name": {"type": "string"}}},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    },
}
TASKS: dict[str, dict[str, Any]] = {
    "summarize": {"kind": "summarize"},
    "summarize_key_points": {"kind": "summarize", "key_points": 3},
    "classify": {"kind": "classify", "labels": ["a", "b"]},
    "classify_multi": {"kind": "classify", "labels": ["a", "b"], "multi_label": True},
    "classify_tree": {"kind": "classify", "labels": {"a": ["x", "y"], "b": None}},
    "extract": {"kind": "extract", "schema": RECORD},
    "generate": {"kind": "generate", "template": "{{ text }}"},
    "generate_record": {"kind": "generate", "template": "{{ text }}", "schema": RECORD},
}


def exported_names() -> list[str]:
    return sorted(granite_ray.__all__)


def output_columns() -> dict[str, list[str]]:
    """The columns of each kind of task, in order, as `name: type`."""
    keep = [pa.field("kept", pa.int64())]
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = load_tokenizer(folder)
    limits = TaskLimits(max_model_len=2048)
    columns = {}
    for name, values in TASKS.items():
        config = {"source": {"path": "in"}, "task": values, "sink": {"path": "out"}}
        task = make_task(parse_config(config).task, tokenizer, limits)
        columns[name] = [
            f"{field.name}: {field.type}" + ("" if field.nullable else " not null")
            for field in output_schema(task.output_fields, keep)
        ]
    return columns


SURFACES = {
    "exported_names": exported_names,
    "config_schema": config_schema,
    "output_columns": output_columns,
}


def as_text(surface: Any) -> str:
    return json.dumps(surface, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", SURFACES)
def test_the_surface_is_as_it_was_last_agreed_on(name: str) -> None:
    agreed = (SNAPSHOTS / f"{name}.json").read_text(encoding="utf-8")
    assert as_text(SURFACES[name]()) == agreed, "meant? then: python -m tests.test_surface"


def test_every_exported_name_is_there_and_says_what_it_is() -> None:
    for name in granite_ray.__all__:
        assert getattr(granite_ray, name).__doc__, name


def test_every_key_of_a_config_says_what_it_does() -> None:
    schema = config_schema()
    sections = {"JobConfig": schema, **schema["$defs"]}

    def describes(value: dict[str, Any]) -> bool:
        section = value.get("$ref", "").rpartition("/")[2]
        return bool(value.get("description") or sections.get(section, {}).get("description"))

    silent = [
        f"{section}.{key}"
        for section, values in sections.items()
        for key, value in values.get("properties", {}).items()
        if not describes(value)
    ]
    assert silent == []


@pytest.mark.parametrize("module", ["granite_ray", "granite_ray.cli", "granite_ray.workers"])
def test_a_driver_loads_neither_torch_nor_transformers(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for name, surface in SURFACES.items():
        (SNAPSHOTS / f"{name}.json").write_text(as_text(surface()), encoding="utf-8")
