"""A night: several jobs over one corpus, for one date and for missed ones before it."""

from collections.abc import Callable, Sequence
from datetime import date, timedelta

from rich.console import Console

from granite_ray.config import JobConfig
from granite_ray.errors import ConfigError
from granite_ray.io.commit import read_snapshot
from granite_ray.io.storage import open_storage
from granite_ray.job import EndedJob, RunOptions, run_jobs

MILDEST_FIRST = (0, 3, 75, 6, 5, 4, 2, 1, 130, 143)
"""Exit codes in the order in which one of several stands for all: what must not be tried again, or
not yet, hides that another could be."""

LoadConfigs = Callable[[date], Sequence[JobConfig]]


def run_night(
    load_configs: LoadConfigs,
    day: date,
    options: RunOptions,
    *,
    catch_up: int = 0,
    console: Console | None = None,
) -> list[EndedJob]:
    """Run the jobs of missed dates, the oldest first, then those of `day`; return how each ended.

    Args:
        load_configs: Loads the jobs of a date.
        day: The logical date of this night.
        options: What is asked of each job.
        catch_up: How many dates before `day` to look at for outputs that are not complete.
        console: Where progress is shown.

    Raises:
        ConfigError: If a job is refused before any of its date has begun.
    """
    nights = [(at, load_configs(at)) for at in (*earlier_dates(day, catch_up), day)]
    if catch_up and not _differ([configs for _, configs in nights]):
        raise ConfigError(
            f"--catch-up {catch_up} looks for dates without a complete output, and some sink.path "
            "is the same for all dates. Put {date} into every sink.path, or leave it out."
        )
    ended: list[EndedJob] = []
    for at, configs in nights:
        if at == day or not all(is_complete(config) for config in configs):
            ended += run_jobs(configs, options, console=console)
            if ended[-1].exit_code > 128:  # told to stop
                break
    return ended


def earlier_dates(day: date, count: int) -> list[date]:
    """Return the `count` dates before a day, the oldest first."""
    return [day - timedelta(days=back) for back in range(count, 0, -1)]


def is_complete(config: JobConfig) -> bool:
    """Tell whether a run of this job has come to its end before."""
    return read_snapshot(open_storage(config.sink.path)) is not None


def worst_code(ended: Sequence[EndedJob]) -> int:
    """Return the exit code that stands for several jobs."""
    return max((job.exit_code for job in ended), key=MILDEST_FIRST.index)


def _differ(nights: Sequence[Sequence[JobConfig]]) -> bool:
    """Tell whether no two of these jobs have the same output."""
    paths = [config.sink.path for configs in nights for config in configs]
    return len(set(paths)) == len(paths)
