"""What is refused before a route is reached: keys, sizes, speed, nesting, rates, other sites."""

import asyncio
import base64
import json
import logging
import re
import sys

import pytest

from granite_ray.config import load_server_config, parse_section
from granite_ray.config.sections import ServerConfig
from granite_ray.errors import ConfigError
from granite_ray.serving.errors import ApiError
from granite_ray.serving.guard import MAX_DEPTH, check_json
from granite_ray.serving.keys import Caller, Keys, load_keys, make_key
from granite_ray.serving.limits import Limits
from tests.unit.serving.conftest import KEY, server_config, write_keys

MODEL = "quickstart"
PATHS = ("/", "/v1/models", "/v1/tasks", "/v1/files", "/v1/batches", "/metrics", "/readyz",
         "/openapi.json", "/nowhere", "/docs", "/v1/chat/completions")  # fmt: skip
CANARY = "canary-7f3a"


def call(server, method, path, key=KEY, **content):
    async def run():
        async with server.http(key) as client:
            return await client.request(method, path, **content)

    return asyncio.run(run())


async def send(server, path, messages, headers=()):
    """Send a body message by message; return status, body and how many messages were taken."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), *headers, (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }
    taken, sent = [], []

    async def receive():
        taken.append(1)
        message = messages(len(taken))
        if message is None:
            await asyncio.sleep(60)
        return message

    async def answer(message):
        sent.append(message)

    await server.app(scope, receive, answer)
    body = b"".join(one.get("body", b"") for one in sent[1:])
    return sent[0]["status"], json.loads(body), len(taken), dict(sent[0]["headers"])


def with_key(key=KEY):
    return ((b"authorization", f"Bearer {key}".encode()),)


def endless(_):
    return {"type": "http.request", "body": b"x" * 65536, "more_body": True}


# keys ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Token {KEY}",
     "Bearer schlüssel", "Basic !!!", "Basic " + base64.b64encode(b"u:no").decode()],
)  # fmt: skip
def test_without_a_valid_key_there_is_nothing_but_health(serve, authorization):
    server = serve()
    headers = {} if authorization is None else {"Authorization": authorization.encode()}

    async def run():
        async with server.http(None) as client:
            answers = [await client.get(path, headers=headers) for path in PATHS]
            return answers, await client.get("/healthz")

    answers, health = asyncio.run(run())
    for response in answers:
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert health.json() == {"status": "ok"}


def test_a_wrong_key_is_refused_before_the_body_is_read(serve):
    server = serve()
    for headers in ((), with_key("wrong")):
        status, _, num_taken, _ = asyncio.run(send(server, "/v1/files", endless, headers))
        assert (status, num_taken) == (401, 0)


def test_every_key_is_compared_whole_and_in_constant_time(monkeypatch, tmp_path):
    compared = []

    def compare(first, second):
        compared.append((len(first), len(second)))
        return first == second

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = load_keys(str(write_keys(tmp_path)))
    for key in (KEY.encode(), b"wrong", b"", None):
        keys.find(key)
    assert compared == [(64, 64)] * 8, "two keys, four times, digests only"


def test_the_keys_file_holds_no_key_and_a_new_entry_is_read_back(tmp_path):
    key, entry = make_key("carol")
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n{entry}")
    assert key not in path.read_text()
    found = load_keys(str(path)).find(key.encode())
    assert found is not None
    assert found.name == "carol"
    with pytest.raises(ConfigError, match="name"):
        make_key("../carol")


@pytest.mark.parametrize(
    "text", ["keys: []", "keys: [{name: a}]", "keys: [{name: A/b, sha256: x}]", "nonsense", ""]
)
def test_a_keys_file_that_is_wrong_is_refused_by_field(tmp_path, text):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"serve\.keys_path"):
        load_keys(str(path))


def test_a_browser_shows_the_page_with_basic_credentials_but_no_other_site_can_post(serve):
    server = serve()
    basic = {"Authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()}
    page = call(server, "GET", "/", None, headers=basic)
    assert page.status_code == 200
    body = {"documents": ["a text"], "task": {}}
    forged = call(server, "POST", "/v1/summarize", None, headers=basic, json=body)
    assert forged.status_code == 401
    own = basic | {"X-Granite-Page": "1"}
    assert call(server, "POST", "/v1/summarize", None, headers=own, json=body).status_code == 200


def test_an_address_that_others_reach_needs_keys():
    with pytest.raises(ConfigError, match=r"serve: serve.host 0.0.0.0 can be reached by others"):
        server_config({"serve": {"host": "0.0.0.0"}})
    assert server_config({"serve": {"host": "0.0.0.0", "keys_path": "k"}}).serve.keys_path == "k"
    assert server_config({}).serve.is_local


@pytest.mark.parametrize(
    ("client", "host", "status"),
    [("127.0.0.1", "localhost:8000", 200), ("127.0.0.1", "[::1]:8000", 200),
     ("10.0.0.7", "localhost", 401), ("127.0.0.1", "evil.example", 401)],
)  # fmt: skip
def test_without_keys_only_this_machine_is_answered(serve, client, host, status):
    server = serve(serve={"keys_path": None})

    async def run():
        import httpx2

        transport = httpx2.ASGITransport(app=server.app, client=(client, 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.get("/v1/models", headers={"Host": host})

    assert asyncio.run(run()).status_code == status


# bodies ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files", "/nowhere"])
def test_a_body_is_counted_while_it_comes_and_cut_off(serve, path):
    server = serve(serve={"max_body_mib": 0.5, "max_file_mib": 0.5})
    form = (b"content-type", b"multipart/form-data; boundary=x")
    headers = (*with_key(), form) if path == "/v1/files" else with_key()
    status, body, num_taken, _ = asyncio.run(send(server, path, started_form, headers))
    assert (status, body["error"]["code"]) == (413, "too_large")
    assert num_taken < 30, "0.5 MiB, or 1.5 with what may surround a file, in steps of 64 KiB"


def started_form(number):
    start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    return endless(number) if number > 1 else {**endless(1), "body": start}


def test_a_body_that_stops_coming_is_given_up(serve):
    server = serve(serve={"body_timeout_s": 0.05})
    form = (b"content-type", b"multipart/form-data; boundary=x")
    for path, headers in (("/v1/chat/completions", ()), ("/v1/files", (form,))):
        status, body, _, _ = asyncio.run(
            send(
                server,
                path,
                lambda number: started_form(1) if number == 1 else None,
                (*with_key(), *headers),
            )
        )
        assert (status, body["error"]["code"]) == (408, "body_timeout")


@pytest.mark.parametrize(
    ("body", "is_deep"),
    [
        (b"[" * 65, True),
        (b"[" * 64 + b"]" * 64, False),
        (b'{"a":' * 70 + b"1" + b"}" * 70, True),
        (b'"' + b"[" * 1000 + b'"', False),
        (b'"\\"' + b"[" * 1000 + b'"', False),
        (b'"\\\\"' + b"[" * 1000, True),
        (b'"' + b"[" * 1000, False),
        (b"[]" * 1000, False),
        (b'"' * 100_001 + b"\\" * 100_001, False),
    ],
)
def test_nesting_is_counted_outside_of_strings(body, is_deep):
    assert MAX_DEPTH == 64
    if is_deep:
        with pytest.raises(ApiError, match="nested deeper"):
            check_json(body)
    else:
        check_json(body)


def test_deeply_nested_json_and_broken_json_are_the_callers_fault(serve):
    server = serve()
    for content in (b"[" * 100_000, b'{"model": ', b"\xff\xfe", b""):
        headers = {"Content-Type": "application/json"}
        response = call(server, "POST", "/v1/completions", content=content, headers=headers)
        assert response.status_code == 400, content[:9]
        assert response.json()["error"]["type"] == "invalid_request_error"


TOUCHED: list[str] = []
WATCHED_EVENTS = ("open", "socket.connect", "socket.getaddrinfo", "import")
sys.addaudithook(
    lambda event, values: TOUCHED.append(str(values)) if event in WATCHED_EVENTS else None
)

STRANGE = ("../../../etc/passwd", "file:///etc/passwd", "s3://bucket/x", "..%2f..%2fetc%2fpasswd",
           "http://169.254.169.254/latest", "/etc/passwd", "file-../../x")  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_paths_and_urls_open_nothing_wherever_they_stand(serve, name):
    server = serve()
    TOUCHED.clear()
    turn = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": name}}]}
    picture = {"model": MODEL, "messages": [turn]}
    reference = {"type": "object", "properties": {"a": {"$ref": name}}}
    upload = {"files": {"file": (name, b"{}")}, "data": {"purpose": "batch"}}
    batch = {"input_file_id": name, "endpoint": "/v1/completions", "completion_window": "24h"}
    asked = [
        ("GET", f"/v1/files/{name}", {}),
        ("GET", f"/v1/files/{name}/content", {}),
        ("GET", f"/v1/batches/{name}", {}),
        ("GET", f"/v1/models/{name}", {}),
        ("GET", f"/{name}", {}),
        ("POST", "/v1/batches", {"json": batch}),
        ("POST", "/v1/files", upload),
        ("POST", "/v1/summarize", {"json": {"input_file_id": name, "task": {}}}),
        ("POST", "/v1/extract", {"json": {"documents": ["a"], "task": {"schema": reference}}}),
        ("POST", "/v1/extract", {"json": {"documents": ["a"], "task": {"schema": name}}}),
        ("POST", "/v1/generate", {"json": {"documents": ["a"], "task": {"template": name}}}),
        ("POST", "/v1/summarize", {"json": {"documents": ["a"], "task": name}}),
        ("POST", "/v1/chat/completions", {"json": picture}),
    ]
    for method, path, content in asked:
        response = call(server, method, path, **content)
        assert 400 <= response.status_code < 500, (method, path, response.status_code)
        assert "passwd" not in response.text.replace(name, "")
        assert "Traceback" not in response.text
    strange = [one for one in TOUCHED if "passwd" in one or "169.254" in one or "bucket" in one]
    assert strange == []


# rates ───────────────────────────────────────────────────────────────────────────────────────────

ALICE = Caller("alice", requests_per_minute=60, max_in_flight=2, max_batches=1)
BOB = Caller("bob", requests_per_minute=60, max_in_flight=2, max_batches=1)


def test_a_rate_is_refilled_steadily_and_says_when_to_come_back():
    now = [0.0]
    limits = Limits(10, clock=lambda: now[0])
    for _ in range(60):
        limits.count(ALICE)
    with pytest.raises(ApiError) as refused:
        limits.count(ALICE)
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    limits.count(BOB)
    now[0] += 1.0
    limits.count(ALICE)
    with pytest.raises(ApiError):
        limits.count(ALICE)


def test_places_are_bounded_for_each_and_for_all_and_come_back():
    limits = Limits(3)
    with limits.admitted(ALICE), limits.admitted(ALICE):
        with pytest.raises(ApiError, match="of this key"), limits.admitted(ALICE):
            pass
        with limits.admitted(BOB), pytest.raises(ApiError, match="The server has"):
            limits.admitted(BOB).__enter__()
        assert limits.num_in_flight == 2
    assert limits.num_in_flight == 0
    limits.admitted(ALICE).__enter__()


def test_a_full_server_answers_429_with_retry_after_and_too_many_batches_too(serve, tmp_path):
    server = serve(serve={"max_in_flight": 1})
    write_keys(tmp_path, max_batches=1)
    server.gateway.keys = load_keys(str(tmp_path / "keys.yaml"))
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    with server.gateway.limits.admitted(BOB):
        response = call(server, "POST", "/v1/completions", json=body)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert call(server, "POST", "/v1/completions", json=body).status_code == 200


# what is said and written ────────────────────────────────────────────────────────────────────────


def test_no_text_and_no_key_is_in_logs_metrics_or_errors(serve, caplog):
    server = serve()
    caplog.set_level(logging.DEBUG)
    turns = [{"role": "user", "content": CANARY}]
    said = [
        call(server, "POST", "/v1/chat/completions", json={"model": CANARY, "messages": turns}),
        call(server, "POST", "/v1/chat/completions", json={"model": MODEL, "messages": CANARY}),
        call(server, "POST", "/v1/chat/completions",
             json={"model": MODEL, "messages": turns, "temperature": CANARY}),
        call(server, "POST", "/v1/completions", json={"model": MODEL, "prompt": CANARY * 9000}),
        call(server, "POST", "/v1/summarize", json={"documents": [CANARY, {"text": [CANARY]}]}),
        call(server, "POST", "/v1/summarize",
             json={"documents": ["a"], "task": {"length": CANARY, "examples": [CANARY]}}),
        call(server, "GET", "/v1/models", f"gr-{CANARY}"),
        call(server, "GET", "/metrics"),
    ]  # fmt: skip
    for response in said:
        rows = response.json()["data"] if "data" in response.text[:40] else []
        shown = json.dumps([row["error_message"] for row in rows]) if rows else response.text
        assert CANARY not in shown
    own = [record.getMessage() for record in caplog.records if "httpx" not in record.name]
    assert any("caller=alice method=POST path=/v1/chat/completions" in line for line in own)
    assert not any(CANARY in line or KEY in line for line in own)


def test_a_bug_of_ours_shows_callers_neither_trace_nor_path(serve):
    class Broken:
        async def complete(self, *_, **__):
            raise KeyError("/srv/secret/path")

    server = serve(Broken())
    body = {"model": MODEL, "prompt": "a"}
    response = call(server, "POST", "/v1/completions", json=body)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The server failed. Try again."


def test_counts_are_in_the_form_that_prometheus_reads(serve):
    from prometheus_client.parser import text_string_to_metric_families

    server = serve()
    call(server, "POST", "/v1/summarize", json={"documents": ["a text", ""], "task": {}})
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(call(server, "GET", "/metrics").text)
        for sample in family.samples
    }
    route = (("method", "POST"), ("route", "/v1/summarize"), ("status", "200"))
    assert found["granite_ray_requests_total", route] == 1
    ways = {status: (("status", status), ("way", "interactive")) for status in ("ok", "failed")}
    assert found["granite_ray_documents_total", ways["ok"]] == 1
    assert found["granite_ray_documents_total", ways["failed"]] == 1


def test_a_server_file_may_be_a_jobs_file_and_its_task_is_served(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("source: {path: in}\ntask: {kind: summarize}\nsink: {path: out}\n")
    assert set(load_server_config(path).tasks) == {"default"}
    with pytest.raises(ConfigError, match=r"serve.tasks.a.labels"):
        parse_section(
            ServerConfig, {"serve": {"tasks": {"a": {"kind": "classify", "labels": ["x"]}}}}, path
        )


def test_the_page_loads_nothing_from_outside_and_has_a_policy(serve):
    response = call(serve(), "GET", "/")
    policy = response.headers["content-security-policy"]
    [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
    assert "default-src 'none'" in policy
    assert response.text.count(f'nonce="{nonce}"') == 2
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", response.text)


def test_keys_without_an_entry_are_open():
    assert Keys(()).is_open
