"""Run the quickstart jobs one after another on one Ray, then show what came out.

    python -m granite_ray.quickstart configs/quickstart*.yaml

Each is a job as `granite-ray run` runs it; here they share the time that Ray takes to start.
"""

import argparse
import sys
from collections.abc import Sequence

from granite_ray.cluster import Cluster
from granite_ray.config import load_config
from granite_ray.job import RunOptions, run_job
from granite_ray.progress import default_console
from granite_ray.quickstart.show import show
from granite_ray.report import closing_words


def main(argv: Sequence[str] | None = None) -> int:
    """Run and show; return the worst exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", help="YAML files of jobs on the embedded corpora")
    arguments = parser.parse_args(argv)
    configs = [load_config(path) for path in arguments.configs]
    console = default_console()
    codes = []
    with Cluster(configs[0].job, configs[0].engine) as cluster:
        cluster.start()
        for path, config in zip(arguments.configs, configs, strict=True):
            console.rule(f"granite-ray run {path}", align="left", characters="─")
            report = run_job(config, RunOptions(allow_failed=True), console=console)
            console.print(closing_words(report), soft_wrap=True)
            codes.append(report.exit_code)
    for config in configs:
        console.rule(f"{config.task.kind}: {config.task.instruction}", align="left")
        show(config, console)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
