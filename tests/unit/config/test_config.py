"""What a config file may say; each refusal names the field, the value and the way out."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from granite_ray.config import JobConfig, config_schema, load_config, parse_config
from granite_ray.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
VALUES: dict[str, Any] = {
    "source": {"path": "in"},
    "task": {"kind": "summarize"},
    "sink": {"path": "out"},
}


class Card(BaseModel):
    title: str


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def write_values(folder: Path, **sections: Any) -> Path:
    return write(folder, yaml.safe_dump({**VALUES, **sections}))


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a config is refused."""
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert refused.value.exit_code == 2
    return str(refused.value)


# YAML ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml cannot be read: No such file" in refusal(tmp_path / "nowhere.yaml")
    assert "cannot be read: Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: [", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
        ("just words", "must be a mapping of sections"),
        ("- a\n- b", "must be a mapping of sections"),
        ("", "must be a mapping of sections"),
        ("sink: &here {path: out}\nsource: *here", "line 2: aliases (*name) are not allowed"),
        ("sink: {path: a}\nsink: {path: b}", "'sink' stands twice in the mapping at line 1"),
        ("sink:\n  path: a\n  path: b", "'path' stands twice in the mapping at line 2"),
        ("a: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
    ],
)
def test_text_that_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    told = refusal(write(tmp_path, text))
    assert message in told
    assert "job.yaml" in told


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"source: \xff\xfe\xfa")
    assert "is not valid YAML" in refusal(path)


def test_a_file_of_more_than_a_megabyte_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "# " + "x" * 1_000_000)
    assert "has 1,000,002 bytes; at most 1,000,000" in refusal(path)


# keys and values ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sorce": {}}, "sorce: there is no such key; check its spelling"),
        ({"sink": {"path": "out", "fromat": "x"}}, "sink.fromat: there is no such key"),
        ({"task": {"kind": "summarize", "labels": ["a"]}}, "task.labels: there is no such key"),
        ({"sink": {}}, "sink.path: this key is required"),
        ({"source": {}}, "source.path: this key is required"),
        ({"task": {}}, "task"),
        ({"task": {"kind": "translate"}}, "translate"),
        ({"task": {"kind": "classify"}}, "task.labels: this key is required"),
        ({"task": {"kind": "classify", "labels": ["one"]}}, "classification needs at least 2"),
        ({"task": {"kind": "classify", "labels": ["a", "a"]}}, "'a' twice"),
        ({"task": {"kind": "classify", "labels": ["a", " "]}}, "non-empty strings"),
        ({"task": {"kind": "extract"}}, "task.schema: this key is required"),
        ({"task": {"kind": "extract", "schema": "no.json"}}, "'no.json' is not a file"),
        ({"task": {"kind": "extract", "schema": "no.such:Class"}}, "cannot be imported"),
        ({"task": {"kind": "extract", "schema": "json:JSONDecoder"}}, "not a pydantic model class"),
        ({"task": {"kind": "generate", "template": "no.jinja"}}, "'no.jinja' is not a file"),
        ({"task": {"kind": "summarize", "max_tokens": 0}}, "task.max_tokens: "),
        ({"task": {"kind": "summarize", "max_tokens": "many"}}, "(it is 'many')"),
        ({"task": {"kind": "summarize", "length": "huge"}}, "(it is 'huge')"),
        ({"job": {"max_failed_fraction": 1.5}}, "job.max_failed_fraction: "),
        ({"engine": {"backend": "vllm"}}, "engine.backend: "),
        ({"engine": {"num_replicas": [4, 2]}}, "[4, 2] is not a range"),
        ({"engine": {"num_replicas": 0}}, "engine.num_replicas: "),
        ({"engine": {"expert_parallel_size": 0}}, "engine.expert_parallel_size: "),
        ({"engine": {"expert_parallel_size": 2, "backend": "transformers"}}, "runs on one rank"),
        ({"engine": {"expert_parallel_size": 2, "cuda_graphs": True}}, "cuda_graphs cannot hold"),
        ({"engine": {"rank_timeout_s": 0}}, "engine.rank_timeout_s: "),
        ({"source": {"path": "in", "bytes_per_shard": "lots"}}, "source.bytes_per_shard: "),
        ({"source": {"path": []}}, "source.path: "),
        ({"source": {"path": "in", "filter": [["year", "like", 1]]}}, "source.filter[0].operator"),
        ({"source": {"path": "in", "filter": [["year", "in", 1]]}}, "takes a list of values"),
        ({"source": {"path": "in", "on_duplicate": "error"}}, "needs source.id_column"),
        ({"source": {"path": "in", "keep_columns": ["a", "a"]}}, "names a column twice"),
        ({"chunking": {"max_tokens": 100, "overlap_tokens": 60}}, "choose at most 50"),
        ({"source": None}, "source: "),
        ({"source": ["in"]}, "source: "),
    ],
)
def test_a_wrong_key_or_value_is_named(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    told = refusal(write_values(tmp_path, **sections))
    assert message in told
    assert not re.search(r"pydantic\.|type=|function-", told), told


def test_every_wrong_field_is_told_at_once(tmp_path: Path) -> None:
    told = refusal(write_values(tmp_path, sink={"paht": "out"}, job={"lease_s": -1}))
    for field in ("sink.path", "sink.paht", "job.lease_s"):
        assert f"{field}: " in told


def test_the_kind_decides_which_keys_a_task_has(tmp_path: Path) -> None:
    told = refusal(write_values(tmp_path, task={"kind": "bogus"}))
    for kind in ("summarize", "classify", "extract", "generate"):
        assert kind in told
    assert "'bogus'" in told


def test_a_config_cannot_change_after_loading(tmp_path: Path) -> None:
    config = load_config(write_values(tmp_path))
    with pytest.raises(ValidationError):
        config.job.lease_s = 1.0  # type: ignore[misc]


def test_a_dumped_config_is_read_back_the_same(tmp_path: Path) -> None:
    (tmp_path / "reply.jinja").write_text("Say {{ text }}")
    task = {"kind": "generate", "template": "reply.jinja", "schema": f"{__name__}:Card"}
    source = {"path": ["a", "b"], "filter": [["year", ">", 3]], "bytes_per_shard": "64MiB"}
    config = load_config(write_values(tmp_path, task=task, source=source))
    assert config.task.template == "Say {{ text }}"
    assert config.source.bytes_per_shard == 64 * 1024**2
    assert config.dump()["task"]["schema"]["properties"].keys() == {"title"}
    assert JobConfig.model_validate(config.dump()) == config


def test_a_schema_can_be_a_file_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"type": "object", "properties": {}}')
    config = load_config(write_values(tmp_path, task={"kind": "extract", "schema": "card.json"}))
    assert config.dump()["task"]["schema"] == {"type": "object", "properties": {}}
    (tmp_path / "card.json").write_text("{")
    told = refusal(tmp_path / "job.yaml")
    assert "task.schema: 'card.json' is not valid JSON" in told


# ${ENV}, --set ───────────────────────────────────────────────────────────────────────────────────


def test_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "here")
    monkeypatch.delenv("ELSEWHERE", raising=False)
    path = write_values(
        tmp_path,
        source={"path": ["${PLACE}/in", "${ELSEWHERE:-there}/in"]},
        sink={"path": "${ELSEWHERE:-}out"},
    )
    config = load_config(path)
    assert config.source.path == ("here/in", "there/in")
    assert config.sink.path == "out"


def test_a_variable_that_is_not_set_is_named_with_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ELSEWHERE", raising=False)
    told = refusal(write_values(tmp_path, source={"path": ["a", "${ELSEWHERE}"]}))
    assert told.startswith("source.path[1] uses ${ELSEWHERE}, which is not set")
    assert "${ELSEWHERE:-default}" in told


def test_set_overrides_one_key_with_a_value_of_its_type(tmp_path: Path) -> None:
    config = load_config(
        write_values(tmp_path),
        [
            "job.lease_s=7.5",
            "source.path=[a, b]",
            "task.length=long",
            "task.instruction=Say a=b",
            "model.max_model_len=1000",
        ],
    )
    assert config.job.lease_s == 7.5
    assert config.source.path == ("a", "b")
    assert (config.task.length, config.task.instruction) == ("long", "Say a=b")
    assert config.model.max_model_len == 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("job.lease_s", "must be written section.key=value"),
        ("=5", "must be written section.key=value"),
        ("job..lease_s=5", "must be written section.key=value"),
        ("task.kind.deeper=5", "kind is not a section"),
        ("job.lease_s=[", "--set job.lease_s is not valid YAML"),
        ("job.lease=5", "job.lease: there is no such key"),
        ("job.lease_s=soon", "job.lease_s: "),
        ("nothing=5", "nothing: there is no such key"),
    ],
)
def test_an_override_that_says_nothing_sensible_is_refused(
    tmp_path: Path, override: str, message: str
) -> None:
    assert message in refusal(write_values(tmp_path), override)


# JSON Schema ─────────────────────────────────────────────────────────────────────────────────────


def test_the_schema_for_editors_accepts_what_loads_and_refuses_what_does_not() -> None:
    validator = jsonschema.Draft202012Validator(config_schema())
    loads = {
        "source": {"path": "in", "filter": [["year", ">", 3]], "bytes_per_shard": "64MiB"},
        "task": {"kind": "generate", "template": "{{ text }}", "schema": f"{__name__}:Card"},
        "engine": {"num_replicas": [1, 4]},
        "sink": {"path": "out"},
    }
    parse_config(loads)
    validator.validate(loads)
    of_server = jsonschema.Draft202012Validator(config_schema(of_server=True))
    for path in CONFIGS.glob("*.yaml"):
        if path.stem != "serve_deploy":  # Ray Serve's own file
            of_file = of_server if path.stem == "serve" else validator
            of_file.validate(yaml.safe_load(path.read_text()))
    for wrong in ({"sorce": {}}, {"task": {"kind": "bogus"}}, {"job": {"lease_s": "soon"}}):
        assert not validator.is_valid({**VALUES, **wrong}), wrong
