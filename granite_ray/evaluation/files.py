"""Where an evaluation is kept: `evaluation.json` and `evaluation.html`."""

from granite_ray.errors import ConfigError, StorageDeniedError
from granite_ray.evaluation.findings import Evaluation
from granite_ray.evaluation.page import page
from granite_ray.io.storage import Storage
from granite_ray.report import replace_always

DEFAULT_FOLDER = "_granite"
"""Below `sink.path`, beside the report."""


def write_evaluation(storage: Storage, evaluation: Evaluation) -> list[str]:
    """Write both files, replacing those of the last evaluation; return where they are.

    Raises:
        ConfigError: The folder may not be written.
    """
    contents = {"evaluation.json": evaluation.to_json(), "evaluation.html": page(evaluation)}
    try:
        for name, content in contents.items():
            replace_always(storage, name, content.encode())
    except StorageDeniedError as error:
        raise ConfigError(
            f"{storage.root} cannot be written: {error} Choose another folder with --out."
        ) from error
    return [f"{storage.root}/{name}" for name in contents]
