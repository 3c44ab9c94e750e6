"""Every route that there is, as one ASGI application behind the guard."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from granite_ray.serving.batch_runner import BatchRunner
from granite_ray.serving.batches import batch_routes, file_routes
from granite_ray.serving.completions import completion_routes, invalid
from granite_ray.serving.documents import document_routes
from granite_ray.serving.errors import ApiError, failed
from granite_ray.serving.gateway import Gateway
from granite_ray.serving.guard import OPEN_PATH, App, Guard
from granite_ray.serving.metrics import CONTENT_TYPE_LATEST
from granite_ray.serving.page_route import page_route

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": words,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, words in {
        400: "The request is wrong; the message names the field.",
        401: "No valid key.",
        404: "There is no such thing for this key.",
        408: "The body came too slowly.",
        409: "The key of an earlier request, with another body.",
        413: "The body is too large.",
        429: "Too much at once or too often: see Retry-After.",
        500: "The server failed.",
        503: "Nobody can answer now: see Retry-After.",
        504: "No answer in time.",
    }.items()
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def make_app(gateway: Gateway) -> App:
    """Return the application; while it lives it runs the batches."""
    app = FastAPI(
        title="granite_ray",
        lifespan=_lifespan(gateway),
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    for routes in (completion_routes, document_routes, file_routes, batch_routes):
        app.include_router(routes(gateway))
    app.include_router(page_route())
    _add_states(app, gateway)
    _add_errors(app)
    app.openapi = partial(_document, app, gateway.model.name)  # type: ignore[method-assign]  # FastAPI's own way
    return Guard(app, gateway.config.serve, gateway.keys, gateway.limits, gateway.metrics)


def _document(app: FastAPI, model: str) -> dict[str, Any]:
    """Return the OpenAPI document; refusals have one shape here, and it is not FastAPI's."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["security"] = [] if path == OPEN_PATH else [{"key": []}]
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = ERROR_SCHEMA
    for name in ("ChatRequest", "CompletionRequest"):
        schemas[name]["properties"]["model"]["enum"] = [model]
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _lifespan(gateway: Gateway) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(BatchRunner(gateway).run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return lifespan


def _add_states(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/healthz", tags=["states"])
    async def healthz() -> dict[str, str]:
        """Tell that the gateway lives; the only route without a key."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["states"])
    async def readyz() -> JSONResponse:
        """Tell whether a replica answers."""
        is_ready = await gateway.is_ready()
        words = {"status": "ready" if is_ready else "no replica answers"}
        return JSONResponse(words, 200 if is_ready else 503)

    @app.get("/metrics", tags=["states"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Give the counts in Prometheus' text form."""
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(Exception)
    async def refuse_bug(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse(failed().body, 500)

    @app.exception_handler(RequestValidationError)
    async def refuse_shape(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(invalid(error.errors()).body, 400)

    @app.exception_handler(HTTPException)
    async def refuse_route(_: Request, error: HTTPException) -> JSONResponse:
        words = {
            400: "The body cannot be read.",
            404: "There is no such route.",
            405: "The route does not take this method.",
        }
        refusal = ApiError(error.status_code, words.get(error.status_code, "Refused."))
        return JSONResponse(refusal.body, error.status_code, error.headers)
