"""Collect Debian changelogs from the packages a machine has: one file for each source package.

Run it as `python -m granite_ray.quickstart.collect_changelogs --lists FOLDER --out FOLDER`. It
reads the .deb files that apt has kept and installed packages' documentation; it fetches nothing.
"""

import argparse
import gzip
import logging
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from granite_ray.quickstart.packages import read_maintainers

DEBS_PATH = Path("/var/cache/apt/archives")
DOCS_PATH = Path("/usr/share/doc")
FILE_NAMES = ("changelog.Debian.gz", "changelog.gz")
"""What policy has a package call its Debian changelog: the second name is a native package's."""

FIELDS = r"${Package}\t${source:Package}\t${Maintainer}\n"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BinaryPackage:
    """A package on this machine; `path` is its .deb file or its documentation folder."""

    name: str
    source: str
    maintainer: str
    path: Path


def main(argv: Sequence[str] | None = None) -> None:
    """Write one changelog for every source package that has one here, and say how many they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lists", type=Path, required=True, help="folder of apt's lists")
    parser.add_argument("--debs", type=Path, default=DEBS_PATH, help="folder of .deb files")
    parser.add_argument("--out", type=Path, required=True, help="folder of one file per source")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # Other archives' packages may be here too, some under names that Debian uses; the licence note
    # speaks of Debian's main.
    maintainers = read_maintainers(arguments.lists)
    arguments.out.mkdir(parents=True, exist_ok=True)
    collected: set[str] = set()
    for package in [*list_debs(arguments.debs), *list_installed()]:
        is_debian = maintainers.get(package.name) == package.maintainer
        if not is_debian or package.source in collected:
            continue
        if changelog := read_changelog(package):
            (arguments.out / package.source).write_bytes(changelog)
            collected.add(package.source)
    logger.info("%d changelogs → %s", len(collected), arguments.out)


def list_debs(debs_path: Path) -> list[BinaryPackage]:
    """List the .deb files in a folder, the smallest first.

    A source's packages share a changelog, so the smallest that has it is the quickest to read.
    """
    paths = sorted(debs_path.glob("*.deb"), key=lambda path: (path.stat().st_size, path.name))
    listed = []
    for path in paths:
        fields = _output("dpkg-deb", "--show", f"--showformat={FIELDS}", str(path))
        name, source, maintainer = fields.rstrip("\n").split("\t")
        listed.append(BinaryPackage(name, source, maintainer, path))
    return listed


def list_installed() -> list[BinaryPackage]:
    """List the installed packages by name."""
    lines = _output("dpkg-query", "--show", f"--showformat={FIELDS}").splitlines()
    # A package installed for two architectures is listed twice.
    rows = [line.split("\t") for line in sorted(set(lines))]
    return [
        BinaryPackage(name, source, maintainer, DOCS_PATH / name)
        for name, source, maintainer in rows
    ]


def read_changelog(package: BinaryPackage) -> bytes | None:
    """Return a package's Debian changelog, None where another package of its source has it."""
    if package.path.suffix == ".deb":
        files = _read_deb(package)
    else:
        paths = [package.path / name for name in FILE_NAMES]
        files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    for name in sorted(files):
        changelog = gzip.decompress(files[name])
        # An upstream changelog may bear a native package's name.
        if changelog.startswith(f"{package.source} (".encode()):
            return changelog
    return None


def _read_deb(package: BinaryPackage) -> dict[str, bytes]:
    wanted = {f"./usr/share/doc/{package.name}/{name}" for name in FILE_NAMES}
    command = ["dpkg-deb", "--fsys-tarfile", str(package.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        found = dict(_read_members(process.stdout, wanted))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return found


def _read_members(archive: IO[bytes], wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=archive, mode="r|") as members:
        for member in members:
            if member.name in wanted and member.isfile():
                content = members.extractfile(member)
                assert content is not None
                yield member.name, content.read()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
