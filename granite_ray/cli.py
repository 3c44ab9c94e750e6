"""The commands. Each is a thin layer over the Python verbs of the same name."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from granite_ray.arguments import add_config_arguments, add_run_arguments, options_of
from granite_ray.closing import show_error, show_report
from granite_ray.cluster import stop_ray
from granite_ray.cluster_commands import add_submit, nightly_parser
from granite_ray.config import config_schema, load_config
from granite_ray.errors import ConfigError, GraniteRayError
from granite_ray.evaluation.files import DEFAULT_FOLDER, write_evaluation
from granite_ray.evaluation.measuring import evaluate
from granite_ray.evaluation.terminal import terminal_view
from granite_ray.io.storage import open_storage
from granite_ray.job import RunOptions, redrive_job, run_job
from granite_ray.progress import default_console, duration, read_progress
from granite_ray.report import read_report
from granite_ray.serving.commands import add_ask_arguments, add_serve_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (DESIGN: 0, 1, 2, 3, 4, 5, 6, 75, 130, 143)."""
    return _call(_parser().parse_args(argv))


def _call(arguments: argparse.Namespace) -> int:
    console = default_console()
    try:
        code: int = arguments.command(arguments, console)
    except GraniteRayError as error:
        show_error(error, console)
        return error.exit_code
    return code


def console_script() -> None:
    """Run the command line as a process of its own."""
    try:
        code = main()
    except BrokenPipeError:  # as `granite-ray schema | head` ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process with `code`, also where a dead cluster keeps Ray's threads alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not stop_ray():
        os._exit(code)
    sys.exit(code)


def run_pipeline(kind: str, description: str | None) -> int:
    """Run a job of one task kind from a script in pipelines/, and return its exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help=f"YAML file of a {kind} job")
    add_run_arguments(parser)
    parser.set_defaults(command=_run, kind=kind)
    return _call(parser.parse_args())


def run_nightly(description: str | None) -> int:
    """Run several jobs for one date from pipelines/nightly.py, and return the worst exit code."""
    return _call(nightly_parser(description).parse_args())


def _run(arguments: argparse.Namespace, console: Console) -> int:
    config = load_config(arguments.config, arguments.set, arguments.logical_date)
    if arguments.kind not in (None, config.task.kind):
        raise ConfigError(
            f"task.kind is {config.task.kind}, but this pipeline runs {arguments.kind}. Choose a "
            "config of that kind, or use granite-ray run, which runs any."
        )
    return show_report(run_job(config, options_of(arguments), console=console), console)


def _redrive(arguments: argparse.Namespace, console: Console) -> int:
    options = RunOptions(allow_failed=arguments.allow_failed)
    return show_report(redrive_job(arguments.output, options, console=console), console)


def _status(arguments: argparse.Namespace, _: Console) -> int:
    sink = open_storage(arguments.output)
    progress, report = read_progress(sink), read_report(sink)
    if progress is None and report is None:
        raise ConfigError(f"{arguments.output} holds no job. Give the sink.path of one.")
    if arguments.json:
        print(json.dumps({"progress": progress, "report": report}, indent=2))
        return 0
    if progress is not None:
        print(_progress_words(progress))
    if report is not None:
        print(_report_words(report))
    return 0


def _progress_words(progress: dict[str, Any]) -> str:
    words = [
        f"run {progress['run_id']}: {progress['state']}",
        f"{progress['committed']:,} of {progress['planned']:,} documents committed",
        f"{progress['failed']:,} failed",
    ]
    if progress["state"] == "running":
        words.append(f"{progress['documents_per_s']:,.1f} documents/s")
    if progress["seconds_left"] is not None:
        words.append(f"{duration(progress['seconds_left'])} left")
    return ", ".join(words)


def _report_words(report: dict[str, Any]) -> str:
    failures = sorted(report["failures"].items(), key=lambda failure: -failure[1])
    return (
        f"last run {report['run_id']} ended with exit code {report['exit_code']}"
        + (f": {report['error']}" if report["error"] else "")
        + "".join(f"\n  failed     {count:,} {error_type}" for error_type, count in failures)
    )


def _plan(arguments: argparse.Namespace, _: Console) -> int:
    from granite_ray.preflight import plan_view  # loads torch

    config = load_config(arguments.config, arguments.set, arguments.logical_date)
    Console().print(plan_view(config, arguments.gpu_gib))
    return 0


def _eval(arguments: argparse.Namespace, console: Console) -> int:
    config = load_config(arguments.config, arguments.set, arguments.logical_date)
    with console.status("measuring"):
        evaluation = evaluate(config, arguments.truth)
    folder = arguments.out or f"{config.sink.path.rstrip('/')}/{DEFAULT_FOLDER}"
    paths = write_evaluation(open_storage(folder), evaluation)
    told = Console()
    told.print(terminal_view(evaluation))
    for path in paths:
        told.print(Text(f"written {path}"), soft_wrap=True)
    return 0


def _schema(arguments: argparse.Namespace, _: Console) -> int:
    print(json.dumps(config_schema(of_server=arguments.server), indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="granite-ray",
        description="IBM Granite over whole document corpora on Ray: every document one typed row.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run or resume a job")
    run.set_defaults(command=_run, kind=None)
    run.add_argument("config", metavar="CONFIG", help="YAML file of the job")
    add_run_arguments(run)

    add_submit(commands)

    plan = commands.add_parser("plan", help="what fits on GPUs of a size, and on how many")
    plan.set_defaults(command=_plan)
    plan.add_argument("config", metavar="CONFIG", help="YAML file of the job")
    plan.add_argument(
        "--gpu-gib", type=float, default=80.0, metavar="GIB", help="memory of one GPU (80)"
    )
    add_config_arguments(plan)

    redrive = commands.add_parser("redrive", help="run the failed rows of an output again")
    redrive.set_defaults(command=_redrive)
    redrive.add_argument("output", metavar="OUT", help="sink.path of the job")
    redrive.add_argument(
        "--allow-failed", action="store_true", help="end with 0 where rows fail again"
    )

    status = commands.add_parser("status", help="how far a job is, from anywhere")
    status.set_defaults(command=_status)
    status.add_argument("output", metavar="OUT", help="sink.path of the job")
    status.add_argument("--json", action="store_true", help="print progress and report as JSON")

    _add_eval(commands)

    serving = commands.add_parser("serve", help="answer requests over HTTP until told to stop")
    add_serve_arguments(serving)
    add_ask_arguments(commands.add_parser("ask", help="ask a running server about files"))

    schema = commands.add_parser("schema", help="print the JSON Schema of a config, for editors")
    schema.set_defaults(command=_schema)
    schema.add_argument("--server", action="store_true", help="of what granite-ray serve takes")
    return parser


def _add_eval(commands: Any) -> None:
    """Add the command to the others."""
    evaluation = commands.add_parser("eval", help="measure the results against a truth column")
    evaluation.set_defaults(command=_eval)
    evaluation.add_argument("config", metavar="CONFIG", help="YAML file of the job, as it ran")
    evaluation.add_argument(
        "--truth", required=True, metavar="COLUMN", help="column of source.keep_columns"
    )
    evaluation.add_argument(
        "--out", metavar="FOLDER", help="where to write it; by default _granite below sink.path"
    )
    add_config_arguments(evaluation)


if __name__ == "__main__":
    console_script()
