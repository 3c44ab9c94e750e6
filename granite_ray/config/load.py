"""YAML, `${ENV}` and `--set` overrides → `JobConfig`; every refusal names the field.

This is one of the two modules that read environment variables.
"""

import os
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from granite_ray.config.sections import JobConfig, ServerConfig
from granite_ray.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000
Config = TypeVar("Config", bound=BaseModel)
VARIABLE = re.compile(r"(\$+)\{([A-Za-z_][A-Za-z0-9_]*)(?::-((?:\{date\}|[^}])*))?\}")
"""`${NAME}` and `${NAME:-default}`; one more dollar in front, and it stays as it is, less one."""
DATE_PLACE = "{date}"
"""What the logical date takes the place of in `source.path` and `sink.path`."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), logical_date: date | None = None
) -> JobConfig:
    """Read one YAML file, apply `section.key=value` overrides, and check everything.

    Args:
        path: The YAML file. Files that it names are looked for in its folder.
        overrides: As given to `--set`; values are YAML.
        logical_date: The day that the job is for: `{date}` in `source.path` and `sink.path`.

    Raises:
        ConfigError: Naming the field, the value and the way out.
    """
    return parse_config(read_values(path, overrides), Path(path).parent, logical_date)


def load_server_config(path: str | Path, overrides: Sequence[str] = ()) -> ServerConfig:
    """Read the file that `granite-ray serve` takes; otherwise as `load_config`.

    Raises:
        ConfigError: Naming the field, the value and the way out.
    """
    return parse_section(ServerConfig, read_values(path, overrides), Path(path).parent)


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file as plain data, safely.

    Raises:
        ConfigError: It is missing, too large, or no safe YAML mapping.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Config {path} cannot be read: {error.strerror}.") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"Config {path} has {len(text):,} bytes; at most {MAX_CONFIG_BYTES:,}.")
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"Config {path} must be a mapping of sections such as source and task.")
    for override in overrides:
        _apply_override(values, override)
    return values


def parse_config(
    values: Mapping[str, Any], base_folder: Path = Path(), logical_date: date | None = None
) -> JobConfig:
    """Turn plain data into a `JobConfig`; `${ENV}` and `{date}` in its strings are filled in.

    Raises:
        ConfigError: Naming the field, the value and the way out.
    """
    return _at_date(parse_section(JobConfig, values, base_folder), logical_date)


def parse_section(kind: type[Config], values: Mapping[str, Any], base_folder: Path) -> Config:
    """Turn plain data into a config of any kind, as `parse_config` does it for a job.

    Raises:
        ConfigError: Naming the field, the value and the way out.
    """
    filled = _fill_variables(dict(values), "")
    try:
        return kind.model_validate(filled, context={"base_folder": base_folder})
    except ValidationError as error:
        raise ConfigError(describe_errors(error)) from error


def write_config(config: JobConfig) -> str:
    """Return a loaded config as the YAML that `load_config` reads back as the same.

    It names no file and no variable: another machine needs nothing else to read it.
    """
    text = yaml.dump(_escaped(config.dump()), Dumper=_Dumper, allow_unicode=True, sort_keys=False)
    if len(text.encode()) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"The config with the files that it names has {len(text.encode()):,} bytes; at most "
            f"{MAX_CONFIG_BYTES:,} can be handed to a cluster. Shorten task.schema or "
            "task.examples."
        )
    return text


def config_schema(*, of_server: bool = False) -> dict[str, Any]:
    """Return the JSON Schema of a job's config file, or of a server's, for editors."""
    kind = ServerConfig if of_server else JobConfig
    return kind.model_json_schema(by_alias=True, mode="validation")


def default_ray_address() -> str | None:
    """Return the cluster that the environment names, as inside `ray job submit`."""
    return os.environ.get("RAY_ADDRESS") or None


def default_server() -> tuple[str | None, str | None]:
    """Return address and API key of the server to ask, as far as the environment names them."""
    return os.environ.get("GRANITE_RAY_URL") or None, os.environ.get("GRANITE_RAY_KEY") or None


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (they can explode) and without doubled keys (one would be lost)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {mark.line + 1}: aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} stands twice in the mapping at line {line}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, which `_Loader` refuses."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


def _at_date(config: JobConfig, logical_date: date | None) -> JobConfig:
    """Put the logical date into the paths that have a place for it."""
    source, sink = config.source, config.sink
    is_source_dated = any(DATE_PLACE in path for path in source.path)
    is_sink_dated = DATE_PLACE in sink.path
    if not (is_source_dated or is_sink_dated):
        return config
    if not is_sink_dated:
        raise ConfigError(
            f"source.path {list(source.path)} has {DATE_PLACE} and sink.path {sink.path!r} has "
            f"none: each date would replace the results of the one before. Put {DATE_PLACE} into "
            "sink.path too."
        )
    if logical_date is None:
        raise ConfigError(
            f"sink.path {sink.path!r} has {DATE_PLACE}, and no date is given. Add --logical-date "
            "YYYY-MM-DD."
        )
    day = logical_date.isoformat()
    paths = tuple(path.replace(DATE_PLACE, day) for path in source.path)
    sink_path = sink.path.replace(DATE_PLACE, day)
    return config.model_copy(
        update={
            "source": source.model_copy(update={"path": paths}),
            "sink": sink.model_copy(update={"path": sink_path}),
        }
    )


def _escaped(value: Any) -> Any:
    """Double the dollar of what looks like a variable, so that it is read back as it is."""
    if isinstance(value, dict):
        return {key: _escaped(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_escaped(below) for below in value]
    return VARIABLE.sub(lambda match: f"${match[0]}", value) if isinstance(value, str) else value


def _parse_yaml(text: bytes | str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r} must be written section.key=value.")
    place = values
    for key in keys[:-1]:
        below = place.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override!r}: {key} is not a section.")
        place = below
    place[keys[-1]] = _parse_yaml(text, f"--set {name}")


def _fill_variables(value: Any, field: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill_variables(below, f"{field}.{key}") for key, below in value.items()}
    if isinstance(value, list):
        return [_fill_variables(below, f"{field}[{i}]") for i, below in enumerate(value)]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        dollars, name, default = match.groups()
        if len(dollars) > 1:
            return match[0][1:]
        found = os.environ.get(name, default)
        if found is None:
            raise ConfigError(
                f"{field.lstrip('.')} uses ${{{name}}}, which is not set in the environment. "
                f"Set it, or write ${{{name}:-default}}; $${{{name}}} stays ${{{name}}}."
            )
        return found

    return VARIABLE.sub(fill, value)


def describe_errors(error: ValidationError, *, with_values: bool = True) -> str:
    """Say what is wrong with each field, as the user spells it: a line for each."""
    lines = []
    for problem in error.errors(include_url=False):
        field = _field_name(problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "there is no such key; check its spelling with `granite-ray schema`"
        elif problem["type"] == "missing":
            message = "this key is required"
        elif with_values and not isinstance(problem["input"], dict):
            message = f"{message} (it is {problem['input']!r})"
        lines.append(f"{field}: {message}.")
    return "\n".join(lines)


def _field_name(location: tuple[int | str, ...]) -> str:
    """Spell a field as the user does: without pydantic's union tags."""
    kinds = {"summarize", "classify", "extract", "generate"}
    parts: list[str] = []
    for index, part in enumerate(location):
        is_task = (index == 1 and location[0] == "task") or (
            index == 3 and location[:2] == ("serve", "tasks")
        )
        is_tag = (is_task and part in kinds) or "[" in str(part)
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}[{part}]"] if parts else [str(part)]
        elif not is_tag:
            parts.append(part)
    return ".".join(parts)
