"""Make the embedded corpus: held-out Debian package descriptions → `corpus/packages.parquet`.

Run it as `python -m granite_ray.quickstart.make_corpus --lists FOLDER`; README.md says how to fill
the folder. The same index gives the same bytes.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from granite_ray.quickstart.packages import (
    Package,
    first_paragraph,
    is_held_out,
    name_digest,
    read_packages,
    read_release,
)

CORPUS_PATH = Path(__file__).parent / "corpus" / "packages.parquet"
NUM_DOCUMENTS = 1_000
NUM_LONGEST = 100
"""The longest texts come in whatever the lot says, so that chunking can be seen."""
ROW_GROUP_SIZE = 100

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lists", type=Path, required=True, help="folder of apt's lists")
    parser.add_argument("--out", type=Path, default=CORPUS_PATH)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    documents = choose_documents(read_packages(arguments.lists))
    write_corpus(documents, read_release(arguments.lists), arguments.out)
    sections = Counter(package.section for package in documents)
    logger.info("%d documents in %d sections → %s", len(documents), len(sections), arguments.out)


def choose_documents(packages: Sequence[Package]) -> list[Package]:
    """Choose the longest texts and a lot of the others, by name.

    Only held-out packages are chosen from that share no first paragraph with a training package
    (so no whole text either), and of several that share one the first by name.
    """
    trained_on = {first_paragraph(p.text) for p in packages if not is_held_out(p.name)}
    clean: dict[str, Package] = {}
    for package in sorted(packages, key=lambda package: package.name):
        opening = first_paragraph(package.text)
        if is_held_out(package.name) and opening not in trained_on:
            clean.setdefault(opening, package)

    pool = sorted(clean.values(), key=lambda package: (-len(package.text), package.name))
    lot = sorted(pool[NUM_LONGEST:], key=lambda package: name_digest(package.name))
    chosen = pool[:NUM_LONGEST] + lot[: NUM_DOCUMENTS - NUM_LONGEST]
    return sorted(chosen, key=lambda package: package.name)


def write_corpus(documents: Sequence[Package], release: Mapping[str, str], path: Path) -> None:
    """Write the documents with their provenance in the file's schema."""
    columns = {
        "package": [package.name for package in documents],
        "section": [package.section for package in documents],
        "synopsis": [package.synopsis for package in documents],
        "text": [package.text for package in documents],
    }
    provenance: dict[bytes | str, bytes | str] = {
        "origin": f"{release['Origin']} {release['Version']} ({release['Codename']}) main amd64",
        "release_date": release["Date"],
    }
    schema = pa.schema([(name, pa.string()) for name in columns], metadata=provenance)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(columns, schema=schema),
        path,
        compression="zstd",
        compression_level=19,
        row_group_size=ROW_GROUP_SIZE,
    )


if __name__ == "__main__":
    main()
