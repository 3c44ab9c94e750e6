"""Classify every document of a corpus.

Run it as `python pipelines/classify.py --config configs/classify.yaml`, alone or after
`ray job submit --`; it ends with the job's exit code.
"""

import argparse
import sys

from granite_ray import RunOptions, run_job
from granite_ray.config import load_config
from granite_ray.errors import ConfigError, GraniteRayError

KIND = "classify"


def main() -> int:
    """Run or resume the job and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help=f"YAML file of a {KIND} job")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--limit", type=int, help="read only the first so many documents")
    parser.add_argument("--restart", action="store_true", help="do again what is committed")
    arguments = parser.parse_args()
    options = RunOptions(limit=arguments.limit, restart=arguments.restart)

    try:
        config = load_config(arguments.config, arguments.set)
        if config.task.kind != KIND:
            raise ConfigError(
                f"task.kind is {config.task.kind!r}, but this pipeline runs {KIND!r}. "
                f"Choose a config of that kind, or use `granite-ray run`, which runs any."
            )
        return run_job(config, options).exit_code
    except GraniteRayError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
