"""Package descriptions and changelog entries: what is trained on, and what is held out."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from granite_ray.quickstart.changelogs import ChangelogEntry, is_trained_on, read_changelogs
from granite_ray.quickstart.packages import Package, first_paragraph, is_held_out, read_packages

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Data:
    """Packages with distinct texts, and changelog entries, in two parts."""

    packages: Sequence[Package]
    entries: Sequence[ChangelogEntry]
    held_out_packages: Sequence[Package]
    held_out_entries: Sequence[ChangelogEntry]

    @property
    def labels(self) -> list[str]:
        """Return the sections that there are to choose from."""
        return sorted({package.section for package in self.packages})

    def digest(self) -> str:
        """Return the SHA-256 of what is trained on."""
        digest = hashlib.sha256()
        for package in self.packages:
            digest.update(repr(asdict(package)).encode())
        for entry in self.entries:
            digest.update(repr(asdict(entry)).encode())
        return digest.hexdigest()


def read_data(lists_path: Path, changelogs_path: Path) -> Data:
    """Read packages and changelogs; what is held out repeats nothing of what is trained on.

    Of held-out packages only those count that share no first paragraph with the others, and of
    entries those whose source is held out; neither their source nor their maintainer may be, for
    them to be trained on.
    """
    entries, num_malformed = read_changelogs(changelogs_path)
    data = split_data(read_packages(lists_path), entries)
    logger.info(
        "%d descriptions and %d changelog entries to train on (%d malformed ones left out)",
        *(len(data.packages), len(data.entries), num_malformed),
    )
    return data


def split_data(packages: Sequence[Package], entries: Sequence[ChangelogEntry]) -> Data:
    """Part what is trained on from what is held out, by names."""
    training = {package.text: package for package in packages if not is_held_out(package.name)}
    seen = {first_paragraph(text) for text in training}
    return Data(
        packages=list(training.values()),
        entries=[entry for entry in entries if is_trained_on(entry)],
        held_out_packages=[
            package
            for package in packages
            if is_held_out(package.name) and first_paragraph(package.text) not in seen
        ],
        held_out_entries=[entry for entry in entries if is_held_out(entry.source)],
    )
