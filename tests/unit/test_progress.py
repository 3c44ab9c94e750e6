"""What is shown and written while a run goes on."""

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from granite_ray.progress import PROGRESS_PATH, Counts, ProgressView, duration, read_progress
from tests.faulty_storage import FaultyStorage, MemoryStorage


def show(counts: list[Counts], *, is_terminal: bool, storage: Any = None) -> str:
    """What a console shows of a run that comes through these counts."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=80, height=24)
    with ProgressView(console, storage or MemoryStorage(), "run1") as view:
        view.say("planning [bold]/in[/]")
        view.begin(counts[0])
        for item in counts:
            view.update(item)
        view.end("done", counts[-1])
    return file.getvalue()


SOME = [
    Counts(planned=1200, committed=200, shards_planned=12, shards_committed=2),
    Counts(1200, 400, 3, 700, 12, 4, 9000, 2),
]


def test_elsewhere_than_in_a_terminal_lines_are_plain() -> None:
    shown = show(SOME, is_terminal=False)
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert shown.startswith("planning [bold]/in[/]\n"), "a path is no markup"


def test_in_a_terminal_nothing_is_left_behind_and_the_cursor_is_back() -> None:
    shown = show(SOME, is_terminal=True)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0
    assert shown.endswith(("\x1b[2K", "\x1b[?25h")) or re.search(r"\x1b\[2K\s*$", shown)


def test_no_console_shows_nothing_and_still_writes_progress() -> None:
    storage = MemoryStorage()
    with ProgressView(None, storage, "run1") as view:
        view.say("planning")
        view.begin(SOME[0])
        view.end("done", SOME[1])
    written = read_progress(storage)
    assert written is not None
    assert (written["run_id"], written["state"], written["committed"]) == ("run1", "done", 400)


def test_progress_is_replaced_with_a_beat_that_moves() -> None:
    storage, beats = MemoryStorage(), []
    view = ProgressView(None, storage, "run1")
    view.begin(SOME[0])
    beats.append(json.loads(storage.read(PROGRESS_PATH)[0])["beat"])
    view.end("stopped", SOME[1])
    last = json.loads(storage.read(PROGRESS_PATH)[0])
    assert last["beat"] > beats[0]
    assert last["state"] == "stopped"
    assert (last["planned"], last["failed"], last["shards_committed"]) == (1200, 3, 4)


@pytest.mark.parametrize("fault", ["fails", "answer_lost", "repeated"])
@pytest.mark.parametrize("at", range(4))
def test_a_storage_that_fails_does_not_stop_a_run_for_its_news(at: int, fault: Any) -> None:
    storage = FaultyStorage(MemoryStorage(), at, fault)
    show(SOME, is_terminal=False, storage=storage)


def test_documents_answered_twice_after_a_death_are_not_more_than_all() -> None:
    assert Counts(planned=100, committed=80, answered=130).done == 100
    assert Counts(planned=100, committed=80, answered=70).done == 80
    assert Counts(planned=100, committed=80, answered=90).done == 90


def test_nothing_was_read_where_nothing_was_written() -> None:
    assert read_progress(MemoryStorage()) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min")],
)
def test_durations_are_written_as_a_person_would(seconds: float, words: str) -> None:
    assert duration(seconds) == words
