"""Whole jobs from a bucket to a bucket, on a server that speaks S3 and can be told to misbehave.

Ray runs in a cluster of its own, started with the usual AWS variables, as on a user's machine.
What came out is read with boto3 and pyarrow alone.
"""

import gzip
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import RAY, short_temporary_folder, stop_ray_processes
from tests.corpus import job_values, make_text
from tests.faults import driver, wait_until
from tests.invariants import check_ledger
from tests.unit.io.faulty_server import FaultyServer

pytestmark = pytest.mark.ray

LOOPBACK = "127.0.0.3"
"""Beside the cluster that the other tests share."""
NUM_DOCUMENTS = 60

RUNNER = """
import json, os, sys, ray
from granite_ray import GraniteRayError, RunOptions, run_job
from granite_ray.config import parse_config

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
for line in sys.stdin:
    job = json.loads(line)
    try:
        report = run_job(parse_config(job["config"]), RunOptions(**job["options"]))
        told = json.loads(report.to_json())
    except GraniteRayError as error:
        told = {"exit_code": error.exit_code, "error": str(error)}
    print(json.dumps(told), flush=True)
ray.shutdown()
"""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket with a corpus below `in/` and results below `out/`."""

    name: str
    client: Any

    @property
    def source(self) -> str:
        return f"s3://{self.name}/in"

    @property
    def sink(self) -> str:
        return f"s3://{self.name}/out"

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def keys(self, prefix: str) -> set[str]:
        listed = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix)
        return {entry["Key"] for entry in listed.get("Contents", ())}

    def put_parquet(self, seeds: Sequence[int], texts: dict[int, str] | None = None) -> None:
        """Put files of twenty documents each."""
        for start in range(0, len(seeds), 20):
            part = seeds[start : start + 20]
            values = {
                "id": [f"d{seed}" for seed in part],
                "text": [(texts or {}).get(seed, make_text(seed)) for seed in part],
            }
            file = io.BytesIO()
            pq.write_table(pa.table(values), file, row_group_size=10)
            self.put(f"in/part-{start:03d}.parquet", file.getvalue())

    def job(self, **sections: dict[str, Any]) -> dict[str, Any]:
        return job_values(self.source, self.sink, **sections)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows of a complete output by id, after a look whether all in it agrees."""
        snapshot = json.loads(self.get("out/_SUCCESS.json"))
        listed = {file["path"]: file for file in snapshot["files"]}
        assert {f"out/{path}" for path in listed} == self.keys("out/results/")
        assert not [key for key in self.keys("out/_granite/") if "probe" in key or "lease" in key]
        rows = []
        for path, file in listed.items():
            table = pq.read_table(io.BytesIO(self.get(f"out/{path}")))
            record = json.loads(table.schema.metadata[b"granite_ray"])
            statuses = Counter(table["status"].to_pylist())
            assert statuses["ok"] == record["num_ok"] == file["num_ok"]
            assert statuses["failed"] == record["num_failed"] == file["num_failed"]
            rows += table.to_pylist()
        report = json.loads(self.get("out/_granite/report.json"))
        check_ledger(report, len(rows))
        by_id = {row["document_id"]: row for row in rows}
        assert len(by_id) == len(rows), "a document has two rows"
        return by_id


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    server = FaultyServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def cluster(
    server: FaultyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """A Ray whose workers know the server; yields the environment of its drivers."""
    home = tmp_path_factory.mktemp("s3")
    environment = os.environ | {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    started = subprocess.run(
        [
            *(RAY, "start", "--head", "--port=0", f"--node-ip-address={LOOPBACK}"),
            *("--include-dashboard=false", "--num-cpus=6", "--disable-usage-stats"),
            f"--object-store-memory={100 * 1024**2}",
            f"--temp-dir={short_temporary_folder(home)}",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    address = re.search(rf"{re.escape(LOOPBACK)}:\d+", started.stdout)
    assert address, started.stdout
    yield environment | {"RAY_ADDRESS": address[0]}
    stop_ray_processes(home, address[0])


@pytest.fixture(scope="module")
def runner(cluster: dict[str, str]) -> Iterator["Runner"]:
    with Runner(cluster) as runner:
        yield runner


class Runner:
    """A process that has joined the cluster and runs one job after another."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, config: dict[str, Any], **options: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"config": config, "options": options}) + "\n")
        self._process.stdin.flush()

    def wait(self) -> dict[str, Any]:
        """Return the report of the run, or its exit code and error."""
        assert self._process.stdout
        told: dict[str, Any] = json.loads(self._process.stdout.readline())
        return told

    def run(self, config: dict[str, Any], **options: Any) -> dict[str, Any]:
        self.start(config, **options)
        return self.wait()


_numbers = itertools.count()


@pytest.fixture
def bucket(server: FaultyServer) -> Iterator[Bucket]:
    client = boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    bucket = Bucket(f"job-{next(_numbers)}", client)
    client.create_bucket(Bucket=bucket.name)
    yield bucket
    server.heal()
    client.close()


@pytest.fixture
def in_environment(monkeypatch: pytest.MonkeyPatch, cluster: dict[str, str]) -> str:
    """Processes that this one starts know the server; returns the cluster's address."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, cluster[name])
    monkeypatch.setenv("AWS_DEFAULT_REGION", cluster["AWS_DEFAULT_REGION"])
    return cluster["RAY_ADDRESS"]


def test_a_bucket_is_answered_once_and_afterwards_only_what_changes(
    bucket: Bucket, runner: Runner
) -> None:
    bucket.put_parquet(range(NUM_DOCUMENTS))
    first = runner.run(bucket.job())
    assert first["exit_code"] == 0
    assert first["storage_retries"] == 0
    before = bucket.rows()
    assert set(before) == {f"d{seed}" for seed in range(NUM_DOCUMENTS)}

    again = runner.run(bucket.job())
    assert (again["exit_code"], again["model_calls"]) == (0, 0)
    assert again["documents"]["already_committed"] == NUM_DOCUMENTS

    bucket.put_parquet(range(NUM_DOCUMENTS), {25: "changed", 31: "changed as well"})
    third = runner.run(bucket.job())
    after = bucket.rows()
    assert third["documents"]["generated"] == 2
    assert {name for name in after if after[name] != before[name]} == {"d25", "d31"}


@pytest.mark.slow
def test_refused_requests_are_repeated_and_counted(
    bucket: Bucket, runner: Runner, server: FaultyServer
) -> None:
    lines = [json.dumps({"id": f"d{seed}", "text": make_text(seed)}) for seed in range(30)]
    bucket.put("in/a.jsonl.gz", gzip.compress("\n".join(lines).encode()))
    server.target = f"PUT /{bucket.name}/out/results/"
    server.faults.extend(["slow_down"] * 3)
    report = runner.run(bucket.job(source={"format": "jsonl"}))
    assert report["exit_code"] == 0
    assert report["storage_retries"] == 3, "workers commit"
    assert len(bucket.rows()) == 30

    bucket.put("in/b.jsonl.gz", gzip.compress(b'{"id": "new", "text": "news"}\n'))
    server.target = f"GET /{bucket.name}/in/b.jsonl.gz"
    server.faults.extend(["slow_down", "cut"])
    report = runner.run(bucket.job(source={"format": "jsonl"}))
    assert report["exit_code"] == 0
    assert report["storage_retries"] == 2, "the driver plans"
    assert json.loads(bucket.get("out/_granite/report.json"))["storage_retries"] == 2
    assert set(bucket.rows()) == {"new", *(f"d{seed}" for seed in range(30))}


@pytest.mark.slow
def test_a_commit_whose_answer_was_lost_is_recognised(
    bucket: Bucket, runner: Runner, server: FaultyServer
) -> None:
    bucket.put_parquet(range(NUM_DOCUMENTS))
    server.target = f"PUT /{bucket.name}/out/results/"
    server.faults.extend(["lose_answer"] * 3)
    report = runner.run(bucket.job())
    assert report["exit_code"] == 0
    assert report["documents"]["generated"] == NUM_DOCUMENTS
    assert len(bucket.rows()) == NUM_DOCUMENTS


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_rows_of_an_undisturbed_one(
    bucket: Bucket, runner: Runner, in_environment: str, tmp_path: Path
) -> None:
    bucket.put_parquet(range(NUM_DOCUMENTS))
    slow = bucket.job(engine={"fake_tokens_per_s": 3000.0})
    with driver(tmp_path, {"config": slow}, in_environment) as killed:
        wait_until(lambda: bucket.keys("out/results/"), killed)
        killed.send(signal.SIGKILL)
        killed.wait()
    assert not bucket.keys("out/_SUCCESS.json")
    resumed = runner.run(bucket.job())
    assert resumed["exit_code"] == 0
    assert resumed["documents"]["already_committed"] > 0
    rows = bucket.rows()
    whole = job_values(bucket.source, f"s3://{bucket.name}/whole")
    assert runner.run(whole)["exit_code"] == 0
    undisturbed = [
        row
        for key in bucket.keys("whole/results/")
        for row in pq.read_table(io.BytesIO(bucket.get(key))).to_pylist()
    ]
    assert rows == {row["document_id"]: row for row in undisturbed}


@pytest.mark.slow
def test_of_two_runs_at_once_one_works_and_the_other_wrote_nothing(
    bucket: Bucket, runner: Runner, in_environment: str, tmp_path: Path
) -> None:
    bucket.put_parquet(range(NUM_DOCUMENTS))
    slow = bucket.job(engine={"fake_tokens_per_s": 1500.0})
    with driver(tmp_path, {"config": slow}, in_environment) as holder:
        wait_until(lambda: bucket.keys("out/_granite/lease.json"), holder)
        refused = runner.run(bucket.job())
        assert refused["exit_code"] == 6
        assert f"process {holder.pid}" in refused["error"]
        assert holder.wait() == 0, holder.output()
    assert len(bucket.rows()) == NUM_DOCUMENTS


@pytest.mark.parametrize(
    ("method", "named"), [("GET", "/in"), ("PUT", "/out")], ids=["source", "sink"]
)
def test_access_denied_at_the_start_is_refused_by_name(
    bucket: Bucket, runner: Runner, server: FaultyServer, method: str, named: str
) -> None:
    bucket.put_parquet(range(20))
    server.target, server.always = f"{method} /{bucket.name}", "denied"
    told = runner.run(bucket.job())
    assert told["exit_code"] == 2
    assert f"s3://{bucket.name}{named}" in told["error"]
    assert "credentials" in told["error"]
    server.heal()
    assert not bucket.keys("out/")


@pytest.mark.slow
def test_access_lost_in_the_middle_can_be_tried_again(
    bucket: Bucket, runner: Runner, server: FaultyServer
) -> None:
    bucket.put_parquet(range(NUM_DOCUMENTS))
    runner.start(bucket.job(engine={"fake_tokens_per_s": 3000.0}))
    wait_until(lambda: bucket.keys("out/results/"))
    server.target, server.always = f"PUT /{bucket.name}/out/results", "denied"
    told = runner.wait()
    assert told["exit_code"] == 75
    assert f"s3://{bucket.name}/out/results/" in told["error"]
    server.heal()
    resumed = runner.run(bucket.job())
    assert resumed["exit_code"] == 0
    assert resumed["documents"]["already_committed"] > 0
    assert len(bucket.rows()) == NUM_DOCUMENTS


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at the start", "in the middle"])
def test_a_server_that_refuses_for_ever_is_given_up(
    bucket: Bucket, runner: Runner, server: FaultyServer, when: str
) -> None:
    bucket.put_parquet(range(NUM_DOCUMENTS))
    if when == "at the start":
        server.always = "slow_down"
    runner.start(bucket.job(engine={"fake_tokens_per_s": 3000.0}))
    if when == "in the middle":
        wait_until(lambda: bucket.keys("out/results/"))
        server.always = "slow_down"
    told = runner.wait()
    assert told["exit_code"] == 75
    assert f"s3://{bucket.name}" in told["error"]
    server.heal()
    assert runner.run(bucket.job())["exit_code"] == 0
    assert len(bucket.rows()) == NUM_DOCUMENTS


@pytest.mark.slow
def test_answers_that_stall_are_waited_for_no_longer_than_stated(
    bucket: Bucket, runner: Runner, server: FaultyServer
) -> None:
    bucket.put_parquet(range(20))
    server.stall_s = 40.0
    server.target = f"GET /{bucket.name}/in/"
    server.faults.append("stall")
    report = runner.run(bucket.job())
    assert report["exit_code"] == 0
    assert report["storage_retries"] == 1
    assert len(bucket.rows()) == 20
