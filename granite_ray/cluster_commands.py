"""The commands of clusters: `granite-ray submit`, and what pipelines/nightly.py runs."""

import argparse
from datetime import date
from typing import Any

from rich.console import Console

from granite_ray.arguments import add_run_arguments, options_of
from granite_ray.closing import show_error, show_report
from granite_ray.config import JobConfig, load_config
from granite_ray.nightly import run_night, worst_code
from granite_ray.submit import connect, follow_job, stop_job, submit_job


def add_submit(commands: Any) -> None:
    """Add the command to the others."""
    submit = commands.add_parser("submit", help="run, resume or stop a job on a Ray cluster")
    submit.set_defaults(command=_submit)
    submit.add_argument("config", metavar="CONFIG", help="YAML file of the job")
    submit.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard, such as http://head:8265; by default RAY_API_SERVER_ADDRESS",
    )
    submit.add_argument(
        "--follow", action="store_true", help="show its log, and end with its own exit code"
    )
    submit.add_argument(
        "--stop", action="store_true", help="stop it; shards in flight get job.grace_s"
    )
    add_run_arguments(submit)


def nightly_parser(description: str | None) -> argparse.ArgumentParser:
    """Return what reads the arguments of pipelines/nightly.py."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, action="append", help="YAML file of a job; may be repeated"
    )
    parser.add_argument(
        "--catch-up", type=int, default=0, metavar="N", help="dates before it to look at"
    )
    add_run_arguments(parser, "--date", is_required=True)
    parser.set_defaults(command=_night)
    return parser


def _night(arguments: argparse.Namespace, console: Console) -> int:
    def load(day: date) -> list[JobConfig]:
        return [load_config(path, arguments.set, day) for path in arguments.config]

    ended = run_night(
        load,
        arguments.logical_date,
        options_of(arguments),
        catch_up=arguments.catch_up,
        console=console,
    )
    for job in ended:
        if job.error is None:
            show_report(job.report, console)
        else:
            show_error(job.error, console, f"{job.report.sink}: ")
    return worst_code(ended)


def _submit(arguments: argparse.Namespace, console: Console) -> int:
    day = arguments.logical_date
    config = load_config(arguments.config, arguments.set, day)
    client = connect(arguments.address)
    if arguments.stop:
        stopped = stop_job(client, config, day)
        _say(console, f"stopped {stopped}" if stopped else f"no job is on for {config.sink.path}")
        return 0
    submission = submit_job(client, config, options_of(arguments), day)
    done = "joined" if submission.is_joined else "submitted"
    _say(console, f"{done} {submission.submission_id}")
    if not arguments.follow:
        print(submission.submission_id)
        return 0
    try:
        return follow_job(client, submission.submission_id, lambda text: _show(console, text))
    except KeyboardInterrupt:
        _say(console, "no longer followed; the job goes on. The same command with --stop ends it.")
        return 130


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _show(console: Console, text: str) -> None:
    console.file.write(text)
    console.file.flush()
