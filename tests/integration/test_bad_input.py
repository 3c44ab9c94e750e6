"""Bad input: a clear error that names what is wrong, the right exit code, and nothing lost.

What is refused is refused before Ray starts, so most of these need none.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import granite_ray
from granite_ray import GraniteRayError, run_job
from tests.corpus import job_values, make_config, write_corpus, write_file
from tests.invariants import check_output, report_of

SCRIPT = str(Path(sys.executable).parent / "granite-ray")
CHECKPOINT = Path(granite_ray.__file__).parent / "quickstart" / "checkpoint"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "in", num_files=2, rows_per_file=10)


def refusal(
    source: Path, sink: Path | str, exit_code: int = 2, /, **sections: dict[str, Any]
) -> str:
    """Run what must be refused before Ray or the output is touched; return the message."""
    had_ray = ray.is_initialized()
    with pytest.raises(GraniteRayError) as refused:
        run_job(make_config(source, sink, **sections))
    assert refused.value.exit_code == exit_code, refused.value
    assert ray.is_initialized() == had_ray
    assert not Path(sink, "results").exists()
    return str(refused.value)


# the source ──────────────────────────────────────────────────────────────────────────────────────


def test_a_source_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("not a corpus")
    for name in ("empty", "missing"):
        told = refusal(tmp_path / name, tmp_path / "out")
        assert str(tmp_path / name) in told
        assert ".parquet" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"text_column": "body"}, "source.text_column: part-000.parquet has no column 'body'"),
        ({"id_column": "key"}, "source.id_column: part-000.parquet has no column 'key'"),
        ({"keep_columns": ["title"]}, "source.keep_columns: part-000.parquet has no column"),
        ({"filter": [["title", "==", "a"]]}, "source.filter: part-000.parquet has no column"),
        ({"text_column": "year"}, "column 'year' of part-000.parquet is int64. It must be a str"),
        (
            {"filter": [["year", ">", "new"]]},
            "source.filter compares column 'year', which is int64",
        ),
    ],
)
def test_a_missing_or_unsuitable_column_is_named_with_its_file(
    tmp_path: Path, source: Path, section: dict[str, Any], told: str
) -> None:
    assert told in refusal(source, tmp_path / "out", source=section)
    assert not (tmp_path / "out").exists()


def test_a_column_that_only_the_template_reads_is_named(tmp_path: Path, source: Path) -> None:
    task = {"kind": "generate", "template": "{{ title }}: {{ text }}"}
    told = refusal(source, tmp_path / "out", task=task)
    assert "task.template" in told
    assert "part-000.parquet has no column 'title'. It has: id, text, year" in told


def test_an_id_that_occurs_twice_is_refused_with_both_places(tmp_path: Path, source: Path) -> None:
    write_file(source / "part-009.parquet", [90, 13, 91])
    told = refusal(source, tmp_path / "out", source={"on_duplicate": "error"})
    assert "part-001.parquet#3" in told
    assert "part-009.parquet#1" in told


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    """Keep the footer, which a plan reads, and spoil the pages, which only a read sees."""
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [cut, empty])
def test_an_unreadable_file_stops_the_job_by_name(
    tmp_path: Path, source: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(source / "part-001.parquet")
    told = refusal(source, tmp_path / "out", 4)
    assert "Input file part-001.parquet cannot be read" in told
    assert "source.on_bad_file" in told


@pytest.mark.ray
@pytest.mark.usefixtures("joined_ray")
def test_an_unreadable_page_stops_the_job_and_keeps_what_is_committed(
    tmp_path: Path, source: Path
) -> None:
    scramble(source / "part-001.parquet")
    with pytest.raises(GraniteRayError, match=r"part-001\.parquet cannot be read") as stop:
        run_job(make_config(source, tmp_path / "out"))
    assert stop.value.exit_code == 4
    report = report_of(tmp_path / "out")
    assert report["exit_code"] == 4
    assert "part-001.parquet" in report["error"]
    write_corpus(source, num_files=2, rows_per_file=10)
    assert run_job(make_config(source, tmp_path / "out")).exit_code == 0
    check_output(tmp_path / "out", 20)


@pytest.mark.ray
@pytest.mark.usefixtures("joined_ray")
def test_unreadable_files_can_be_skipped_and_are_listed(tmp_path: Path, source: Path) -> None:
    for index, spoil in enumerate((cut, empty, scramble)):
        path = source / f"part-90{index}.parquet"
        write_file(path, range(900, 910))
        spoil(path)
    report = run_job(make_config(source, tmp_path / "out", source={"on_bad_file": "skip"}))
    assert report.exit_code == 0
    names = {"part-900.parquet", "part-901.parquet", "part-902.parquet"}
    assert set(report_of(tmp_path / "out")["bad_files"]) == names
    rows = check_output(tmp_path / "out", 20)
    assert {row["source_file"] for row in rows} == {"part-000.parquet", "part-001.parquet"}


# task and model ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (
            {"properties": {"a": {"if": {}}}},
            "at /properties/a/if: the keyword 'if' is not supported",
        ),
        ({"properties": {"a": {"pattern": "(?=x)y"}}}, "look-ahead"),
        ({"properties": {"a": {"$ref": "https://example.org/a.json"}}}, "https://example.org"),
        ({"properties": {"a": {"type": "strnig"}}}, "strnig"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_refused_by_place(
    tmp_path: Path, source: Path, schema: dict[str, Any], told: str
) -> None:
    schema = {"type": "object"} | schema
    message = refusal(source, tmp_path / "out", task={"kind": "extract", "schema": schema})
    assert message.startswith("task.schema")
    assert told in message


def test_a_checkpoint_without_safetensors_is_refused(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "model.safetensors").unlink()
    sections = {"model": {"path": str(folder)}, "engine": {"backend": "transformers"}}
    told = refusal(source, tmp_path / "out", **sections)
    assert f"model.path '{folder}'" in told
    assert "safetensors" in told
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert "only pytorch_model.bin" in refusal(source, tmp_path / "out", **sections)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(source, tmp_path / "out", **sections)
    told = refusal(source, tmp_path / "out", model={"path": str(tmp_path / "nowhere")})
    assert "is not a folder" in told


# the sink ────────────────────────────────────────────────────────────────────────────────────────


def test_a_sink_that_cannot_be_a_folder_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere/out")):
        told = refusal(source, path)
        assert f"sink.path {path} cannot be written" in told
    assert (tmp_path / "file").read_text() == "in the way"


def run_without_privileges(tmp_path: Path, source: Path, sink: Path) -> tuple[int, str]:
    """Run the command as one who must keep to file permissions, as root need not."""
    config = tmp_path / "job.json"
    config.write_text(json.dumps(job_values(source, sink)))
    command = [SCRIPT, "run", str(config)]
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root needs setpriv to give its privileges up")
        command = [setpriv, "--bounding-set=-dac_override,-dac_read_search", *command]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    return ended.returncode, ended.stderr


def test_a_sink_that_may_not_be_written_is_refused(tmp_path: Path, source: Path) -> None:
    sink = tmp_path / "out"
    sink.mkdir(mode=0o555)
    code, told = run_without_privileges(tmp_path, source, sink)
    assert code == 2, told
    assert f"Refused: sink.path {sink} cannot be written" in told
    assert "Permission denied. Give this user the right to it" in told


def test_a_source_that_may_not_be_read_is_refused(tmp_path: Path, source: Path) -> None:
    (source / "part-001.parquet").chmod(0)
    code, told = run_without_privileges(tmp_path, source, tmp_path / "out")
    assert code == 2, told
    assert f"{source}/part-001.parquet: Permission denied" in told


@contextmanager
def small_disk(folder: Path, options: str = "rw") -> Iterator[Callable[[str], None]]:
    """Mount a disk of one megabyte at `folder`; what is yielded changes its size."""
    folder.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess[bytes]:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False)

    if os.geteuid() != 0 or mount(f"size=1m,{options}").returncode:
        pytest.skip("only root of a machine that lets it mount can make a small disk")
    try:
        yield lambda size: mount(f"remount,{options},size={size}").check_returncode()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_read_only_is_refused(tmp_path: Path, source: Path) -> None:
    with small_disk(tmp_path / "disk", "ro"):
        told = refusal(source, tmp_path / "disk" / "out")
    assert "Read-only file system. Choose a path that can be written" in told


@pytest.mark.ray
@pytest.mark.usefixtures("joined_ray")
@pytest.mark.slow
def test_a_full_disk_leaves_whole_files_and_the_next_run_completes_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(6):
        values = {
            "id": [f"{index}-{row}" for row in range(10)],
            "text": [f"Text {index} {row}" for row in range(10)],
            "blob": [os.urandom(20_000).hex() for _ in range(10)],
        }
        pq.write_table(pa.table(values), folder / f"{index}.parquet")
    with small_disk(tmp_path / "disk") as resize:
        sink = tmp_path / "disk" / "out"
        config = make_config(folder, sink, source={"keep_columns": ["blob"]})
        with pytest.raises(GraniteRayError, match=r"No space left on device\. Free some") as stop:
            run_job(config)
        assert stop.value.exit_code == 75
        files = list((sink / "results").iterdir())
        assert 0 < len(files) < 6
        assert all(pq.read_table(path).num_rows == 10 for path in files)
        assert not (sink / "_SUCCESS.json").exists()
        resize("64m")
        report = run_job(config)
        assert report.exit_code == 0
        assert report.documents.already_committed == 10 * len(files)
        check_output(sink, 60)
