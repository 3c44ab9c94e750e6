"""Fill the model cache: download checkpoints from the hub and check each file's digest.

    python fill.py models.json /models

models.json: {"models": [{"repository": "ibm-granite/granite-4.0-h-tiny", "revision": <commit>,
"sha256": {"model.safetensors": <hex>, …}}]}. A checkpoint appears in /models/<name> once all of
its files agree; one that is there is checked again, and not downloaded.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Download = Callable[[str, str, list[str], Path], None]


def main(arguments: list[str], download: Download | None = None) -> int:
    """Fill the cache; return 1 where a file is not the one that was asked for."""
    listed, cache = json.loads(Path(arguments[0]).read_text()), Path(arguments[1])
    problems: list[str] = []
    for model in listed["models"]:
        problems += fill(model, cache, download or download_files)
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if problems else 0


def fill(model: dict[str, Any], cache: Path, download: Download) -> list[str]:
    """Make one checkpoint appear; return what is wrong with it."""
    place = cache / model["repository"].rpartition("/")[2]
    if place.exists():
        return wrong_files(place, model["sha256"])
    arriving = place.with_name(f".{place.name}.arriving")
    download(model["repository"], model["revision"], sorted(model["sha256"]), arriving)
    problems = wrong_files(arriving, model["sha256"])
    if not problems:
        arriving.rename(place)
    return problems


def wrong_files(folder: Path, digests: dict[str, str]) -> list[str]:
    """Compare files with their digests."""
    problems = []
    for name, wanted in sorted(digests.items()):
        path = folder / name
        found = digest(path) if path.is_file() else "missing"
        if found != wanted:
            problems.append(f"{path}: its SHA-256 is {found}, models.json says {wanted}")
    return problems


def digest(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_files(repository: str, revision: str, names: list[str], folder: Path) -> None:
    """Download the listed files of one revision, and no other."""
    from huggingface_hub import snapshot_download

    snapshot_download(repository, revision=revision, allow_patterns=names, local_dir=folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
