"""`task.labels` as levels: a list is one level, a tree has one for each label with sub-labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from granite_ray.config import ClassifyConfig
from granite_ray.errors import ConfigError

Path = tuple[str, ...]
"""The labels from the root down to one."""


@dataclass(frozen=True, slots=True)
class LabelLevel:
    """The labels to choose from below `path`."""

    path: Path
    names: tuple[str, ...]


def label_levels(labels: Sequence[str] | dict[str, Any]) -> dict[Path, LabelLevel]:
    """Return every level by its path; the root's is `()`."""
    levels: dict[Path, LabelLevel] = {}

    def add(path: Path, below: Sequence[str] | dict[str, Any]) -> None:
        levels[path] = LabelLevel(path, tuple(below))
        if isinstance(below, dict):
            for name, further in below.items():
                _check_name(name)
                if further:
                    add((*path, name), further)
        elif path:
            for name in below:
                _check_name(name)

    add((), labels)
    return levels


def leaf_paths(levels: dict[Path, LabelLevel]) -> list[Path]:
    """Return the paths of the labels that have no sub-labels, in the order of the config."""
    paths = [(*level.path, name) for level in levels.values() for name in level.names]
    return [path for path in paths if path not in levels]


def example_paths(config: ClassifyConfig, levels: dict[Path, LabelLevel]) -> list[set[Path]]:
    """Return the labels of each of `task.examples`, as paths.

    An output names one leaf; with `task.multi_label` any number of them, separated by commas.
    """
    known = {"/".join(path): path for path in leaf_paths(levels)}
    found = []
    for index, example in enumerate(config.examples):
        output = example.output
        if not isinstance(output, str):
            raise ConfigError(f"task.examples[{index}].output must be a label, not an object.")
        names = [output]
        if config.multi_label:
            names = [name.strip() for name in output.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"task.examples[{index}].output {name!r} is none of task.labels. "
                    f"Choose from: {', '.join(known)}."
                )
        found.append({known[name] for name in names})
    return found


def _check_name(name: str) -> None:
    if "/" in name:
        raise ConfigError(
            f"task.labels has {name!r}: in a tree of labels, '/' stands between the levels. "
            "Write the label without it."
        )
