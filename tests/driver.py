"""A driver in a process of its own, so that a test can kill it.

    python -m tests.driver JOB.json

JOB.json: {"config": …, "options": {…}, "crash": {"call": "replace", "path": "_SUCCESS.json",
"when": "before" | "after", "nth": 1} | null, "trace": folder | null, "hanging": {"folder": …,
"num_hanging": 1, "how": "waits" | "holds_process"} | null, "trace_ranks": folder | null}. Ends with
the run's exit code.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from granite_ray import GraniteRayError, RunOptions, run_job
from granite_ray.cli import leave
from granite_ray.config import parse_config
from granite_ray.engine.factory import make_engine
from granite_ray.io.storage import open_storage
from tests.faults import Death, TracedEngines, TracedRanks, open_faulty
from tests.hangs import HangingEngines


def main(job: dict[str, Any]) -> int:
    """Run the job; only this process dies of a crash, workers see no difference."""
    opener: Any = open_storage
    if job.get("crash"):
        opener = partial(open_faulty, on_call=Death(**job["crash"], only_process=os.getpid()))
    maker: Any = TracedEngines(job["trace"]) if job.get("trace") else make_engine
    if job.get("trace_ranks"):
        maker = TracedRanks(job["trace_ranks"])
    if job.get("hanging"):
        maker = HangingEngines(**job["hanging"])
    try:
        options = RunOptions(**job.get("options", {}))
        config = parse_config(job["config"])
        return run_job(config, options, open_storage=opener, make_engine=maker).exit_code
    except GraniteRayError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    leave(main(json.loads(Path(sys.argv[1]).read_text())))
