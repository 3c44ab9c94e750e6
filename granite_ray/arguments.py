"""What a run can be asked on the command line; the commands and the scripts share it."""

import argparse
from datetime import date

from granite_ray.job import RunOptions


def add_run_arguments(
    parser: argparse.ArgumentParser, date_name: str = "--logical-date", *, is_required: bool = False
) -> None:
    """Add what a run can be asked."""
    add_config_arguments(parser, date_name, is_required=is_required)
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N documents only")
    parser.add_argument("--restart", action="store_true", help="answer every document again")
    parser.add_argument("--allow-failed", action="store_true", help="end with 0 instead of 3")
    parser.add_argument(
        "--allow-vanished", action="store_true", help="accept another source root or vanished files"
    )


def add_config_arguments(
    parser: argparse.ArgumentParser, date_name: str = "--logical-date", *, is_required: bool = False
) -> None:
    """Add what a config is loaded with."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override one key of the config; may be repeated",
    )
    parser.add_argument(
        date_name,
        dest="logical_date",
        required=is_required,
        type=date.fromisoformat,
        metavar="YYYY-MM-DD",
        help="the day that the job is for: {date} in source.path and sink.path",
    )


def options_of(arguments: argparse.Namespace) -> RunOptions:
    """Return what the arguments of a run ask."""
    return RunOptions(
        limit=arguments.limit,
        restart=arguments.restart,
        allow_failed=arguments.allow_failed,
        allow_vanished=arguments.allow_vanished,
    )


def positive(text: str) -> int:
    """Read a positive number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
