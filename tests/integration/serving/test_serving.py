"""`granite-ray serve` with Ray Serve: real processes, a real port, the official client."""

import concurrent.futures
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx2
import openai
import pytest
import yaml
from ray import serve

from granite_ray import read_results, run_job
from granite_ray.config import parse_config
from tests.heads import BIN, ray_head
from tests.integration.serving_servers import (
    RunningServer,
    running_server,
    stop,
    wait_until,
    write_config,
)
from tests.unit.io.faulty_server import FaultyServer
from tests.unit.serving.conftest import KEY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

MODEL = "quickstart"
SERVE = f"{BIN}/serve"
TURNS = [{"role": "user", "content": "What is zlib?"}]
TEXTS = [f"Package {n} reads archives. It has {n} tools and a library." for n in range(40)]
TASK = {"labels": ["games", "libs", "science", "text"]}
NATIVE = {"backend": "native", "device": "cpu", "cache_gib": 0.2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("serve")
    with running_server(write_config(folder, engine=NATIVE), ray_address) as running:
        yield running


def test_a_server_answers_streams_and_says_when_it_is_ready(server: RunningServer) -> None:
    client = server.openai()
    values = {"model": MODEL, "messages": TURNS, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**values).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**values, stream=True)
    ]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 3, "it comes as it is written"
    with server.http() as http:
        assert http.get("/readyz").json() == {"status": "ready"}
    with server.http("wrong") as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/v1/models").status_code == 401


@pytest.mark.slow
@pytest.mark.usefixtures("joined_ray")
def test_rows_are_those_of_the_job(server: RunningServer, tmp_path: Path) -> None:
    source = tmp_path / "in" / "packages.jsonl"
    source.parent.mkdir()
    source.write_text(
        "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS))
    )
    config = parse_config(
        {
            "source": {"path": str(source), "format": "jsonl", "keep_columns": ["n"]},
            "task": {"kind": "classify", **TASK},
            "engine": NATIVE,
            "sink": {"path": str(tmp_path / "out")},
        }
    )
    assert run_job(config).exit_code == 0
    expected = read_results(str(tmp_path / "out")).to_pylist()
    with server.http() as http:
        form = {"file": (source.name, source.read_bytes())}
        file_id = http.post("/v1/files", files=form, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file_id, "task": TASK, "keep_columns": ["n"]}
        batch = ended(server, http.post("/v1/classify", json=body).json()["id"])
        lines = http.get(f"/v1/files/{batch.output_file_id}/content").text.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [without_scores(row) for row in rows] == [without_scores(row) for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["confidence"] == pytest.approx(wanted["confidence"], abs=1e-4)


def without_scores(row: dict[str, Any]) -> dict[str, Any]:
    """Likelihoods differ in their last digits with what stands beside them in a step."""
    return {name: value for name, value in row.items() if name not in ("confidence", "scores")}


def ended(server: RunningServer, batch_id: str) -> Any:
    client = server.openai()
    wait_until(lambda: client.batches.retrieve(batch_id).completed_at is not None, 600)
    return client.batches.retrieve(batch_id)


@pytest.mark.slow
@pytest.mark.usefixtures("joined_ray")
def test_who_leaves_stops_the_work(server: RunningServer) -> None:
    """A long answer, streamed and not, and its caller gone: the engine makes no more steps."""
    handle = serve.get_deployment_handle("engine", "granite-ray")

    def num_steps() -> int:
        return handle.num_steps.remote().result(timeout_s=60)

    def stands_still() -> bool:
        steps = num_steps()
        time.sleep(1)
        return num_steps() == steps

    values = {"model": MODEL, "messages": TURNS, "max_tokens": 1500, "temperature": 2, "seed": 1}
    for is_streamed in (True, False):
        before = num_steps()
        client = server.openai(max_retries=0, timeout=2.0)
        if is_streamed:
            stream = client.chat.completions.create(**values, stream=True)
            next(iter(stream))
            stream.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(**values)
        assert num_steps() > before
        wait_until(stands_still, 30)
        assert num_steps() - before < 6 * 1500 / 2, "it ended long before its last token"


@pytest.mark.slow
def test_a_replica_on_several_ranks_answers_as_one_on_one(
    server: RunningServer, tmp_path: Path
) -> None:
    values = {"model": MODEL, "messages": TURNS, "max_tokens": 24, "temperature": 0}
    expected = server.openai().chat.completions.create(**values)
    engine = {**NATIVE, "expert_parallel_size": 2}
    with running_server(write_config(tmp_path, engine=engine)) as ranked:
        client = ranked.openai()
        whole = client.chat.completions.create(**values)
        assert whole.choices[0].message.content == expected.choices[0].message.content
        chunks = client.chat.completions.create(**values, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == whole.choices[0].message.content
        assert len([piece for piece in pieces if piece]) > 3, "it comes as it is written"
        [shell] = ranked.actors("engine")
        shell.kill()
        wait_until(lambda: answers(client, values), 600, 2)


def answers(client: openai.OpenAI, values: dict[str, Any]) -> bool:
    try:
        return bool(client.chat.completions.create(**values).choices)
    except openai.InternalServerError:
        return False


@pytest.mark.slow
def test_killed_replicas_lose_no_batch_and_callers_may_try_again(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, engine={"backend": "fake", "fake_tokens_per_s": 2000, "num_replicas": 2}
    )
    with running_server(config) as server:
        batch_id = begin_batch(server)
        client = server.openai(max_retries=0)
        errors, answers = [], []

        def ask(number: int) -> None:
            turns = [{"role": "user", "content": f"Question {number}"}]
            try:
                values = {"model": MODEL, "messages": turns, "max_tokens": 30}
                answers.append(client.chat.completions.create(**values))
            except openai.APIStatusError as error:
                errors.append(error)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, number) for number in range(80)]
            time.sleep(2)
            server.actors("engine")[0].kill()
            concurrent.futures.wait(asked)
        assert len(answers) + len(errors) == 80
        assert {error.status_code for error in errors} <= {503, 429, 504}
        assert all("retry-after" in error.response.headers for error in errors)
        batch = ended(server, batch_id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (200, 0)
        wait_until(lambda: len(server.actors("engine")) == 2, 300)


@pytest.mark.slow
def test_a_restarted_server_goes_on_with_its_batches_and_drains(tmp_path: Path) -> None:
    engine = {"backend": "fake", "fake_tokens_per_s": 1000}
    config = write_config(tmp_path, engine=engine)
    with running_server(config) as server:
        batch_id = begin_batch(server)
        client = server.openai()
        wait_until(lambda: client.batches.retrieve(batch_id).request_counts.completed > 0, 300)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            values = {"model": MODEL, "messages": TURNS, "max_tokens": 30}
            last = pool.submit(client.chat.completions.create, **values)
            time.sleep(0.5)
            assert stop(server.process) == 0
            assert last.result().choices, "what was accepted is answered before the end"
    with running_server(config) as server:
        batch = ended(server, batch_id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (200, 0)
        lines = server.openai().files.content(batch.output_file_id).text.splitlines()
        assert [json.loads(line)["custom_id"] for line in lines] == [f"c{n}" for n in range(200)]


@pytest.mark.slow
def test_replicas_follow_the_requests(tmp_path: Path) -> None:
    engine = {"backend": "fake", "fake_tokens_per_s": 20, "num_replicas": [1, 2], "max_num_seqs": 2}
    with running_server(write_config(tmp_path, engine=engine)) as server:
        assert len(server.actors("engine")) == 1
        client = server.openai(timeout=900)
        values = {"model": MODEL, "messages": TURNS, "max_tokens": 200}
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(client.chat.completions.create, **values) for _ in range(60)]
            wait_until(lambda: len(server.actors("engine")) == 2, 300)
            for one in asked:
                one.cancel()
        assert all(one.result().choices for one in asked if not one.cancelled())


@pytest.mark.slow
def test_files_and_batches_live_in_a_bucket_and_outlive_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = FaultyServer()
    bucket.start()
    known = {
        "AWS_ENDPOINT_URL": bucket.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="answers")
    engine = {"backend": "fake", "fake_tokens_per_s": 1000}
    config = write_config(tmp_path, engine=engine, serve={"store_path": "s3://answers/store"})
    try:
        with running_server(config) as server:
            batch_id = begin_batch(server)
            batches = server.openai().batches
            wait_until(lambda: batches.retrieve(batch_id).request_counts.completed > 0, 300)
        with running_server(config) as server:
            batch = ended(server, batch_id)
            assert (batch.request_counts.completed, batch.request_counts.failed) == (200, 0)
            files = server.openai().files
            lines = files.content(batch.output_file_id).text.splitlines()
            assert [json.loads(line)["custom_id"] for line in lines] == [
                f"c{number}" for number in range(200)
            ]
            assert files.delete(batch.input_file_id).deleted
    finally:
        bucket.stop()
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_serve_deploy_brings_the_application_to_a_cluster(tmp_path: Path) -> None:
    """By Ray's own command, as the example in configs/ says, with the paths and a port of ours."""
    deploy = yaml.safe_load(Path("configs/serve_deploy.yaml").read_text())
    [application] = deploy["applications"]
    application["args"]["config"] = str(write_config(tmp_path, engine={"backend": "fake"}))
    path = tmp_path / "deploy.yaml"
    with socket.create_server(("127.0.0.1", 0)) as free:
        deploy["http_options"]["port"] = free.getsockname()[1]
    path.write_text(yaml.safe_dump(deploy))
    url = f"http://127.0.0.1:{deploy['http_options']['port']}"
    with ray_head("127.0.0.36") as head:
        deployed = head.run(SERVE, "deploy", str(path), "--address", head.dashboard)
        assert deployed.returncode == 0, deployed.stderr

        def status() -> str:
            return head.run(SERVE, "status", "--address", head.dashboard).stdout

        wait_until(lambda: "status: RUNNING" in status(), 300, 2)
        http = httpx2.Client(trust_env=False)
        client = openai.OpenAI(api_key=KEY, base_url=f"{url}/v1", http_client=http)
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = client.chat.completions.create(model=MODEL, messages=TURNS, max_tokens=5)
        assert answer.choices[0].message.content
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="gr-nobody").models.list()
        http.close()
        stopped = head.run(SERVE, "shutdown", "-y", "--address", head.dashboard)
        assert stopped.returncode == 0, stopped.stderr


def begin_batch(server: RunningServer) -> str:
    lines = [
        {
            "custom_id": f"c{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": TURNS, "max_tokens": 20, "seed": number},
        }
        for number in range(200)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    client = server.openai()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    return batch.id
