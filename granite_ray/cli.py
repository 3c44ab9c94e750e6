"""The commands. Each is a thin layer over the Python verbs of the same name."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from granite_ray.cluster import stop_ray
from granite_ray.config import config_schema, load_config
from granite_ray.errors import ConfigError, GraniteRayError
from granite_ray.evaluation.files import DEFAULT_FOLDER, write_evaluation
from granite_ray.evaluation.measuring import evaluate
from granite_ray.evaluation.terminal import terminal_view
from granite_ray.io.storage import open_storage
from granite_ray.job import RunOptions, redrive_job, run_job
from granite_ray.progress import default_console, duration, read_progress
from granite_ray.report import RunReport, closing_words, read_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (DESIGN: 0, 1, 2, 3, 4, 5, 6, 75, 130, 143)."""
    return _call(_parser().parse_args(argv))


def _call(arguments: argparse.Namespace) -> int:
    console = default_console()
    try:
        code: int = arguments.command(arguments, console)
    except GraniteRayError as error:
        words = Text(_kind(error), style="bold red").append(f" {error}", style="not bold default")
        console.print(words, soft_wrap=True)
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
    _add_run_arguments(parser)
    parser.set_defaults(command=_run, kind=kind)
    return _call(parser.parse_args())


def _run(arguments: argparse.Namespace, console: Console) -> int:
    config = load_config(arguments.config, arguments.set)
    if arguments.kind not in (None, config.task.kind):
        raise ConfigError(
            f"task.kind is {config.task.kind}, but this pipeline runs {arguments.kind}. Choose a "
            "config of that kind, or use granite-ray run, which runs any."
        )
    options = RunOptions(
        limit=arguments.limit,
        restart=arguments.restart,
        allow_failed=arguments.allow_failed,
        allow_vanished=arguments.allow_vanished,
    )
    return _close(run_job(config, options, console=console), console)


def _redrive(arguments: argparse.Namespace, console: Console) -> int:
    options = RunOptions(allow_failed=arguments.allow_failed)
    return _close(redrive_job(arguments.output, options, console=console), console)


def _close(report: RunReport, console: Console) -> int:
    console.print(closing_words(report), soft_wrap=True)
    return report.exit_code


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

    config = load_config(arguments.config, arguments.set)
    Console().print(plan_view(config, arguments.gpu_gib))
    return 0


def _eval(arguments: argparse.Namespace, console: Console) -> int:
    config = load_config(arguments.config, arguments.set)
    with console.status("measuring"):
        evaluation = evaluate(config, arguments.truth)
    folder = arguments.out or f"{config.sink.path.rstrip('/')}/{DEFAULT_FOLDER}"
    paths = write_evaluation(open_storage(folder), evaluation)
    told = Console()
    told.print(terminal_view(evaluation))
    for path in paths:
        told.print(Text(f"written {path}"), soft_wrap=True)
    return 0


def _schema(_: argparse.Namespace, __: Console) -> int:
    print(json.dumps(config_schema(), indent=2))
    return 0


def _kind(error: GraniteRayError) -> str:
    return {
        2: "Refused:",
        5: "Refused:",
        6: "Busy:",
        75: "Try again:",
        130: "Interrupted:",
        143: "Interrupted:",
    }.get(error.exit_code, "Stopped:")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="granite-ray",
        description="IBM Granite over whole document corpora on Ray: every document one typed row.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run or resume a job")
    run.set_defaults(command=_run, kind=None)
    run.add_argument("config", metavar="CONFIG", help="YAML file of the job")
    _add_run_arguments(run)

    plan = commands.add_parser("plan", help="what fits on GPUs of a size, and on how many")
    plan.set_defaults(command=_plan)
    plan.add_argument("config", metavar="CONFIG", help="YAML file of the job")
    plan.add_argument(
        "--gpu-gib", type=float, default=80.0, metavar="GIB", help="memory of one GPU (80)"
    )
    _add_set_argument(plan)

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

    evaluation = commands.add_parser("eval", help="measure the results against a truth column")
    evaluation.set_defaults(command=_eval)
    evaluation.add_argument("config", metavar="CONFIG", help="YAML file of the job, as it ran")
    evaluation.add_argument(
        "--truth", required=True, metavar="COLUMN", help="column of source.keep_columns"
    )
    evaluation.add_argument(
        "--out", metavar="FOLDER", help="where to write it; by default _granite below sink.path"
    )
    _add_set_argument(evaluation)

    schema = commands.add_parser("schema", help="print the JSON Schema of a config, for editors")
    schema.set_defaults(command=_schema)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a run can be asked; the scripts in pipelines/ share them."""
    _add_set_argument(parser)
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N documents only")
    parser.add_argument("--restart", action="store_true", help="answer every document again")
    parser.add_argument("--allow-failed", action="store_true", help="end with 0 instead of 3")
    parser.add_argument(
        "--allow-vanished", action="store_true", help="accept another source root or vanished files"
    )


def _add_set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override one key of the config; may be repeated",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    console_script()
