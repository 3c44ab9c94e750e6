"""What stands before every route: key, rate, size, time, nesting; and the request log behind it.

An ASGI layer of our own, because a refusal must come before the body is read.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from granite_ray.config import ServeConfig
from granite_ray.config.serve import LOOPBACK_HOSTS
from granite_ray.serving.errors import ApiError, failed
from granite_ray.serving.keys import LOCAL_CALLER, Caller, Keys, key_of
from granite_ray.serving.limits import Limits
from granite_ray.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATH = "/healthz"
FILES_PATH = "/v1/files"
PAGE_HEADER = b"x-granite-page"
"""A browser sends Basic credentials by itself, also for forms of other sites; this header, it
sends for our page alone."""
MAX_DEPTH = 64
STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
"""Strings, each in one step and the last one even if it never ends, and brackets outside them."""
FILE_TIME_FACTOR = 10
MIB = 1024**2

logger = logging.getLogger(__name__)


class Guard:
    """Lets a request through to the app, or answers it. `scope["caller"]` says who asks."""

    def __init__(
        self, app: App, config: ServeConfig, keys: Keys, limits: Limits, metrics: Metrics
    ) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        response = _Response(send)
        started = time.monotonic()
        scope["caller"] = None
        try:
            await self._pass(scope, receive, response)
        except ApiError as error:
            await response.fail(error)
        except asyncio.CancelledError:
            response.status = response.status or 499
            raise
        except Exception:
            # The caller learns nothing of the inside; the log has it.
            logger.exception("request failed path=%s", _route(scope))
            await response.fail(failed())
        finally:
            self._note(scope, response, time.monotonic() - started)

    async def _pass(self, scope: Scope, receive: Receive, response: "_Response") -> None:
        if scope["path"] == OPEN_PATH:
            return await self._app(scope, _no_body, response)
        caller = self._caller(scope)
        scope["caller"] = caller
        self._limits.count(caller)
        is_upload = scope["path"].rstrip("/") == FILES_PATH and scope["method"] == "POST"
        if is_upload:
            return await self._app(scope, self._counted(receive), response)
        body = await self._read(receive)
        if body and scope["method"] in ("POST", "PUT", "PATCH"):
            check_json(body)
        return await self._app(scope, _replayed(body, receive), response)

    def _caller(self, scope: Scope) -> Caller:
        """Return who asks; raise 401 or 403, before anything of the body is read."""
        headers = dict(scope["headers"])
        if self._keys.is_open:
            _require_local(scope, headers.get(b"host", b""))
            return LOCAL_CALLER
        key, is_by_browser = key_of(headers.get(b"authorization", b""))
        caller = self._keys.find(key)
        if caller is None:
            raise ApiError(401, "Send a valid key: Authorization: Bearer KEY.", "invalid_api_key")
        if is_by_browser and scope["method"] not in ("GET", "HEAD") and PAGE_HEADER not in headers:
            raise ApiError(401, "Send the key as Authorization: Bearer KEY.", "invalid_api_key")
        return caller

    async def _read(self, receive: Receive) -> bytes:
        """Read the whole body, as far as its size and the time allow."""
        most = int(self._config.max_body_mib * MIB)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise asyncio.CancelledError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large("body", self._config.max_body_mib)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise _too_slow(self._config.body_timeout_s) from None

    def _counted(self, receive: Receive) -> Receive:
        """Count a file while the app reads it."""
        # What surrounds the file in the form is small.
        left = int(self._config.max_file_mib * MIB) + MIB
        seconds = FILE_TIME_FACTOR * self._config.body_timeout_s
        deadline = time.monotonic() + seconds

        async def counted() -> Message:
            nonlocal left
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise _too_slow(seconds) from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise _too_large("file", self._config.max_file_mib)
            return message

        return counted

    def _note(self, scope: Scope, response: "_Response", seconds: float) -> None:
        """Log and count a request: who, what and how long, and nothing of its text."""
        route, status = _route(scope), response.status or 500
        caller = scope["caller"]
        name = caller.name if caller else "-"
        self._metrics.note_request(route, scope["method"], status, seconds)
        logger.info(
            "request id=%s caller=%s method=%s path=%s status=%d ms=%d",
            response.request_id,
            name,
            scope["method"],
            route,
            status,
            round(1000 * seconds),
        )


class _Response:
    """What goes back: it knows whether it has begun, and names the request."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.request_id = secrets.token_hex(12)
        self.status: int | None = None
        self._is_complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self._is_complete = not message.get("more_body", False)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"request-id", self.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
                (b"cache-control", b"no-store"),
            ]
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Answer with an error, or end what has begun."""
        if self._is_complete:
            return
        if self.status is not None:
            await self({"type": "http.response.body", "body": b"", "more_body": False})
            return
        body = json.dumps(error.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        pairs = {**headers, **error.headers}.items()
        encoded = [(name.lower().encode(), value.encode()) for name, value in pairs]
        await self({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self({"type": "http.response.body", "body": body, "more_body": False})


def check_json(body: bytes) -> None:
    """Refuse JSON that is nested too deeply for anybody's good, without parsing it.

    Raises:
        ApiError: 400.
    """
    depth = 0
    for found in STRUCTURE.finditer(body):
        if found[0] in (b"[", b"{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise ApiError(
                    400, f"The body is nested deeper than {MAX_DEPTH} levels.", "too_deep"
                )
        elif found[0] in (b"]", b"}"):
            depth -= 1


def _require_local(scope: Scope, host: bytes) -> None:
    """Without keys only this machine is answered, and no page of another site through it."""
    client = (scope.get("client") or ("",))[0]
    name = host.decode("latin-1").rpartition(":")[0] or host.decode("latin-1")
    if not _is_loopback(client) or not _is_loopback(name.strip("[]")):
        raise ApiError(
            401, "This server has no keys and answers its own machine alone.", "invalid_api_key"
        )


def _is_loopback(name: str) -> bool:
    return name in LOOPBACK_HOSTS or name.startswith("127.")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the app the body that was read, then what comes after: a disconnect."""
    is_read = False

    async def replayed() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def _route(scope: Scope) -> str:
    """Return the route's pattern; what a caller made up is neither logged nor counted."""
    route = scope.get("route")
    return str(getattr(route, "path", None) or "-")


def _too_large(what: str, most_mib: float) -> ApiError:
    return ApiError(413, f"The {what} has more than {most_mib:g} MiB.", "too_large")


def _too_slow(seconds: float) -> ApiError:
    return ApiError(408, f"The body did not arrive in {seconds:g} s.", "body_timeout")
