"""Changelog entries under other names: values replaced everywhere, so that they must be copied.

A model that has seen each maintainer a hundred times learns names; one that never sees a value
twice learns to look.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from granite_ray.quickstart.changelogs import (
    CVE,
    HEADER,
    TRAILER,
    ChangelogEntry,
    closed_bugs,
    named_cves,
)

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DISTRIBUTIONS = (
    *("unstable", "unstable", "experimental", "bookworm-security", "bullseye", "buster-security"),
    *("stable", "testing", "sid", "bookworm", "trixie", "bullseye-backports", "frozen unstable"),
    *("jammy", "focal", "UNRELEASED", "stable-security", "bookworm-proposed-updates"),
)
URGENCIES = ("low", "medium", "high", "emergency", "critical")
SYLLABLES = (
    *("an", "ber", "cor", "da", "el", "fri", "ga", "hol", "in", "jo", "ka", "lu", "mar", "ne"),
    *("os", "pe", "qui", "ro", "san", "ti", "ul", "vic", "wen", "xa", "yo", "zi", "th", "sk"),
)


@dataclass(frozen=True, slots=True)
class Disguise:
    """Draws values for entries; `names` are package names and `people` maintainers to draw from."""

    names: Sequence[str]
    people: Sequence[str]

    def wear(self, entry: ChangelogEntry, lot: random.Random) -> ChangelogEntry:
        """Return the entry with its values replaced consistently, sometimes with more of them."""
        head, *body, tail = entry.text.split("\n")
        header, trailer = HEADER.fullmatch(head), TRAILER.fullmatch(tail)
        assert header, "an entry begins with its header"
        assert trailer, "an entry ends with its trailer"
        package, version = self._package(lot), _version(lot)
        distribution = header["distribution"] if lot.random() < 0.5 else lot.choice(DISTRIBUTIONS)
        metadata, urgency = header["metadata"], entry.urgency
        if urgency and lot.random() < 0.5:
            urgency = lot.choice(URGENCIES)
            metadata = f" urgency={urgency}"
        head = f"{package} ({version}) {distribution};{metadata}"
        maintainer, date = self._person(lot), _date(lot)
        address = f"{_word(lot)}@{_word(lot)}.{lot.choice(('org', 'net', 'com', 'de'))}"
        tail = f" -- {maintainer} <{address}>  {date}"
        text = "\n".join([head, *_renumbered(_enriched(body, lot), lot), tail])
        return replace(
            entry,
            text=text,
            package=package,
            version=version,
            distribution=distribution,
            urgency=urgency,
            maintainer=maintainer,
            date=date,
            bugs=closed_bugs(text),
            cves=named_cves(text),
        )

    def _package(self, lot: random.Random) -> str:
        name = lot.choice(self.names)
        match lot.randrange(4):
            case 0:
                return f"{name}-{_word(lot)}"
            case 1:
                return f"{_word(lot)}{lot.choice(('', '-', '+'))}{lot.randrange(20) or ''}"
            case _:
                return name

    def _person(self, lot: random.Random) -> str:
        first = lot.choice(self.people).split()
        last = lot.choice(self.people).split()
        match lot.randrange(3):
            case 0:
                return f"{first[0]} {last[-1]}"
            case 1:
                return f"{_word(lot).title()} {_word(lot).title()}"
            case _:
                return " ".join([first[0], f"{lot.choice('ABCDEFGHJKLMNPRSTVW')}.", last[-1]])


def _word(lot: random.Random) -> str:
    return "".join(lot.choice(SYLLABLES) for _ in range(lot.randint(1, 3)))


def _version(lot: random.Random) -> str:
    number = ".".join(str(lot.randrange(10 ** lot.randint(1, 2))) for _ in range(lot.randint(1, 4)))
    if lot.random() < 0.15:
        number = f"{lot.randint(1990, 2026)}{lot.randint(1, 12):02}{lot.randint(1, 28):02}"
    epoch = f"{lot.randint(1, 4)}:" if lot.random() < 0.1 else ""
    extra = lot.choice(
        ("", "", "", "", "+dfsg", "~rc1", "+ds1", "~beta2", f"+git{lot.randrange(10**6)}")
    )
    ending = lot.choice(
        ("", "", "", "", ".1", "+b1", "~bpo11+1", "+deb12u2", "ubuntu3", "+deb11u1")
    )
    debian = f"-{lot.randint(1, 30)}{ending}" if lot.random() < 0.9 else ""
    return f"{epoch}{number}{extra}{debian}"


def _date(lot: random.Random) -> str:
    day = f"{lot.randint(1, 28):02}" if lot.random() < 0.85 else f"{lot.randint(1, 9)}"
    time = f"{lot.randrange(24):02}:{lot.randrange(60):02}:{lot.randrange(60):02}"
    zone = f"{lot.choice('+-')}{lot.randrange(12):02}{lot.choice(('00', '00', '30'))}"
    when = f"{day} {lot.choice(MONTHS)} {lot.randint(1996, 2026)} {time} {zone}"
    return f"{lot.choice(DAYS)}, {when}"


def _enriched(body: list[str], lot: random.Random) -> list[str]:
    """Add bugs or CVE ids to some lines: few entries have any."""
    body = list(body)
    changes = [index for index, line in enumerate(body) if line.lstrip().startswith(("*", "-"))]
    if changes and lot.random() < 0.25:
        bugs = ", ".join(
            f"#{lot.randrange(10**5, 10**6)}" for _ in range(lot.choice((1, 1, 1, 2, 3)))
        )
        closes = lot.choice(("Closes:", "Closes:", "closes:", "CLOSES:"))
        body[lot.choice(changes)] += lot.choice((f" ({closes} {bugs})", f" {closes} {bugs}."))
    if changes and lot.random() < 0.25:
        for _ in range(lot.choice((1, 1, 2, 3, 5))):
            cve = f"CVE-{lot.randint(1999, 2026)}-{lot.randrange(1000, 60000):04}"
            at = lot.choice(changes)
            form = lot.choice(
                ("{line} ({cve})", "    - {cve}: {line}", "  * {line}, {cve}.", "{line} [{cve}]")
            )
            line = body[at].strip(" *-") if form.startswith(" ") else body[at]
            body.insert(at + 1, form.format(line=line, cve=cve))
    return body


def _renumbered(body: Sequence[str], lot: random.Random) -> list[str]:
    """Replace bug numbers and CVE ids, each by the same one wherever it stands."""
    text = "\n".join(body)
    for bug in closed_bugs(text):
        text = re.sub(rf"\b{bug}\b", str(lot.randrange(10**4, 1_200_000)), text)
    numbers: dict[str, str] = {}

    def other(match: re.Match[str]) -> str:
        prefix, year, number = match[0].split("-")
        drawn = numbers.setdefault(
            f"{year}-{number}", f"{lot.randint(1999, 2026)}-{lot.randrange(1000, 60000):04}"
        )
        return f"{prefix}-{drawn}"

    return CVE.sub(other, text).split("\n")
