"""Jobs on a real head, by our command and by Ray's own: exit codes, joining, stopping, resuming."""

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from tests.corpus import job_values, write_corpus, write_file
from tests.faults import result_files, wait_until
from tests.heads import RAY, SCRIPT, Head, ray_head
from tests.invariants import check_output, report_of, rows_of
from tests.unit.io.faulty_server import FaultyServer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 400.0


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    server = FaultyServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def head(server: FaultyServer) -> Iterator[Head]:
    known = {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with ray_head("127.0.0.30", **known) as started:
        yield started


def write_job(folder: Path, num_files: int = 2, /, **sections: dict[str, Any]) -> Path:
    """A job of 20 documents a file that can be answered, and 2 that cannot."""
    source = folder / "in"
    if not source.exists():
        write_corpus(source, num_files=num_files, rows_per_file=20)
        write_file(source / "zzz.parquet", [900, 901], [None, "  "])
    path = folder / "job.yaml"
    sections["job"] = {"scheduling_timeout_s": 300, **sections.get("job", {})}
    path.write_text(yaml.safe_dump(job_values(source, folder / "out", **sections)))
    return path


def id_of(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.slow
def test_a_followed_job_shows_its_log_and_ends_with_its_own_exit_code(
    head: Head, tmp_path: Path
) -> None:
    job = write_job(tmp_path)
    ended = head.submit(job, "--follow", "--logical-date", "2026-11-21")
    assert ended.returncode == 3, ended.stderr
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("submitted granite-")
    assert lines[0].endswith("-2026-11-21")
    assert "Done: every document has its row; some could not be answered." in lines
    assert "  Documents  42 in = 40 ok + 2 failed" in lines
    check_output(tmp_path / "out", 42)

    again = head.submit(job, "--follow", "--logical-date", "2026-11-21", "--allow-failed")
    assert again.returncode == 0, again.stderr
    assert again.stderr.splitlines()[0] == f"{lines[0]}.2"
    assert report_of(tmp_path / "out")["model_calls"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--set", "source.text_column=nothing"], 2, "Refused: "),
        (["--set", "job.max_failed_fraction=0.01"], 4, "Too many documents failed"),
        (["--set", "task.length=long"], 5, "Refused: "),
    ],
)
def test_each_way_to_end_comes_through(
    head: Head, tmp_path: Path, words: list[str], code: int, told: str
) -> None:
    job = write_job(tmp_path)
    if code == 5:
        assert head.submit(job, "--follow").returncode == 3
    ended = head.submit(job, "--follow", *words)
    assert ended.returncode == code, ended.stderr
    assert told in ended.stderr


@pytest.mark.slow
def test_a_job_is_joined_stopped_halfway_and_resumed(head: Head, tmp_path: Path) -> None:
    slow = write_job(tmp_path, 10, engine={"fake_tokens_per_s": 600})
    first = id_of(head.submit(slow))
    wait_until(lambda: result_files(tmp_path / "out"), timeout_s=PATIENCE_S)
    assert id_of(head.submit(slow)) == first, "it is on, and joined"
    with subprocess.Popen(
        [SCRIPT, "submit", str(slow), "--address", head.dashboard, "--follow"],
        env=dict(head.environment),
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        assert follower.stderr
        assert follower.stderr.readline() == f"joined {first}\n"
        stopped = head.submit(slow, "--stop")
        assert stopped.returncode == 0, stopped.stderr
        assert stopped.stderr.strip() == f"stopped {first}"
        told = follower.communicate(timeout=PATIENCE_S)[1]
        assert follower.returncode == 143, told
    assert "Stopped by SIGTERM. What is committed stays; run again to resume." in told
    assert report_of(tmp_path / "out")["exit_code"] == 143
    assert not (tmp_path / "out" / "_granite" / "lease.json").exists(), "it had time to let go"
    num_committed = len(result_files(tmp_path / "out"))
    assert 0 < num_committed < 21

    quick = write_job(tmp_path)
    resumed = head.submit(quick, "--follow")
    assert resumed.returncode == 3, resumed.stderr
    assert report_of(tmp_path / "out")["shards"]["reused"] == num_committed
    rows = check_output(tmp_path / "out", 202)
    undisturbed = tmp_path / "undisturbed"
    local = head.run(SCRIPT, "run", str(quick), "--set", f"sink.path={undisturbed}")
    assert local.returncode == 3, local.stderr
    assert rows == rows_of(undisturbed)
    nothing = head.submit(quick, "--stop")
    assert (nothing.returncode, "no job is on for" in nothing.stderr) == (0, True)


@pytest.mark.slow
def test_a_job_that_is_killed_can_be_tried_again(head: Head, tmp_path: Path) -> None:
    slow = write_job(tmp_path, engine={"fake_tokens_per_s": 100})
    import psutil

    with subprocess.Popen(
        [SCRIPT, "submit", str(slow), "--address", head.dashboard, "--follow"],
        env=dict(head.environment),
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        wait_until(lambda: result_files(tmp_path / "out"), timeout_s=PATIENCE_S)
        holder = yaml.safe_load((tmp_path / "out" / "_granite" / "lease.json").read_text())
        psutil.Process(holder["pid"]).kill()
        told = follower.communicate(timeout=PATIENCE_S)[1]
    assert follower.returncode == 75, told
    assert "was killed by signal 9" in told
    assert "submit it again to resume" in told


@pytest.mark.slow
def test_the_scripts_run_by_rays_own_command_as_well(head: Head, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    folder = tmp_path / "working"
    (folder / "pipelines").mkdir(parents=True)
    (folder / "job.yaml").write_text(job.read_text())
    script = REPOSITORY / "pipelines" / "summarize.py"
    (folder / "pipelines" / "summarize.py").write_text(script.read_text())
    ended = head.run(
        *(RAY, "job", "submit", "--address", head.dashboard, "--working-dir", str(folder), "--"),
        *("python", "pipelines/summarize.py", "--config", "job.yaml", "--allow-failed"),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = check_output(tmp_path / "out", 42)
    other = head.submit(job, "--follow", "--set", f"sink.path={tmp_path / 'ours'}")
    assert other.returncode == 3, other.stderr
    assert rows == rows_of(tmp_path / "ours")


@pytest.mark.slow
def test_the_quickstart_runs_on_a_cluster(head: Head, tmp_path: Path) -> None:
    quickstart = REPOSITORY / "configs" / "quickstart.yaml"
    ended = head.submit(
        quickstart,
        *("--follow", "--set", f"sink.path={tmp_path / 'out'}", "--set", "engine.backend=fake"),
    )
    assert ended.returncode == 0, ended.stderr
    check_output(tmp_path / "out", 1000)


def test_a_wrong_token_and_a_wrong_address_are_told_apart(head: Head, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    wrong = {**head.environment, "RAY_AUTH_TOKEN": "another-token-that-the-head-does-not-know"}
    refused = replace(head, environment=wrong).submit(job)
    assert refused.returncode == 2, refused.stderr
    assert "refuses the token" in refused.stderr
    nowhere = replace(head, dashboard="http://127.0.0.30:9").submit(job)
    assert nowhere.returncode == 75, nowhere.stderr
    assert "No Ray answers at --address http://127.0.0.30:9" in nowhere.stderr


@pytest.mark.slow
def test_from_bucket_to_bucket_with_credentials_that_the_cluster_alone_has(
    head: Head, server: FaultyServer, tmp_path: Path
) -> None:
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    s3 = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1", **keys)
    s3.create_bucket(Bucket="jobs")
    write_job(tmp_path)
    for path in (tmp_path / "in").iterdir():
        s3.put_object(Bucket="jobs", Key=f"in/2026-11-21/{path.name}", Body=path.read_bytes())
    job = tmp_path / "s3.yaml"
    values = job_values("s3://jobs/in/{date}", "s3://jobs/out/{date}")
    job.write_text(yaml.safe_dump(values))
    without = {k: v for k, v in head.environment.items() if not k.startswith("AWS_")}
    submitter = replace(head, environment=without)
    ended = submitter.submit(job, "--follow", "--logical-date", "2026-11-21")
    assert ended.returncode == 3, ended.stderr
    prefix = "out/2026-11-21/"
    data = s3.get_object(Bucket="jobs", Key=f"{prefix}_SUCCESS.json")["Body"].read()
    totals = json.loads(data)["totals"]
    assert (totals["num_ok"], totals["num_failed"]) == (40, 2)
    listed = {f"{prefix}{file['path']}" for file in json.loads(data)["files"]}
    found = s3.list_objects_v2(Bucket="jobs", Prefix=f"{prefix}results/")["Contents"]
    assert {entry["Key"] for entry in found} == listed
    for details in runtime_environments(head):
        assert not any("AWS" in name for name in details)
    s3.close()


def runtime_environments(head: Head) -> list[dict[str, str]]:
    """The variables of every job, as the dashboard shows them to whoever may look."""
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    request = urllib.request.Request(
        f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        jobs = json.load(answer)
    found = [(job["runtime_env"] or {}).get("env_vars", {}) for job in jobs]
    assert any("RAY_JOB_STOP_WAIT_TIME_S" in variables for variables in found)
    return found


CANARY = "canary-of-a-document"


def scrape(head: Head) -> dict[str, float]:
    """What the node exports of ours, by name and labels that matter here."""
    with urllib.request.urlopen(f"{head.metrics}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(ray_granite_\w+)\{(.*)\} (\S+)$", text, re.M):
        marks = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        assert marks["task"] == "summarize"
        assert marks["checkpoint"] == "quickstart"
        own = [marks[key] for key in ("status", "kind", "error_type", "cause") if key in marks]
        found["/".join([name, *own])] = float(value)
    return found


@pytest.mark.slow
def test_metrics_and_log_lines_tell_of_a_job_and_of_no_document(tmp_path: Path) -> None:
    job = write_job(tmp_path, engine={"fake_tokens_per_s": 400}, job={"log_format": "json"})
    write_file(tmp_path / "in" / "zzy.parquet", [800, 801], [f"{CANARY} one", f"{CANARY} two"])
    with ray_head("127.0.0.33") as head:
        began = time.time()
        ended = head.submit(job, "--follow")
        assert ended.returncode == 3, ended.stderr
        wait_until(
            lambda: "ray_granite_last_success_timestamp_seconds" in scrape(head),
            timeout_s=PATIENCE_S,
        )
        found = scrape(head)
        workers = Path(head.folder, "session_latest", "logs").glob("worker-*")
        logged = "".join(path.read_text() for path in workers) + ended.stderr
    assert found["ray_granite_documents_total/ok"] == 42
    assert found["ray_granite_documents_total/failed"] == 2
    assert found["ray_granite_failures_total/null_text"] == 1
    assert found["ray_granite_failures_total/empty_text"] == 1
    report = report_of(tmp_path / "out")
    for kind in ("prompt", "completion"):
        assert found[f"ray_granite_tokens_total/{kind}"] == report["tokens"][kind]
    assert found["ray_granite_commits_total"] == report["shards"]["committed"]
    assert found["ray_granite_progress_ratio"] == 1
    assert 0 <= found["ray_granite_busy_ratio"] <= 1
    assert began < found["ray_granite_last_success_timestamp_seconds"] < time.time()
    check_lines(logged, report["run_id"], report["shards"]["committed"])


def check_lines(logged: str, run_id: str, num_shards: int) -> None:
    """Every shard's way is told, by driver and replica, and no text of a document."""
    assert CANARY not in logged
    lines = [json.loads(line) for line in logged.splitlines() if line.startswith('{"time"')]
    assert {line["job"] for line in lines} == {run_id}
    for message in ("shard begins", "shard answered", "shard committed"):
        told = [line for line in lines if line["message"] == message]
        assert len({line["shard"] for line in told}) == len(told) == num_shards, message
        if message != "shard committed":
            assert {line["attempt"] for line in told} == {1}
    [last] = [line for line in lines if line["message"] == "run ended"]
    assert (last["exit_code"], last["counts"]["failed"]) == (3, 2)
