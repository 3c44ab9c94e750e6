"""`{date}` in paths, and configs written for another machine."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from granite_ray.config import load_config, parse_config, write_config
from granite_ray.errors import ConfigError
from tests.corpus import job_values

DAY = date(2026, 11, 21)


def values(source: str, sink: str) -> dict[str, Any]:
    return job_values(source, sink)


def test_the_logical_date_takes_its_place_in_the_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUCKET", raising=False)
    dated = values("${BUCKET:-s3://in/{date}}/new", "s3://out/{date}")
    config = parse_config(dated, logical_date=DAY)
    assert config.source.path == ("s3://in/2026-11-21/new",)
    assert config.sink.path == "s3://out/2026-11-21"
    monkeypatch.setenv("BUCKET", "s3://other")
    assert parse_config(dated, logical_date=DAY).source.path == ("s3://other/new",)


def test_a_date_that_is_not_given_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--logical-date"):
        parse_config(values("in", "out/{date}"))


def test_dated_input_needs_a_dated_output() -> None:
    with pytest.raises(ConfigError, match=r"Put \{date\} into sink.path too"):
        parse_config(values("in/{date}", "out"), logical_date=DAY)


def test_a_date_without_a_place_changes_nothing() -> None:
    plain = values("in", "out")
    assert parse_config(plain, logical_date=DAY) == parse_config(plain)


def test_one_more_dollar_keeps_a_variable_as_text() -> None:
    job = job_values("in", "out", task={"instruction": "Explain $${HOME} and $$${X:-y}, not $5."})
    assert parse_config(job).task.instruction == "Explain ${HOME} and $${X:-y}, not $5."


def test_a_written_config_is_read_back_as_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.jinja").write_text("Say ${HOME} \u2028 \x85 😀 'of' {{ text }}\n\n")
    properties = {"zeta": {"type": "string"}, "alpha": {"type": "string"}}
    schema = {"type": "object", "properties": properties}
    task = {
        "kind": "extract",
        "template": "prompt.jinja",
        "schema": schema,
        "instruction": "yes: no\n  # ${A}",
    }
    job = job_values("in", "out", task=task, source={"filter": [["year", ">", 2001]]})
    monkeypatch.setenv("A", "filled here")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    config = load_config(tmp_path / "job.yaml")
    monkeypatch.delenv("A")
    (tmp_path / "elsewhere").mkdir()
    written = tmp_path / "elsewhere" / "job.yaml"
    written.write_text(write_config(config))
    read = load_config(written)
    assert read == config
    assert list(read.dump()["task"]["schema"]["properties"]) == ["zeta", "alpha"]


def test_a_config_too_large_to_hand_over_is_refused() -> None:
    schema = {"type": "object", "description": "x" * 1_000_001}
    config = parse_config(job_values("in", "out", task={"kind": "extract", "schema": schema}))
    with pytest.raises(ConfigError, match=r"1,00.,... bytes; at most 1,000,000"):
        write_config(config)
