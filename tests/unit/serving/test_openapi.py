"""The OpenAPI document, and schemathesis over it: whatever is sent, the answer is as documented."""

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.unit.serving.conftest import KEY

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


def test_the_document_names_every_route_and_is_behind_the_key(serve) -> None:
    document = document_of(serve())
    assert {path for path in document["paths"] if path.startswith("/v1/")} >= {
        "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/files", "/v1/batches",
        "/v1/summarize", "/v1/classify", "/v1/extract", "/v1/generate",
    }  # fmt: skip
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert operation["responses"]["400"]


def document_of(server) -> dict[str, Any]:
    async def run() -> Any:
        async with server.http() as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(run())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_whatever_is_sent_the_answer_is_as_documented(serve) -> None:
    server = serve(serve={"max_tokens": 64})
    headers = {"Authorization": f"Bearer {KEY}", "Host": "127.0.0.1"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app, headers=headers)
    num_cases = 0

    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def check(case: Any) -> None:
            nonlocal num_cases
            num_cases += 1
            response = case.call(headers=headers)
            case.validate_response(response, checks=CHECKS)

        check()
    assert num_cases > 800
