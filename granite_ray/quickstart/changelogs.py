"""Debian changelogs → entries with their fields: what training and the changelog corpus share.

The format is that of deb-changelog(5); how an entry closes bugs is Debian policy's (section 4.4).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from granite_ray.quickstart.packages import is_held_out

HEADER = re.compile(
    r"(?P<package>[a-z0-9][a-z0-9+.-]*) \((?P<version>[^()\s]+)\)"
    r" +(?P<distribution>[a-z0-9][a-z0-9+. -]*?) *;(?P<metadata>.*)",
    re.IGNORECASE,
)
URGENCY = re.compile(r"\burgency *= *([a-z0-9-]+)", re.IGNORECASE)
TRAILER = re.compile(
    r" -- (?P<maintainer>\S.*?) <[^<>]*>  ?"
    r"(?P<date>(?:\w{3}, *)?\d{1,2} +\w+ +\d{4} +\d{1,2}:\d\d:\d\d +[+-]\d{4})(?: +\([^()]*\))?\s*"
)
CLOSES = re.compile(r"closes:\s*(?:bug)?#?\s?\d+(?:,\s*(?:bug)?#?\s?\d+)*", re.IGNORECASE)
CVE = re.compile(r"\bCVE-\d{4}-\d{4,}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ChangelogEntry:
    """One entry; every value but `source` stands in `text` as it is spelled here.

    `text` runs from header to trailer. `package` differs from `source` where a source was renamed.
    `urgency` is without the comment that may follow it, `maintainer` without the address.
    `bugs` are the numbers that the entry closes and `cves` the ids it names: distinct, in order.
    """

    source: str
    text: str
    package: str
    version: str
    distribution: str
    urgency: str | None
    maintainer: str
    date: str
    bugs: tuple[str, ...]
    cves: tuple[str, ...]

    @property
    def body(self) -> str:
        """The changes alone, without header and trailer."""
        return self.text.partition("\n")[2].rpartition("\n")[0].strip("\n")


def read_changelogs(sources_path: Path) -> tuple[list[ChangelogEntry], int]:
    """Read a folder of changelogs named by source, in its names' order.

    Returns:
        the entries with distinct texts, each under the first source that has it, and how many
        others were malformed. What is held out holds no text that is trained on.
    """
    # Training comes first, so that a text in both parts stays there.
    paths = sorted(sources_path.iterdir(), key=lambda path: (is_held_out(path.name), path.name))
    if not paths:
        raise FileNotFoundError(
            f"{sources_path} has no changelog, but at least one is needed. "
            f"Fill it with collect_changelogs, as the quickstart README says."
        )
    entries: dict[str, ChangelogEntry] = {}
    num_malformed = 0
    for path in paths:
        # Old entries may be in other encodings: the mark of a bad byte then drops those only.
        changelog = path.read_bytes().decode(errors="replace")
        parsed, num_bad = parse_changelog(path.name, changelog)
        num_malformed += num_bad
        for entry in parsed:
            entries.setdefault(entry.text, entry)
    return sorted(entries.values(), key=lambda entry: entry.source), num_malformed


def parse_changelog(source: str, changelog: str) -> tuple[list[ChangelogEntry], int]:
    """Return a changelog's entries in its order, and how many others were malformed.

    An entry is malformed if it lacks a header or trailer in the format, holds an unindented line,
    or has bytes that are not UTF-8.
    """
    entries: list[ChangelogEntry] = []
    num_malformed = 0
    lines: list[str] = []
    for line in changelog.split("\n"):
        if line.startswith(" --"):
            entry = parse_entry(source, [*lines, line])
            if entry is None:
                num_malformed += 1
            else:
                entries.append(entry)
            lines = []
        elif HEADER.fullmatch(line):
            num_malformed += bool(lines)
            lines = [line]
        elif lines:
            lines.append(line)
    return entries, num_malformed + bool(lines)


def parse_entry(source: str, lines: list[str]) -> ChangelogEntry | None:
    """Read one entry from its lines, None if it is malformed."""
    header = HEADER.fullmatch(lines[0])
    trailer = TRAILER.fullmatch(lines[-1])
    text = "\n".join(lines).rstrip()
    indented = all(line[:1] in ("", " ", "\t") for line in lines[1:])
    if header is None or trailer is None or not indented or "\N{REPLACEMENT CHARACTER}" in text:
        return None
    urgency = URGENCY.search(header["metadata"])
    return ChangelogEntry(
        source=source,
        text=text,
        package=header["package"],
        version=header["version"],
        distribution=header["distribution"],
        urgency=urgency[1] if urgency else None,
        maintainer=trailer["maintainer"],
        date=trailer["date"],
        bugs=closed_bugs(text),
        cves=named_cves(text),
    )


def is_trained_on(entry: ChangelogEntry) -> bool:
    """Tell whether an entry may be trained on: neither its source nor its maintainer is held out.

    Few people maintain many packages: without the second condition most names that a held-out entry
    is to be asked for would be known from training.
    """
    return not is_held_out(entry.source) and not is_held_out(entry.maintainer)


def closed_bugs(text: str) -> tuple[str, ...]:
    """Return the bug numbers that a text closes, each once."""
    closes = CLOSES.findall(text)
    return tuple(dict.fromkeys(number for c in closes for number in re.findall(r"\d+", c)))


def named_cves(text: str) -> tuple[str, ...]:
    """Return the CVE ids in a text, each once, as it is spelled first."""
    spelled: dict[str, str] = {}
    for cve in CVE.findall(text):
        spelled.setdefault(cve.upper(), cve)
    return tuple(spelled.values())
