"""The script of the CronJob against an API server: what it makes, joins and ends with."""

import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.deployments import DEPLOY

SCRIPT = DEPLOY / "overlays" / "nightly" / "night.py"
specification = importlib.util.spec_from_file_location("night", SCRIPT)
assert specification
assert specification.loader
night: Any = importlib.util.module_from_spec(specification)
specification.loader.exec_module(night)

PATH = "/apis/ray.io/v1/namespaces/granite/rayjobs"
TEMPLATE = {
    "metadata": {"name": "granite", "namespace": "granite", "uid": "u", "labels": {"a": "b"}},
    "spec": {"suspend": True, "entrypoint": "run --date {date}", "ttlSecondsAfterFinished": 600},
    "status": {"jobDeploymentStatus": "Suspended"},
}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


def failed(code: int, **more: str) -> dict[str, str]:
    message = f"Job entrypoint command failed with exit code {code}, last available logs: …"
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": message, **more}


@dataclass
class Server:
    """An API server that knows RayJobs: the statuses that each goes through, as scripted."""

    statuses: dict[str, list[dict[str, str]]]
    there: dict[str, Any] = field(default_factory=lambda: {"granite": TEMPLATE})
    made: list[dict[str, Any]] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    """Statuses that the next calls are answered with, before any other."""
    tokens: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if self.failures:
            return self.failures.pop(0), {}
        name = path.removeprefix(PATH).strip("/")
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.there:
                return 409, {}
            self.made.append(body)
            self.there[name] = body
            return 201, body
        if name not in self.there:
            return 404, {}
        steps = self.statuses.get(name, [])
        status = steps.pop(0) if len(steps) > 1 else (steps or [{}])[0]
        if status.get("gone"):
            return 404, {}
        return 200, {"status": status, **self.there[name]}


@contextmanager
def serving(server: Server) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.tokens.append(self.headers["Authorization"])
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            code, answer = server.answer(self.command, self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815 - the base class names it so

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:  # a closed server whose thread goes on would keep a core busy for ever
            listening.shutdown()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret\n")
    return path


def run(server: Server, token: Path, **settings: float) -> int:
    with serving(server) as address:
        settings = {"pause_s": 0.01, "silence_s": 5.0, **settings}
        kubernetes = night.Kubernetes(address, "granite", token, **settings)
        return int(night.run_night(kubernetes, "granite", "2026-11-21"))


def test_a_job_is_made_from_the_template_and_waited_for(token: Path) -> None:
    server = Server({"granite-2026-11-21": [{}, RUNNING, RUNNING, DONE]})
    assert run(server, token) == 0
    [made] = server.made
    assert made == {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": "granite-2026-11-21",
            "labels": {"a": "b", "granite-ray/date": "2026-11-21"},
        },
        "spec": {
            "suspend": False,
            "entrypoint": "run --date 2026-11-21",
            "ttlSecondsAfterFinished": 600,
        },
    }
    assert set(server.tokens) == {"Bearer secret"}


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6])
def test_a_final_exit_code_is_the_scripts_own_and_nothing_is_tried_again(
    token: Path, code: int
) -> None:
    server = Server({"granite-2026-11-21": [RUNNING, failed(code)]})
    assert run(server, token) == code
    assert len(server.made) == 1


def test_what_may_be_tried_again_is_and_then_what_comes_counts(token: Path) -> None:
    server = Server(
        {
            "granite-2026-11-21": [RUNNING, failed(75)],
            "granite-2026-11-21-2": [RUNNING, failed(3)],
        }
    )
    assert run(server, token) == 3
    assert [made["metadata"]["name"] for made in server.made] == list(server.statuses)


def test_attempts_are_bounded(token: Path) -> None:
    names = [f"granite-2026-11-21{end}" for end in ("", "-2", "-3")]
    server = Server({name: [failed(75)] for name in names})
    assert run(server, token) == 75
    assert [made["metadata"]["name"] for made in server.made] == names


def test_a_job_that_is_there_is_joined(token: Path) -> None:
    name = "granite-2026-11-21"
    there = {"granite": TEMPLATE, name: {"metadata": {"name": name}}}
    server = Server({name: [RUNNING, DONE]}, there)
    assert run(server, token) == 0
    assert server.made == []


def test_a_job_that_left_no_code_or_is_gone_is_tried_again(token: Path) -> None:
    lost = {"jobDeploymentStatus": "Failed", "jobStatus": "", "message": "the head pod is gone"}
    server = Server(
        {
            "granite-2026-11-21": [RUNNING, lost],
            "granite-2026-11-21-2": [RUNNING, {"gone": "yes"}],
            "granite-2026-11-21-3": [DONE],
        }
    )
    assert run(server, token) == 0
    assert len(server.made) == 3


def test_a_night_that_ran_out_of_time_is_left_to_the_next(token: Path) -> None:
    late = {"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded"}
    server = Server({"granite-2026-11-21": [late]})
    assert run(server, token) == 75
    assert len(server.made) == 1


def test_a_server_that_stumbles_is_asked_again(token: Path) -> None:
    server = Server({"granite-2026-11-21": [DONE]}, failures=[500, 429, 503])
    assert run(server, token) == 0


def test_a_missing_template_is_refused(token: Path) -> None:
    assert run(Server({}, there={}), token) == 2


def test_a_server_that_refuses_or_cannot_be_reached_ends_the_wait(token: Path) -> None:
    with pytest.raises(night.urllib.error.HTTPError, match="403"):
        run(Server({}, failures=[403]), token)
    gone = night.Kubernetes("http://127.0.0.1:9", "granite", token, pause_s=0.01, silence_s=0.2)
    with pytest.raises(TimeoutError, match="has not answered"):
        night.run_night(gone, "granite", "2026-11-21")


def test_names_fit_what_kubernetes_and_ray_allow() -> None:
    rayjob = night.make_rayjob(TEMPLATE, "2026-11-21", night.MAX_ATTEMPTS)
    assert len(rayjob["metadata"]["name"]) <= 47
