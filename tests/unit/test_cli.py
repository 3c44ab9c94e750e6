"""The command line without a job: what is said, where, and with which exit code."""

import json
from pathlib import Path

import pytest
import yaml

from granite_ray.cli import main
from granite_ray.config import config_schema
from tests.corpus import job_values


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["launch"], "invalid choice: 'launch'"),
        (["run"], "arguments are required: CONFIG"),
        (["run", "a.yaml", "--limit", "0"], "0 is not a positive number"),
        (["run", "a.yaml", "--limit", "few"], "--limit"),
        (["run", "a.yaml", "--faster"], "unrecognized arguments: --faster"),
        (["status"], "arguments are required: OUT"),
        (["eval", "a.yaml"], "arguments are required: --truth"),
    ],
)
def test_a_command_that_cannot_be_read_ends_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "usage: granite-ray" in told.err
    assert message in told.err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for command in ("run", "plan", "redrive", "status", "eval", "schema"):
        assert f"\n    {command} " in told


def test_a_plan_tells_the_smallest_group_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"path": "configs/models/granite-4.0-h-small", "load_format": "dummy"}
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(job_values(tmp_path, tmp_path / "out", model=model)))
    told = {}
    for gpu_gib in ("80", "24", "2"):
        assert main(["plan", str(config), "--gpu-gib", gpu_gib]) == 0
        told[gpu_gib] = capsys.readouterr().out
    # 60 GiB of weights, of which experts are 50.6 GiB.
    assert "engine.expert_parallel_size: 1" in told["80"]
    assert "engine.expert_parallel_size: 5" in told["24"]
    assert "No group fits on GPUs of 2 GiB" in told["2"]
    assert not (tmp_path / "out").exists()


def test_the_schema_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads(json.dumps(config_schema()))
    assert told.err == ""


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["redrive"]])
def test_an_output_without_a_job_is_refused(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert f"Refused: {tmp_path} holds no job. Give the sink.path of one" in told.err


def test_a_refusal_is_one_line_however_long_and_whatever_it_quotes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    values = job_values(tmp_path / "in", tmp_path / "out")
    config.write_text(yaml.safe_dump(values))
    wish = "[bold]" + "long " * 40
    assert main(["run", str(config), "--set", f"task.length='{wish}'"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("Refused: task.length: ")
    assert wish in told


def test_a_config_of_another_place_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "/nowhere/job.yaml"]) == 2
    told = capsys.readouterr().err
    assert told == "Refused: Config /nowhere/job.yaml cannot be read: No such file or directory.\n"
