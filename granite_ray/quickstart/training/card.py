"""The embedded checkpoint's model card, from what its training and evaluations left.

`python -m granite_ray.quickstart.training.card --work … --evaluations FILE… --out …` writes it
anew with the figures of `granite-ray eval`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from granite_ray.errors import ConfigError
from granite_ray.quickstart.make_tokenizer import CHECKPOINT_PATH
from granite_ray.quickstart.training.run import LOG_FILE
from granite_ray.quickstart.training.summary import read_summary

CARD_FILE = "README.md"
KINDS = ("section", "synopsis", "entry")
MAX_POINTS = 8
"""Rows of the learning curve."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one evaluation, as the card shows it."""

    task: str
    truth: str
    num_documents: str
    about: str
    value: str


def main(argv: Sequence[str] | None = None) -> None:
    """Write the card."""
    parser = argparse.ArgumentParser(prog=f"{__package__}.card", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training")
    parser.add_argument(
        "--evaluations", type=Path, nargs="*", default=[], help="evaluation.json of jobs"
    )
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINT_PATH, help="folder of the checkpoint"
    )
    arguments = parser.parse_args(argv)
    try:
        write_card(arguments.work, arguments.out, arguments.evaluations)
    except (ConfigError, FileNotFoundError) as error:
        parser.error(str(error))


def write_card(work_path: Path, out_path: Path, evaluations: Sequence[Path]) -> None:
    """Write the card beside a checkpoint.

    Args:
        work_path: The folder in which the training has ended.
        out_path: The checkpoint.
        evaluations: The `evaluation.json` of jobs that ran on it.

    Raises:
        ConfigError: A file is not what it should be.
        FileNotFoundError: A file is missing.
    """
    environment = Environment(
        loader=PackageLoader("granite_ray.quickstart.training", "."),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template("card.md.jinja").render(
        summary=read_summary(work_path),
        config=json.loads((out_path / "config.json").read_text(encoding="utf-8")),
        kinds=KINDS,
        curve=learning_curve(work_path / LOG_FILE),
        evaluations=[figure for path in evaluations for figure in figures_of(path)],
        millions=lambda number: f"{number / 1e6:.1f}",
    )
    (out_path / CARD_FILE).write_text(card, encoding="utf-8")


def learning_curve(log_path: Path) -> list[dict[str, Any]]:
    """Return the log's lines about held-out texts, some of them if there are many, in order."""
    lines = map(json.loads, log_path.read_text(encoding="utf-8").splitlines())
    # A training that went on after a stop repeats the steps since it was saved.
    by_step = {line["step"]: line for line in lines if "held out" in line}
    points = [by_step[step] for step in sorted(by_step)]
    every = -(-len(points) // MAX_POINTS) or 1
    return points[::-1][::every][::-1]


def figures_of(path: Path) -> Iterator[Figure]:
    """Yield the figures of an `evaluation.json` that are defined.

    Raises:
        ConfigError: It is another file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        task, truth, rows, metrics = (found[k] for k in ("task", "truth", "rows", "metrics"))
        task += ", a job that had not ended" if found["is_partial"] else ""
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--evaluations {path} is no evaluation. Give the evaluation.json that granite-ray "
            "eval wrote."
        ) from error
    for name, metric in metrics.items():
        if metric["value"] is not None:
            value = f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
            about = f"{name.replace('_', ' ')}: {metric['about']}"
            yield Figure(task, truth, f"{rows['measured']:,}", about, value)


if __name__ == "__main__":
    main()
