"""`granite-ray serve` and `granite-ray ask`, as the command line calls them.

What needs the extra `serve` is loaded when a command runs: the other commands do without.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from granite_ray.config import TaskConfig, describe_errors, load_server_config, read_values
from granite_ray.config.load import default_server
from granite_ray.errors import ConfigError, InfrastructureError
from granite_ray.serving.client import Client
from granite_ray.serving.keys import make_key

KINDS = ("summarize", "classify", "extract", "generate")
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DEFAULT_URL = "http://127.0.0.1:8000"


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `granite-ray serve` takes."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of the server")
    parser.add_argument(
        "--new-key", metavar="NAME", help="make an API key and its entry for serve.keys_path"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override one key of the config; may be repeated",
    )
    parser.set_defaults(command=serve_command)


def add_ask_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `granite-ray ask` takes."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="documents: texts, .jsonl or .parquet"
    )
    parser.add_argument(
        "--task",
        required=True,
        help=f"a task of the server's by name, one of {', '.join(KINDS)}, or a YAML file with a "
        "task section",
    )
    parser.add_argument("--url", default=None, help=f"GRANITE_RAY_URL, or {DEFAULT_URL}")
    parser.add_argument("--out", metavar="FILE", help=".jsonl or .parquet; by default the terminal")
    parser.add_argument("--text-column", default="text", help="as source.text_column")
    parser.add_argument("--id-column", help="as source.id_column")
    parser.set_defaults(command=ask_command)


def serve_command(arguments: argparse.Namespace, console: Console) -> int:
    """Serve until told to stop, or make a key."""
    if arguments.new_key is not None:
        key, entry = make_key(arguments.new_key)
        print(f"# The key, which is shown once: {key}\nkeys:\n{entry}", end="")
        return 0
    if arguments.config is None:
        raise ConfigError("granite-ray serve needs a CONFIG, or --new-key NAME.")
    try:
        from granite_ray.serving.server import run_server  # needs the extra
    except ImportError as error:
        raise ConfigError(
            f"granite-ray serve needs more packages ({error.name} is missing). Install "
            "'granite-ray[serve]'."
        ) from error
    return run_server(load_server_config(arguments.config, arguments.set), console)


def ask_command(arguments: argparse.Namespace, console: Console) -> int:
    """Ask a running server about files; 3 where some documents failed."""
    known_url, key = default_server()
    paths = [Path(name) for name in arguments.files]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path} is not a file.")
    wants_parquet = (arguments.out or "").endswith(".parquet")
    form = {"format": "parquet" if wants_parquet else "jsonl"}
    with Client(arguments.url or known_url or DEFAULT_URL, key) as client:
        kind, task = _task(arguments.task, client)
        answers = [
            _ask(client, kind, {**body, **task, **form}, console)
            for body in _bodies(paths, arguments, client)
        ]
    if wants_parquet:
        table = pa.concat_tables([pq.read_table(pa.BufferReader(answer)) for answer in answers])
        pq.write_table(table, arguments.out)
        statuses = table["status"].to_pylist()
    else:
        rows = [row for answer in answers for row in _rows(answer)]
        _write(rows, arguments.out)
        statuses = [row["status"] for row in rows]
    return 3 if "failed" in statuses else 0


def _task(name: str, client: Client) -> tuple[str, dict[str, Any]]:
    """Return the route's kind, and what the body says of the task."""
    if name in KINDS:
        return name, {}
    if name.endswith((".yaml", ".yml")):
        section = _section(Path(name))
        return section["kind"], {"task": section}
    known = client.tasks()
    if name not in known:
        raise ConfigError(
            f"--task {name} is neither one of {', '.join(KINDS)}, nor a YAML file, nor one of the "
            f"server's tasks {sorted(known)}."
        )
    return known[name], {"task": name}


def _section(path: Path) -> dict[str, Any]:
    """Return the task section of a file, or the file if it is one; what it names is read here."""
    values = read_values(path)
    section = values.get("task", values)
    try:
        task: Any = TypeAdapter(TaskConfig).validate_python(
            section, context={"base_folder": path.parent}
        )
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_errors(error)}") from error
    dumped: dict[str, Any] = task.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return dumped


def _bodies(
    paths: Iterable[Path], arguments: argparse.Namespace, client: Client
) -> Iterable[dict[str, Any]]:
    """Yield a request for all texts together, and one for each file of documents."""
    columns = {"text_column": arguments.text_column, "id_column": arguments.id_column}
    texts = []
    for path in paths:
        if path.name.endswith(FILE_SUFFIXES):
            yield {**columns, "input_file_id": client.upload(path)}
        else:
            texts.append({"text": _read_text(path), "file": path.name})
    if texts:
        yield {"documents": texts, "id_column": "file"}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason}.") from error


def _ask(client: Client, kind: str, body: Mapping[str, Any], console: Console) -> bytes:
    """Return the rows of one request, in the form that it asks for."""
    response = client.ask(kind, body)
    if response.status_code != 202:
        return response.content
    with console.status("waiting for the batch") as status:
        return client.wait(
            response.json(),
            lambda done, total: status.update(f"{done:,} of {total:,} documents"),
        )


def _rows(answer: bytes) -> list[dict[str, Any]]:
    """Return rows in the order of the documents: they come as they are ready.

    Raises:
        InfrastructureError: One could not be had.
    """
    rows = [json.loads(line) for line in answer.decode().split("\n") if line]
    for row in rows:
        if "error" in row:
            raise InfrastructureError(f"The server could not answer all: {row['error']['message']}")
    return sorted(rows, key=lambda row: (row["source_file"], row["source_row"]))


def _write(rows: list[dict[str, Any]], out: str | None) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is None:
        print(lines, end="")
    else:
        Path(out).write_text(lines, encoding="utf-8")
