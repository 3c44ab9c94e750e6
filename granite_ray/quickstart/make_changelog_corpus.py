"""Make the changelog corpus: collected changelogs → `corpus/changelogs.parquet`.

Run it as `python -m granite_ray.quickstart.make_changelog_corpus --sources FOLDER --lists FOLDER`;
README.md says how to fill the folders. The same changelogs give the same bytes.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from granite_ray.quickstart.changelogs import ChangelogEntry, is_trained_on, read_changelogs
from granite_ray.quickstart.packages import is_held_out, name_digest, read_release

CORPUS_PATH = Path(__file__).parent / "corpus" / "changelogs.parquet"
NUM_ENTRIES = 300
NUM_CHARACTERS = range(80, 6_001)
ROW_GROUP_SIZE = 100

STRINGS = pa.list_(pa.string())
TRUTH = {
    "package": pa.string(),
    "version": pa.string(),
    "distribution": pa.string(),
    "urgency": pa.string(),
    "bugs": STRINGS,
    "cves": STRINGS,
    "maintainer": pa.string(),
    "date": pa.string(),
}

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=Path, required=True, help="folder of changelogs")
    parser.add_argument("--lists", type=Path, required=True, help="folder of apt's lists")
    parser.add_argument("--out", type=Path, default=CORPUS_PATH)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    entries, num_malformed = read_changelogs(arguments.sources)
    logger.info("%d distinct entries, %d malformed ones left out", len(entries), num_malformed)
    chosen = choose_entries(entries)
    write_corpus(chosen, read_release(arguments.lists), arguments.out)
    logger.info("%d entries → %s", len(chosen), arguments.out)


def choose_entries(entries: Sequence[ChangelogEntry]) -> list[ChangelogEntry]:
    """Choose two entries of each held-out source: one by lot, one rich in CVE ids and bugs.

    Maintainers who do not occur in training go before others. Left out is what repeats the changes
    of a training entry under another header, and all but one entry of the same id.
    """
    trained_on = [entry for entry in entries if is_trained_on(entry)]
    changes = {entry.body for entry in trained_on}
    maintainers = {entry.maintainer for entry in trained_on}
    pool = {
        entry_id(entry): entry
        for entry in entries
        if is_held_out(entry.source)
        and len(entry.text) in NUM_CHARACTERS
        and entry.body not in changes
    }

    def draw(entry: ChangelogEntry) -> tuple[bool, str]:
        return entry.maintainer in maintainers, name_digest(entry_id(entry))

    def draw_rich(entry: ChangelogEntry) -> tuple[bool, bool, bool, str]:
        is_known, lot = draw(entry)
        return not entry.cves, is_known, not entry.bugs, lot

    def draw_last(entry: ChangelogEntry) -> tuple[bool, str]:
        is_known, lot = draw(entry)
        return is_known and not entry.cves, lot

    chosen: list[ChangelogEntry] = []
    by_source = sorted(pool.values(), key=lambda entry: entry.source)
    for _, group in groupby(by_source, key=lambda entry: entry.source):
        first, *others = sorted(group, key=draw)
        chosen += [first, *sorted(others, key=draw_rich)[:1]]
    return sorted(sorted(chosen, key=draw_last)[:NUM_ENTRIES], key=entry_id)


def entry_id(entry: ChangelogEntry) -> str:
    """Return what tells an entry from all others, such as `hello_2.10-3`."""
    return f"{entry.package}_{entry.version}"


def write_corpus(entries: Sequence[ChangelogEntry], release: Mapping[str, str], path: Path) -> None:
    """Write the chosen entries and their truth, with their provenance in the file's schema."""
    fields = [
        ("entry", pa.string()),
        ("changelog", pa.string()),
        ("truth", pa.struct(TRUTH.items())),
    ]
    provenance: dict[bytes | str, bytes | str] = {
        "origin": f"changelogs of {release['Origin']} {release['Codename']} main",
        "release_date": release["Date"],
    }
    rows = [
        {
            "entry": entry_id(entry),
            "changelog": entry.text,
            "truth": {name: getattr(entry, name) for name in TRUTH},
        }
        for entry in entries
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=pa.schema(fields, metadata=provenance)),
        path,
        compression="zstd",
        compression_level=19,
        row_group_size=ROW_GROUP_SIZE,
    )


if __name__ == "__main__":
    main()
