"""`granite-ray ask` against the application, and `granite-ray serve` before it starts anything."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pyarrow.parquet as pq
import pytest
import uvicorn

from granite_ray.cli import main
from granite_ray.serving.keys import load_keys
from tests.unit.serving.conftest import KEY, Server


@pytest.fixture
def url(serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The application on a real port of loopback, batches and all."""
    server: Server = serve(serve={"tasks": {"kinds": {"kind": "classify", "labels": ["a", "b"]}}})
    config = uvicorn.Config(server.app, host="127.0.0.1", port=0, log_level="error", lifespan="on")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve()), daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
    [port] = [socket.getsockname()[1] for one in running.servers for socket in one.sockets]
    monkeypatch.setenv("GRANITE_RAY_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GRANITE_RAY_KEY", KEY)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(20)


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.usefixtures("url")
def test_texts_are_asked_about_by_a_named_task(tmp_path: Path, capsys) -> None:
    (tmp_path / "one.txt").write_text("a text")
    (tmp_path / "two.md").write_text("another text")
    assert (
        main(["ask", str(tmp_path / "one.txt"), str(tmp_path / "two.md"), "--task", "kinds"]) == 0
    )
    rows = rows_of(capsys)
    assert [row["document_id"] for row in rows] == ["one.txt", "two.md"]
    assert {row["label"] for row in rows} <= {"a", "b"}


@pytest.mark.usefixtures("url")
def test_a_file_of_documents_becomes_a_batch_and_a_parquet_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(30)) + "{}\n")
    out = tmp_path / "out.parquet"
    assert main(["ask", str(path), "--task", "summarize", "--out", str(out)]) == 3
    table = pq.read_table(out)
    assert table["document_id"].to_pylist() == [f"in.jsonl#{n}" for n in range(31)]
    assert table["status"].to_pylist() == ["ok"] * 30 + ["failed"]
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("url")
def test_a_task_file_is_read_here_with_all_that_it_names(tmp_path: Path, capsys) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "task.yaml").write_text("task: {kind: extract, schema: schema.json}\n")
    (tmp_path / "one.txt").write_text("a text")
    assert main(["ask", str(tmp_path / "one.txt"), "--task", str(tmp_path / "task.yaml")]) == 0
    assert list(rows_of(capsys)[0]["fields"]) == ["name"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.txt", "--task", "kinds"], 2, "nowhere.txt is not a file"),
        ([__file__, "--task", "nothing"], 2, "nor one of the server's tasks ['kinds']"),
        ([__file__, "--task", "classify", "--url", "http://127.0.0.1:9"], 75, "does not answer"),
        ([__file__, "--task", "extract"], 2, "answered 400"),
    ],
)
@pytest.mark.usefixtures("url")
def test_what_cannot_be_asked_is_said(capsys, arguments, code, words) -> None:
    assert main(["ask", *arguments]) == code
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_a_wrong_key_is_said(url, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("GRANITE_RAY_KEY", "wrong")
    assert main(["ask", __file__, "--task", "summarize"]) == 2
    assert "answered 401" in capsys.readouterr().err.replace("\n", " ")
    assert httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200


def test_a_new_key_is_shown_once_with_its_entry(tmp_path: Path, capsys) -> None:
    assert main(["serve", "--new-key", "alice"]) == 0
    told = capsys.readouterr().out
    path = tmp_path / "keys.yaml"
    path.write_text(told)
    key = told.splitlines()[0].rpartition(" ")[2]
    found = load_keys(str(path)).find(key.encode())
    assert found is not None
    assert found.name == "alice"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("serve: {host: 0.0.0.0}", "can be reached by others"),
        ("serve: {keys_path: nowhere.yaml}", "serve.keys_path"),
        ("model: {path: nowhere}", "model.path 'nowhere'"),
        ("serve: {tasks: {a: {kind: summarize, template: 'x {{ instruction }}'}}}", "Task"),
        ("serve: {host: 203.0.113.1, keys_path: keys.yaml}", "cannot be listened on"),
    ],
)
def test_a_server_that_cannot_work_is_refused_before_ray_starts(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    key = "keys: [{name: a, sha256: " + "a" * 64 + "}]"
    (tmp_path / "keys.yaml").write_text(key)
    (tmp_path / "serve.yaml").write_text(text)
    assert main(["serve", "serve.yaml"]) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_serve_needs_a_config_or_a_name(capsys) -> None:
    assert main(["serve"]) == 2
    assert "needs a CONFIG" in capsys.readouterr().err
