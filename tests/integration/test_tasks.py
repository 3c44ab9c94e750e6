"""Each task, and each class of checkpoint, as a whole job: rows, columns, what stands in them."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel, ConfigDict, Field

from granite_ray import run_job
from tests.corpus import make_config, make_text
from tests.invariants import check_output

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined_ray")]

PLACES = ("Wien", "東京", "São Paulo", "🏔️ Zermatt", "مكة")
EMOJI = "🙂🚀👩‍👩‍👧"
SCORES = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))
COMMON = [
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("num_chunks", pa.int32(), nullable=False),
    pa.field("num_failed_chunks", pa.int32(), nullable=False),
    pa.field("num_prompt_tokens", pa.int64(), nullable=False),
    pa.field("num_completion_tokens", pa.int64(), nullable=False),
    pa.field("finish_reason", pa.string()),
    pa.field("content_hash", pa.string()),
    pa.field("task", pa.string(), nullable=False),
    pa.field("checkpoint", pa.string(), nullable=False),
    pa.field("source_file", pa.string(), nullable=False),
    pa.field("source_row", pa.int64(), nullable=False),
    pa.field("year", pa.int64()),
]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    age: int | None


class Visit(BaseModel):
    """What the extraction tests ask for; a config names it as `module:Visit`."""

    model_config = ConfigDict(extra="forbid")

    place: Literal["Wien", "東京", "São Paulo", "🏔️ Zermatt", "مكة"]
    guests: list[Person] = Field(max_length=3)
    rating: float = Field(ge=0, le=5)
    is_paid: bool


def write_documents(folder: Path, texts: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True)
    values = {"id": list(texts), "text": list(texts.values()), "year": [2001] * len(texts)}
    pq.write_table(pa.table(values), folder / "part.parquet")
    return folder


def multilingual_texts(num_paragraphs: int) -> dict[str, str]:
    """Texts of several scripts; every paragraph of each names every place."""
    fillers = ("今日は良い天気ですね。", EMOJI, "Où est la bibliothèque?", "plain words here")
    texts = {}
    for index, filler in enumerate(fillers):
        paragraph = f"{filler} {' / '.join(PLACES)} {filler * 3}."
        texts[f"m{index}"] = "\n\n".join(f"{n}. {paragraph}" for n in range(num_paragraphs))
    return texts


def run(
    tmp_path: Path, texts: Mapping[str, str], /, **sections: dict[str, Any]
) -> list[dict[str, Any]]:
    """Run a job over `texts`, check what every job promises, and return its rows."""
    sections["source"] = {"keep_columns": ["year"]} | sections.get("source", {})
    config = make_config(write_documents(tmp_path / "in", texts), tmp_path / "out", **sections)
    report = run_job(config)
    assert report.exit_code == 0, report.failures
    rows = check_output(tmp_path / "out", len(texts))
    assert [row["document_id"] for row in rows] == list(texts)
    assert {row["task"] for row in rows} == {config.task.kind}
    return rows


def check_columns(tmp_path: Path, *task_fields: pa.Field) -> None:
    """Every file declares exactly these columns around the common ones."""
    expected = pa.schema(
        [
            pa.field("document_id", pa.string()),
            pa.field("status", pa.string(), nullable=False),
            *task_fields,
            *COMMON,
        ]
    )
    for path in (tmp_path / "out" / "results").iterdir():
        assert pq.read_schema(path).remove_metadata().equals(expected), path


def short_texts(num_documents: int = 12) -> dict[str, str]:
    return {f"d{seed}": make_text(seed) for seed in range(num_documents)}


# summarize, classify ─────────────────────────────────────────────────────────────────────────────


def test_summaries_of_several_chunks_have_key_points(tmp_path: Path) -> None:
    texts = multilingual_texts(20) | {"short": "One line."}
    rows = run(
        tmp_path,
        texts,
        task={"max_tokens": 40, "key_points": 3},
        chunking={"max_tokens": 200, "overlap_tokens": 20},
    )
    check_columns(
        tmp_path, pa.field("summary", pa.string()), pa.field("key_points", pa.list_(pa.string()))
    )
    assert rows[-1]["num_chunks"] == 1
    assert all(row["num_chunks"] > 3 for row in rows[:-1])
    assert all(row["summary"] and 1 <= len(row["key_points"]) <= 3 for row in rows)


def test_a_label_is_the_most_probable_one_of_the_list(tmp_path: Path) -> None:
    labels = ["science", "sports", "news", "other"]
    rows = run(
        tmp_path,
        short_texts() | multilingual_texts(8),
        task={"kind": "classify", "labels": labels, "calibration": "contextual"},
        chunking={"max_tokens": 300},
    )
    check_columns(
        tmp_path,
        pa.field("label", pa.string()),
        pa.field("confidence", pa.float32()),
        pa.field("scores", SCORES),
    )
    for row in rows:
        scores = {score["label"]: score["probability"] for score in row["scores"]}
        assert set(scores) == set(labels)
        assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(scores, key=lambda label: scores[label])
        assert row["confidence"] == scores[row["label"]]
    assert len({row["label"] for row in rows}) > 1
    assert max(row["num_chunks"] for row in rows) > 1


def test_each_of_several_labels_clears_its_bar(tmp_path: Path) -> None:
    rows = run(
        tmp_path,
        short_texts(),
        task={
            "kind": "classify",
            "labels": ["cheap", "new", "large"],
            "multi_label": True,
            "abstain_below": 0.6,
        },
    )
    check_columns(tmp_path, pa.field("labels", pa.list_(pa.string())), pa.field("scores", SCORES))
    for row in rows:
        clears = {score["label"] for score in row["scores"] if score["probability"] >= 0.6}
        assert set(row["labels"]) == clears
        assert len(row["scores"]) == 3
    assert len({len(row["labels"]) for row in rows}) > 1


def test_a_label_of_a_tree_is_a_path_to_a_leaf(tmp_path: Path) -> None:
    tree = {
        "animal": {"bird": None, "fish": ["pike", "carp"]},
        "stone": None,
        "plant": ["oak", "elm"],
    }
    leaves = {
        "animal/bird",
        "animal/fish/pike",
        "animal/fish/carp",
        "stone",
        "plant/oak",
        "plant/elm",
    }
    rows = run(tmp_path, short_texts(20), task={"kind": "classify", "labels": tree})
    for row in rows:
        assert row["label"] in leaves
        scores = {score["label"]: score["probability"] for score in row["scores"]}
        assert {"animal", "stone", "plant"} <= set(scores)
        assert row["confidence"] == pytest.approx(scores[row["label"]])
    assert len({row["label"] for row in rows}) > 2


# extract, generate ───────────────────────────────────────────────────────────────────────────────

VISIT = pa.struct(
    [
        ("place", pa.string()),
        ("guests", pa.list_(pa.struct([("name", pa.string()), ("age", pa.int64())]))),
        ("rating", pa.float64()),
        ("is_paid", pa.bool_()),
    ]
)
EVIDENCE = pa.list_(
    pa.struct(
        [
            ("path", pa.string()),
            ("value", pa.string()),
            ("start", pa.int32()),
            ("end", pa.int32()),
            ("chunk_index", pa.int32()),
        ]
    )
)
CONFLICTS = pa.list_(
    pa.struct(
        [
            ("path", pa.string()),
            ("values", pa.list_(pa.string())),
            ("chunk_indexes", pa.list_(pa.int32())),
        ]
    )
)


@pytest.mark.parametrize("written_as", ["class", "file"])
def test_records_validate_and_their_evidence_indexes_the_text_exactly(
    tmp_path: Path, written_as: str
) -> None:
    schema = f"{__name__}:Visit"
    if written_as == "class":
        # Loaded under the name that pytest gave this file, as a user's own module would be.
        assert sys.modules[__name__].Visit is Visit
    else:
        schema = str(tmp_path / "visit.json")
        Path(schema).write_text(json.dumps(Visit.model_json_schema()), encoding="utf-8")
    texts = multilingual_texts(16) | {"short": f"{EMOJI}東京{EMOJI}"}
    rows = run(
        tmp_path,
        texts,
        task={"kind": "extract", "schema": schema, "max_tokens": 300},
        chunking={"max_tokens": 250},
        job={"max_failed_fraction": 0.0},
    )
    check_columns(
        tmp_path,
        pa.field("fields", VISIT),
        pa.field("evidence", EVIDENCE),
        pa.field("conflicts", CONFLICTS),
    )
    num_found = 0
    for row in rows:
        text = texts[row["document_id"]]
        jsonschema.validate(row["fields"], Visit.model_json_schema())
        assert row["evidence"][0]["path"] == "/place"
        for one in row["evidence"]:
            assert value_at(row["fields"], one["path"]) == one["value"]
            assert 0 <= one["chunk_index"] < row["num_chunks"]
            if one["start"] is not None:
                num_found += text[one["start"] : one["end"]] == one["value"]
                assert text[one["start"] : one["end"]].casefold() == one["value"].casefold()
            else:
                assert one["value"] not in text
    assert all(row["num_chunks"] > 1 for row in rows[:-1])
    assert num_found >= 4
    assert any(row["conflicts"] for row in rows), "chunks never disagreed"


def value_at(record: Any, path: str) -> Any:
    """What a JSON Pointer without escapes leads to."""
    for name in path.split("/")[1:]:
        record = record[int(name)] if isinstance(record, list) else record[name]
    return record


def test_a_template_sees_columns_and_its_answer_is_text(tmp_path: Path) -> None:
    task = {
        "kind": "generate",
        "template": "Year {{ year }}{% if year > 2000 %}, recent{% endif %}:\n{{ text }}",
        "max_tokens": 30,
    }
    rows = run(tmp_path, short_texts(), task=task)
    check_columns(tmp_path, pa.field("text", pa.string()))
    assert len({row["text"] for row in rows}) == len(rows)
    assert not any(text in row["text"] for row in rows for text in short_texts().values())
    assert all(row["finish_reason"] in ("stop", "length") for row in rows)


def test_an_answer_with_a_schema_is_a_typed_record(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {
            "sentiment": {"enum": ["good", "bad"]},
            "reasons": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        },
        "required": ["sentiment", "reasons"],
        "additionalProperties": False,
    }
    task = {
        "kind": "generate",
        "template": "How does it sound?\n{{ text }}",
        "schema": schema,
        "max_tokens": 100,
    }
    rows = run(tmp_path, short_texts(), task=task)
    fields = pa.struct([("sentiment", pa.string()), ("reasons", pa.list_(pa.string()))])
    check_columns(tmp_path, pa.field("fields", fields))
    for row in rows:
        jsonschema.validate(row["fields"], schema)
    assert {row["fields"]["sentiment"] for row in rows} == {"good", "bad"}


# real checkpoints ────────────────────────────────────────────────────────────────────────────────

PLAIN_ANSWERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, is_chat, texts = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
answers = []
for text in texts:
    if is_chat:
        turns = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    else:
        prompt = f"### Task\\n{text}\\n\\n### Answer\\n"
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
    answers.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
print(json.dumps(answers))
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("kind", ["granite", "granitemoe", "granitemoehybrid"])
def test_a_job_answers_as_plain_transformers_does(tmp_path: Path, kind: str, is_chat: bool) -> None:
    # In a process of its own: torch would stay in this one for all tests that follow.
    folder = tmp_path / "checkpoint"
    make = (
        "import pathlib, sys; from tests.tiny_models import write_checkpoint;"
        "write_checkpoint(pathlib.Path(sys.argv[1]), sys.argv[2], chat=sys.argv[3] == 'True')"
    )
    subprocess.run(
        [sys.executable, "-c", make, str(folder), kind, str(is_chat)], check=True, timeout=90
    )
    texts = {f"d{seed}": make_text(seed, num_words=8) for seed in range(6)}
    rows = run(
        tmp_path,
        texts,
        task={"kind": "generate", "template": "{{ text }}", "max_tokens": 12},
        model={"path": str(folder), "dtype": "float32"},
        engine={"backend": "transformers", "device": "cpu"},
    )
    arguments = json.dumps([str(folder), is_chat, list(texts.values())])
    told = subprocess.run(
        [sys.executable, "-c", PLAIN_ANSWERS, arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    expected = [answer.strip() for answer in json.loads(told.stdout.splitlines()[-1])]
    assert [row["text"].strip() for row in rows] == expected
    assert {row["checkpoint"] for row in rows} == {"checkpoint"}
    assert len(set(expected)) > 3, "a model that repeats itself proves nothing"
    assert not any(re.search(r"<\|.*\|>", answer) for answer in expected)
