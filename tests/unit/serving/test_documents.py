"""Documents in, a job's rows out: at once, as they are ready, as Parquet, or as a batch."""

import asyncio
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from granite_ray.records import RAW_FIELDS, output_schema
from granite_ray.serving.questions import DocumentsRequest, Question
from tests.unit.serving.conftest import NATIVE

TEXTS = [f"Document {number} reads archives and lists what is in them." for number in range(5)]
TASKS = {
    "summarize": {"length": "sentence"},
    "classify": {"labels": ["games", "libs", "science"]},
    "extract": {"schema": {"type": "object", "properties": {"name": {"type": "string"}}}},
    "generate": {"template": "Say more of {{ topic }}: {{ text }}"},
}
DOCUMENTS = [{"text": text, "topic": "size", "id": f"d{i}"} for i, text in enumerate(TEXTS)]


def post(server, kind, key=None, **body):
    async def run():
        async with server.http(**({"key": key} if key else {})) as client:
            headers = {"Content-Type": "application/json"}
            return await client.post(f"/v1/{kind}", content=json.dumps(body), headers=headers)

    return asyncio.run(run())


def ask(server, kind, **body):
    response = post(server, kind, **{"documents": DOCUMENTS, "task": TASKS[kind], **body})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("kind", TASKS)
def test_rows_have_the_columns_of_a_job_in_their_order(serve, kind):
    server = serve()
    body = {"id_column": "id", "keep_columns": ["topic"]}
    rows = ask(server, kind, **body).json()["data"]
    request = DocumentsRequest(documents=DOCUMENTS, task=TASKS[kind], **body)
    task = Question(server.gateway, kind, request).task
    schema = output_schema(task.output_fields, [pa.field("topic", pa.string())])
    assert [list(row) for row in rows] == [schema.names] * len(TEXTS)
    assert [row["document_id"] for row in rows] == ["d0", "d1", "d2", "d3", "d4"]
    assert {row["topic"] for row in rows} == {"size"}
    assert {row["status"] for row in rows} == {"ok"}


@pytest.mark.parametrize("kind", TASKS)
def test_lines_and_parquet_hold_the_same_rows(serve, kind):
    server = serve()
    rows = ask(server, kind).json()["data"]
    lines = [json.loads(line) for line in ask(server, kind, format="jsonl").text.splitlines()]
    assert sorted(lines, key=lambda row: row["source_row"]) == rows
    table = pq.read_table(io.BytesIO(ask(server, kind, format="parquet").content))
    assert table.to_pylist() == rows
    assert table.schema.field("num_chunks").type == pa.int32(), "declared, not guessed"


def test_a_task_is_named_inline_or_the_only_one_of_its_kind(serve):
    named = {"sections": {"kind": "classify", "labels": ["x", "y"]}}
    server = serve(serve={"tasks": named})
    by_name = ask(server, "classify", task="sections").json()["data"]
    alone = post(server, "classify", documents=DOCUMENTS).json()["data"]
    inline = ask(server, "classify", task={"labels": ["x", "y"]}).json()["data"]
    assert by_name == alone == inline
    assert {row["label"] for row in by_name} <= {"x", "y"}


def test_a_bad_document_is_a_row_and_its_neighbours_are_answered(serve):
    documents = ["good", "", {"text": None}, {"text": 5}, {"other": "x"}, {"text": "\ud800"}]
    rows = ask(serve(), "summarize", documents=documents).json()["data"]
    assert [row["error_type"] for row in rows] == [
        None, "empty_text", "null_text", "invalid_text", "null_text", "invalid_text",
    ]  # fmt: skip
    assert rows[0]["summary"]


def test_evidence_stands_in_the_text_that_was_sent(serve):
    schema = {"type": "object", "properties": {"name": {"type": "string", "x-copy": True}}}
    server = serve(engine=NATIVE)
    text = "🙂 zlib is a library."
    [row] = ask(server, "extract", documents=[text], task={"schema": schema}).json()["data"]
    for found in row["evidence"]:
        assert text[found["start"] : found["end"]] == found["value"]


def test_many_documents_become_a_batch_with_the_same_rows(serve):
    server = serve(serve={"max_documents": 2})
    few = [ask(server, "classify", documents=DOCUMENTS[i : i + 1]).json()["data"][0]
           for i in range(5)]  # fmt: skip

    async def run():
        async with server.running(), server.http() as client:
            body = {"documents": DOCUMENTS, "task": TASKS["classify"]}
            accepted = await client.post("/v1/classify", json=body)
            assert accepted.status_code == 202
            batch = await server.ended(accepted.json()["id"])
            content = await client.get(f"/v1/files/{batch.output_file_id}/content")
            return batch, [json.loads(line) for line in content.text.splitlines()]

    batch, rows = asyncio.run(run())
    assert batch.request_counts.completed == batch.request_counts.total == 5
    place = {"source_file": "documents.jsonl"}
    for number, (alone, row) in enumerate(zip(few, rows, strict=True)):
        place["source_row"], place["document_id"] = number, f"documents.jsonl#{number}"
        assert row == alone | place


def test_a_parquet_file_becomes_a_parquet_file(serve):
    server = serve()
    sink = io.BytesIO()
    table = pa.table({"body": TEXTS * 8, "number": list(range(40))})
    pq.write_table(table, sink)

    async def run():
        async with server.running(), server.http() as client:
            form = {"file": ("reports.parquet", sink.getvalue())}
            stored = await client.post("/v1/files", files=form, data={"purpose": "batch"})
            body = {
                "input_file_id": stored.json()["id"],
                "task": TASKS["summarize"],
                "text_column": "body",
                "keep_columns": ["number"],
                "format": "parquet",
            }
            accepted = await client.post("/v1/summarize", json=body)
            batch = await server.ended(accepted.json()["id"])
            content = await client.get(f"/v1/files/{batch.output_file_id}/content")
            return pq.read_table(io.BytesIO(content.content))

    rows = asyncio.run(run())
    assert rows["number"].to_pylist() == list(range(40))
    assert rows.schema.field("number").type == pa.int64(), "as a job keeps it"
    assert rows["document_id"].to_pylist()[:2] == ["reports.parquet#0", "reports.parquet#1"]


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("summarize", {"documents": None}, "either documents or input_file_id"),
        ("summarize", {"task": "nowhere"}, "no summarize task"),
        ("summarize", {"task": {"kind": "classify"}}, "task.kind must be summarize"),
        ("summarize", {"task": {"length": "epic"}}, "task.length"),
        ("summarize", {"task": {"max_tokens": 10**6}}, "this server allows"),
        ("classify", {"task": {"labels": ["one"]}}, "needs at least 2"),
        ("classify", {"task": {"labels": [f"l{i}" for i in range(600)]}}, "more than 512"),
        ("extract", {"task": {"schema": {"type": "string"}}}, "must be an object at its top"),
        ("extract", {"task": {"schema": "schemas/invoice.json"}}, "files cannot be named here"),
        ("extract", {"task": {"schema": "os:environ"}}, "files cannot be named here"),
        ("generate", {"task": {"template": "../../etc/passwd"}}, "files cannot be named here"),
        ("generate", {"task": {"template": "{{ text }}", "tools": "x.json"}}, "cannot be named"),
        ("generate", {"task": {"template": "{{ 'a' * 10**9 }}"}}, "may only write variables"),
        ("generate", {"task": {"template": "{{ 9**9**9 }}"}}, "may only write variables"),
        ("generate", {"task": {"template": "{% for c in text %}x{% endfor %}"}}, "may only write"),
        ("generate", {"task": {"template": "{{ text"}}, "task.template, line 1"),
        ("summarize", {"keep_columns": ["summary"]}, "keep_columns has 'summary'"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(serve, kind, body, words):
    response = post(serve(), kind, **{"documents": DOCUMENTS, "task": TASKS[kind], **body})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_raw_rows_of_a_request_are_those_of_a_job(serve):
    question = Question(serve().gateway, "summarize", DocumentsRequest(documents=["a"], task={}))
    raw = question.raw(["a"])
    assert raw.schema.names == [field.name for field in RAW_FIELDS]
