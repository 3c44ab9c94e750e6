"""An S3 server on loopback (moto's) that can be told to misbehave."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

REFUSALS = {
    "slow_down": ("503 Slow Down", "SlowDown"),
    "conflict": ("409 Conflict", "ConditionalRequestConflict"),
    "denied": ("403 Forbidden", "AccessDenied"),
}


class FaultyServer:
    """Serves S3; each of `faults` befalls one request, in order.

    `slow_down`, `conflict` and `denied` refuse it; `stall` waits before it is answered; `cut` sends
    half of the answer's body. `lose_answer` does what is asked, and answers 503; `hang` does it,
    and answers only when the client has gone.

    Only requests whose method and path, such as `PUT /bucket/file`, contain `target` are befallen.
    """

    def __init__(self) -> None:
        self.faults: deque[str] = deque()
        self.always: str | None = None
        self.target = ""
        self.stall_s = 3.0
        self.num_requests = 0
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        self.num_requests += 1
        fault = self._fault(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if fault in REFUSALS:
            return self._refuse(fault, environ, start_response)
        if fault == "stall":
            time.sleep(self.stall_s)
        if fault == "hang":
            list(self._moto(environ, lambda *_: None))
            environ["wsgi.input"].read(1)
        if fault == "lose_answer":
            list(self._moto(environ, lambda *_: None))
            environ["CONTENT_LENGTH"] = "0"
            return self._refuse("slow_down", environ, start_response)
        answer = self._moto(environ, start_response)
        if fault == "cut":
            body = b"".join(answer)
            return [body[: len(body) // 2]]
        return answer

    def _fault(self, request: str) -> str | None:
        if self.target not in request:
            return None
        try:
            return self.always or self.faults.popleft()
        except IndexError:
            return None

    def heal(self) -> None:
        """Misbehave no more."""
        self.faults.clear()
        self.always, self.target = None, ""

    def _refuse(
        self, fault: str, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> list[bytes]:
        status, code = REFUSALS[fault]
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml")])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
