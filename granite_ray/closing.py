"""What a person reads when a run has ended: its report, or why it was refused."""

from rich.console import Console
from rich.text import Text

from granite_ray.errors import GraniteRayError
from granite_ray.logs import writes_json
from granite_ray.report import RunReport, closing_words


def show_report(report: RunReport, console: Console) -> int:
    """Show the closing words of a run, and return its exit code."""
    if not writes_json():  # the log has said it
        console.print(closing_words(report), soft_wrap=True)
    return report.exit_code


def show_error(error: GraniteRayError, console: Console, where: str = "") -> None:
    """Show what ended a run; `where` stands before its words."""
    if writes_json():
        return
    words = Text(_kind(error), style="bold red")
    console.print(words.append(f" {where}{error}", style="not bold default"), soft_wrap=True)


def _kind(error: GraniteRayError) -> str:
    return {
        2: "Refused:",
        5: "Refused:",
        6: "Busy:",
        75: "Try again:",
        130: "Interrupted:",
        143: "Interrupted:",
    }.get(error.exit_code, "Stopped:")
