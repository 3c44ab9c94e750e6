"""Make a RayJob for one date out of a suspended template, wait for it, and end with its exit code.

    python night.py TEMPLATE [YYYY-MM-DD]

Runs in the cluster with the account granite-night, on Python's own library alone. The RayJob is
named by the template and the date, so that a second one for the same date joins the first. Where
it ends with 75 (try again) another attempt is made, three in all: what is committed is not done
again. Every other code is final, and the script's own.
"""

import http.client
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TRY_AGAIN = 75
MAX_ATTEMPTS = 3
SILENCE_S = 600.0
EXIT_CODE = re.compile(r"failed with exit code (\d+)")
Json = dict[str, Any]


@dataclass(frozen=True)
class Kubernetes:
    """RayJobs of one namespace, through the API server."""

    server: str
    namespace: str
    token_path: Path
    context: ssl.SSLContext | None = None
    pause_s: float = 5.0
    silence_s: float = SILENCE_S
    timeout_s: float = field(default=30.0)

    def get(self, name: str) -> Json | None:
        """Return a RayJob, None where there is none."""
        try:
            return self._call("GET", f"/{name}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def create(self, rayjob: Json) -> bool:
        """Make a RayJob; return False where one of its name is there already."""
        try:
            self._call("POST", "", rayjob)
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def _call(self, method: str, path: str, body: Json | None = None) -> Json:
        """Call the API; a server that does not answer for `silence_s` is an error."""
        deadline = time.monotonic() + self.silence_s
        while True:
            try:
                return self._call_once(method, path, body)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500 and error.code != 429:
                    raise
                problem: Exception = error
            except (OSError, http.client.HTTPException) as error:
                problem = error
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.server} has not answered: {problem}") from problem
            time.sleep(self.pause_s)

    def _call_once(self, method: str, path: str, body: Json | None) -> Json:
        where = f"{self.server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{path}"
        request = urllib.request.Request(
            where,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                # Read each time: Kubernetes renews it.
                "Authorization": f"Bearer {self.token_path.read_text().strip()}",
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(
            request, timeout=self.timeout_s, context=self.context
        ) as answer:
            found: Json = json.load(answer)
        return found


def run_night(kubernetes: Kubernetes, template_name: str, day: str) -> int:
    """Run the job of a date, as often as it may be tried; return its exit code."""
    template = kubernetes.get(template_name)
    if template is None:
        say(f"There is no RayJob {template_name} in {kubernetes.namespace}. Apply the overlay.")
        return 2
    code = TRY_AGAIN
    for number in range(1, MAX_ATTEMPTS + 1):
        rayjob = make_rayjob(template, day, number)
        name = rayjob["metadata"]["name"]
        say(f"{'made' if kubernetes.create(rayjob) else 'joined'} {name}")
        status = wait(kubernetes, name)
        code = exit_code_of(status)
        say(f"{name} ended with {code}")
        if code != TRY_AGAIN or status.get("reason") == "DeadlineExceeded":
            return code
    return code


def make_rayjob(template: Json, day: str, number: int) -> Json:
    """Return the RayJob of one attempt at a date."""
    name = f"{template['metadata']['name']}-{day}" + (f"-{number}" if number > 1 else "")
    spec = {**template["spec"], "suspend": False}
    spec["entrypoint"] = spec["entrypoint"].replace("{date}", day)
    labels = {**template["metadata"].get("labels", {}), "granite-ray/date": day}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def wait(kubernetes: Kubernetes, name: str) -> Json:
    """Return the status of a RayJob that has ended; one that is gone has an empty status."""
    while True:
        rayjob = kubernetes.get(name)
        if rayjob is None:
            say(f"{name} is gone before it was seen to end.")
            return {}
        status: Json = rayjob.get("status", {})
        if status.get("jobDeploymentStatus") in ("Complete", "Failed"):
            return status
        time.sleep(kubernetes.pause_s)


def exit_code_of(status: Json) -> int:
    """Return the run's own exit code, which Ray tells in its message; 75 where it left none."""
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    found = EXIT_CODE.search(status.get("message") or "")
    return int(found[1]) if found else TRY_AGAIN


def say(line: str) -> None:
    """Write one line to the pod's log."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> int:
    """Run the night of today (UTC), or of the date that is given."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    kubernetes = Kubernetes(
        server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        namespace=(ACCOUNT / "namespace").read_text().strip(),
        token_path=ACCOUNT / "token",
        context=ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")),
    )
    day = sys.argv[2] if len(sys.argv) > 2 else datetime.now(UTC).date().isoformat()
    try:
        return run_night(kubernetes, sys.argv[1], day)
    except (OSError, urllib.error.HTTPError) as error:
        say(f"The Kubernetes API refuses or does not answer: {error}")
        return TRY_AGAIN


if __name__ == "__main__":
    sys.exit(main())
