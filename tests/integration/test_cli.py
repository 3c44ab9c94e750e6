"""The command as a user sees it: in a terminal and in a log, with its exit codes."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml

from granite_ray.cli import main
from granite_ray.io.lease import Lease
from granite_ray.io.storage import open_storage
from tests.corpus import job_values, write_corpus, write_file
from tests.invariants import check_output, report_of, rows_of

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(Path(sys.executable).parent / "granite-ray")
COLUMNS, LINES = 80, 24
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A config of 42 documents, two of which cannot be answered."""
    source = write_corpus(tmp_path / "in", num_files=2, rows_per_file=20)
    write_file(source / "zzz.parquet", [900, 901], [None, "  "])
    return write_job(tmp_path, source)


def write_job(tmp_path: Path, source: Path, /, **sections: dict[str, Any]) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_values(source, tmp_path / "out", **sections)))
    return path


class Terminal:
    """A command in a real terminal of 80 columns."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        self._process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment | {"TERM": "xterm-256color"},
            start_new_session=True,
            # So that Ctrl-C is a signal, as in a person's shell.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self.written = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, words: str, timeout_s: float = 90.0) -> None:
        """Read until `words` stand in what was written."""
        deadline = time.monotonic() + timeout_s
        while words not in self.written:
            assert time.monotonic() < deadline, self.written
            ended = self._process.poll() is not None
            self._read()
            assert words in self.written or not ended, self.written
            time.sleep(0.05)

    def wait(self, timeout_s: float = 90.0) -> int:
        """Read until the command has ended; return its exit code."""
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self.written
            self._read()
            time.sleep(0.05)
        self._read()
        return self._process.returncode

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 65536):
                self.written += data.decode()
        except (BlockingIOError, OSError):  # nothing more, or the other end is closed
            return

    def after_the_live_view(self) -> list[str]:
        """The lines that stay when the live view is gone."""
        assert self.written.rindex(SHOW_CURSOR) > self.written.rindex(HIDE_CURSOR)
        kept = self.written[self.written.rindex(SHOW_CURSOR) :]
        return ESCAPE.sub("", kept).replace("\r", "").splitlines()


def test_a_terminal_shows_the_run_live_and_then_its_summary(
    job: Path, tmp_path: Path, ray_address: str
) -> None:
    command = [SCRIPT, "run", str(job), "--set", "engine.fake_tokens_per_s=1500"]
    with Terminal(command, os.environ | {"RAY_ADDRESS": ray_address}) as terminal:
        assert terminal.wait() == 3
        frames = [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", terminal.written)]
        for shown in (
            r"^. starting Ray and the replicas$",
            r"^. answering$",
            r"^━+ *\d+ of 42 documents$",
            r"^\d+\.\d documents/s, [012] failed, \d of 5 shards committed, \d+ s left$",
        ):
            assert any(re.match(shown, frame) for frame in frames), (shown, frames)
        live = ESCAPE.sub("", terminal.written[: terminal.written.rindex(SHOW_CURSOR)])
        assert max(map(len, re.split(r"[\r\n]+", live))) <= COLUMNS
        lines = terminal.after_the_live_view()
    sink = tmp_path / "out"
    assert "Done: every document has its row; some could not be answered." in lines
    assert "  Documents  42 in = 40 ok + 2 failed" in lines
    assert "  Failed     1 null_text" in lines
    assert "  Failed     1 empty_text" in lines
    assert any(re.match(r" +42 answered now \(\S+ a second\), 0 reused", n) for n in lines)
    assert all(line == line.rstrip() for line in lines), lines
    check_output(sink, 42)
    check_ways_to_read(lines, sink)


def check_ways_to_read(lines: list[str], sink: Path) -> None:
    """What the summary tells to copy does what it says."""
    [python] = [line.split(maxsplit=1)[1] for line in lines if line.startswith("  python")]
    [query] = [line.split(maxsplit=1)[1] for line in lines if line.startswith("  duckdb")]
    assert python == f'granite_ray.read_results("{sink}").to_pandas()'
    assert len(duckdb.sql(query).fetchall()) == len(rows_of(sink))


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_stops_the_run_and_says_how_to_go_on(
    job: Path, tmp_path: Path, ray_address: str
) -> None:
    command = [SCRIPT, "run", str(job), "--set", "engine.fake_tokens_per_s=400"]
    with Terminal(command, os.environ | {"RAY_ADDRESS": ray_address}) as terminal:
        terminal.wait_for("answering")
        terminal.press("\x03")
        assert terminal.wait() == 128 + signal.SIGINT
        lines = terminal.after_the_live_view()
        assert "stopping: waiting for the shards in flight" in terminal.written
        assert "Traceback" not in terminal.written
    words = " ".join(lines)
    assert "Interrupted: Stopped by SIGINT. What is committed stays; run again to resume." in words
    assert report_of(tmp_path / "out")["exit_code"] == 130
    assert not (tmp_path / "out" / "_granite" / "lease.json").exists()


@pytest.mark.slow
def test_a_log_gets_plain_lines(job: Path, tmp_path: Path, ray_address: str) -> None:
    ended = subprocess.run(
        [SCRIPT, "run", str(job), "--allow-failed"],
        env=os.environ | {"RAY_ADDRESS": ray_address},
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "", "standard output is free for data"
    assert "\x1b" not in ended.stderr
    lines = ended.stderr.splitlines()
    counts = re.compile(r"\d+ of 42 documents, \d+\.\d documents/s, \d failed, ")
    said = [line for line in lines if not counts.match(line)]  # they come every ten seconds
    assert said[:3] == ["planning", "starting Ray and the replicas", "answering"]
    assert said[3].startswith("Done: every document has its row")
    assert all(line == line.rstrip() for line in lines)
    check_ways_to_read(lines, tmp_path / "out")


@pytest.mark.usefixtures("joined_ray")
@pytest.mark.slow
def test_each_way_a_run_can_end_has_its_exit_code(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(job)]
    sink = tmp_path / "out"
    assert main([*run, "--limit", "5"]) == 0
    assert "5 in = 5 ok + 0 failed" in capsys.readouterr().err
    assert main(run) == 3
    assert "some could not be answered" in capsys.readouterr().err
    check_output(sink, 42)
    assert main(run) == 3, "the same again"
    assert "42 there already" in capsys.readouterr().err
    assert main([*run, "--allow-failed"]) == 0
    long = [*run, "--set", "task.length=long"]
    assert main(long) == 5
    assert "Refused: " in capsys.readouterr().err
    assert main(["redrive", str(sink)]) == 3
    assert "2 answered now" in capsys.readouterr().err
    check_output(sink, 42)
    assert main([*long, "--restart", "--allow-failed"]) == 0
    assert report_of(sink)["documents"]["generated"] == 42
    check_output(sink, 42)

    assert main([*long, "--set", "job.max_failed_fraction=0.01"]) == 4
    assert "Too many documents failed" in capsys.readouterr().err

    other = Lease(open_storage(str(sink)), "another", lease_s=1.0)
    other.acquire()
    try:
        assert main(long) == 6
        told = capsys.readouterr().err
        assert "Busy: " in told
        assert f"process {os.getpid()}" in told
    finally:
        other.release()


@pytest.mark.usefixtures("joined_ray")
def test_status_tells_how_far_a_job_is(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = str(tmp_path / "out")
    main(["run", str(job)])
    capsys.readouterr()
    assert main(["status", sink]) == 0
    told = capsys.readouterr().out.splitlines()
    run_id = report_of(tmp_path / "out")["run_id"]
    assert told[0] == f"run {run_id}: done, 42 of 42 documents committed, 2 failed"
    assert told[1] == f"last run {run_id} ended with exit code 3"
    assert sorted(told[2:]) == ["  failed     1 empty_text", "  failed     1 null_text"]
    assert main(["status", sink, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["report"]["documents"]["failed"] == 2
    assert values["progress"]["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["summarize", "classify", "extract"])
def test_each_pipeline_runs_a_job_of_its_kind(kind: str, tmp_path: Path, ray_address: str) -> None:
    task = {
        "summarize": {},
        "classify": {"labels": ["a", "b"]},
        "extract": {"schema": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    }
    values = {"kind": kind, "max_tokens": 40, **task[kind]}
    source = write_corpus(tmp_path / "in", num_files=1)
    config = write_job(tmp_path, source, task=values)
    ended = subprocess.run(
        [sys.executable, f"pipelines/{kind}.py", "--config", str(config), "--limit", "12"],
        cwd=REPOSITORY,
        env=os.environ | {"RAY_ADDRESS": ray_address},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stderr
    assert "12 in = 12 ok + 0 failed" in ended.stderr


@pytest.mark.slow
def test_a_run_without_a_cluster_starts_and_stops_its_own(job: Path, tmp_path: Path) -> None:
    with Terminal([SCRIPT, "run", str(job)], dict(os.environ)) as terminal:
        assert terminal.wait() == 3
        lines = terminal.after_the_live_view()
    assert lines[0] == "Done: every document has its row; some could not be answered.", lines
    check_output(tmp_path / "out", 42)


@pytest.mark.slow
def test_a_cluster_that_cannot_be_reached_can_be_tried_again(job: Path) -> None:
    ended = subprocess.run(
        [SCRIPT, "run", str(job), "--set", "job.ray_address=127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert ended.returncode == 75, ended.stderr
    assert "Try again: Ray at job.ray_address 127.0.0.1:9 cannot be reached" in ended.stderr
