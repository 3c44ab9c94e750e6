"""Asking a running server, for `granite-ray ask` and for scripts: files in, rows out."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2

from granite_ray.errors import ConfigError, InfrastructureError

TIMEOUT_S = 600.0
MAX_TRIES = 6
POLL_S = 1.0
TRANSIENT = (429, 500, 502, 503, 504)
ENDED = ("completed", "failed", "expired", "cancelled")


class Client:
    """One server, asked with one key.

    Args:
        url: Where it answers, such as `http://127.0.0.1:8000`.
        key: The API key; None where the server has none.
        transport: Stands in for the network.
    """

    def __init__(
        self, url: str, key: str | None = None, transport: httpx2.BaseTransport | None = None
    ) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._url = url
        self._http = httpx2.Client(
            base_url=url, headers=headers, timeout=TIMEOUT_S, transport=transport, trust_env=False
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def tasks(self) -> dict[str, str]:
        """Return the kind of each task that the server knows by name."""
        found = self._call("GET", "/v1/tasks").json()["data"]
        return {one["id"]: one["kind"] for one in found}

    def ask(self, kind: str, body: Mapping[str, Any]) -> httpx2.Response:
        """Ask about documents; the response is rows, or a batch with status 202."""
        return self._call("POST", f"/v1/{kind}", json=body)

    def upload(self, path: Path) -> str:
        """Upload a file and return its id."""
        with path.open("rb") as file:
            form = {"files": {"file": (path.name, file)}, "data": {"purpose": "batch"}}
            return str(self._call("POST", "/v1/files", **form).json()["id"])

    def wait(self, batch: Mapping[str, Any], on_progress: Callable[[int, int], None]) -> bytes:
        """Wait for a batch and return its output; `on_progress` hears what is done, and of what.

        Raises:
            ConfigError: The batch has failed.
        """
        while batch["status"] not in ENDED:
            time.sleep(POLL_S)
            batch = self._call("GET", f"/v1/batches/{batch['id']}").json()
            counts = batch["request_counts"]
            on_progress(counts["completed"] + counts["failed"], counts["total"])
        if batch["status"] != "completed":
            problems = [problem["message"] for problem in (batch["errors"] or {"data": []})["data"]]
            raise ConfigError(f"The batch has {batch['status']}. {' '.join(problems)}".strip())
        return self._call("GET", f"/v1/files/{batch['output_file_id']}/content").content

    def _call(self, method: str, path: str, **content: Any) -> httpx2.Response:
        """Send a request; wait and send it again where the server says that it may do later."""
        for number in range(1, MAX_TRIES + 1):
            try:
                response = self._http.request(method, path, **content)
            except httpx2.TransportError as error:
                raise InfrastructureError(
                    f"{self._url} does not answer: {error}. Start granite-ray serve, or correct "
                    "--url."
                ) from error
            if response.status_code not in TRANSIENT or number == MAX_TRIES:
                break
            time.sleep(min(30.0, float(response.headers.get("retry-after", number))))
        if response.is_success:
            return response
        words = f"{self._url}{path} answered {response.status_code}: {_message(response)}"
        raise (
            InfrastructureError(words) if response.status_code in TRANSIENT else ConfigError(words)
        )


def _message(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase
