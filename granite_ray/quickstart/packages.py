"""Debian's package index → packages with their long descriptions: what corpus and tokenizer share.

Reads the lists that `apt-get update` left in a folder; it fetches nothing.
"""

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUITE = "bookworm"
"""Debian 12; its `main` holds free software only."""
HELD_OUT_DIGITS = "01"
"""Names whose SHA-256 begins so, one in eight, are never trained on."""
APT_HELPER = "/usr/lib/apt/apt-helper"


@dataclass(frozen=True, slots=True)
class Package:
    """One binary package; `text` is its long description, paragraphs parted by empty lines."""

    name: str
    section: str
    synopsis: str
    text: str


def read_packages(lists_path: Path) -> list[Package]:
    """Return the packages of the suite's main archive that have a long description, by name."""
    index = _read_list(lists_path, f"{SUITE}_main_binary-amd64_Packages")
    translation = _read_list(lists_path, f"{SUITE}_main_i18n_Translation-en")
    return join_descriptions(index, translation)


def read_maintainers(lists_path: Path) -> dict[str, str]:
    """Return the maintainer of every package of the suite's main archive by its name."""
    index = _read_list(lists_path, f"{SUITE}_main_binary-amd64_Packages")
    return {stanza["Package"]: stanza["Maintainer"] for stanza in parse_stanzas(index)}


def read_release(lists_path: Path) -> dict[str, str]:
    """Return the head of the suite's signed Release file: its version and date among others."""
    release = _read_list(lists_path, f"{SUITE}_InRelease")
    head = release[release.index("Origin:") :].partition("MD5Sum:")[0]
    return next(parse_stanzas(head))


def join_descriptions(index: str, translation: str) -> list[Package]:
    """Join a Packages index with the English descriptions, which stand in a file of their own."""
    descriptions = {
        (stanza["Package"], stanza["Description-md5"]): stanza["Description-en"]
        for stanza in parse_stanzas(translation)
    }
    packages: dict[str, Package] = {}
    for stanza in parse_stanzas(index):
        name = stanza["Package"]
        description = descriptions.get((name, stanza.get("Description-md5", "")), "")
        synopsis, text = split_description(description)
        # An archive may hold two versions of a name; the first one listed stands for both.
        if text and name not in packages:
            packages[name] = Package(name, stanza["Section"], synopsis, text)
    return [packages[name] for name in sorted(packages)]


def parse_stanzas(index: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each stanza; lines that go on a field keep their first space."""
    for stanza in index.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith(" "):
                fields[name] += f"\n{line}"
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def split_description(description: str) -> tuple[str, str]:
    """Split a Description field into the synopsis and the text, its markup undone.

    Each line of the text is marked by one space, and a lone dot stands for an empty line.
    """
    synopsis, *lines = description.split("\n")
    unmarked = [line.removeprefix(" ").rstrip() for line in lines]
    return synopsis, "\n".join("" if line == "." else line for line in unmarked).strip("\n")


def first_paragraph(text: str) -> str:
    """Return the text up to its first empty line: what packages of one source often share."""
    return text.partition("\n\n")[0]


def name_digest(name: str) -> str:
    """Return the hexadecimal SHA-256 of a package's name, which draws lots for it."""
    return hashlib.sha256(name.encode()).hexdigest()


def is_held_out(name: str) -> bool:
    """Tell whether a package is kept from training."""
    return name_digest(name)[0] in HELD_OUT_DIGITS


def _read_list(lists_path: Path, name: str) -> str:
    """Read one file of apt's lists, whatever it is compressed with."""
    found = sorted(lists_path.glob(f"*_dists_{name}*"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{lists_path} has {len(found)} files *_dists_{name}*, but exactly one is needed. "
            f"Fill it as the quickstart README says, with Acquire::Languages=en."
        )
    command = [APT_HELPER, "cat-file", str(found[0])]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode()
