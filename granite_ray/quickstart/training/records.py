"""What a piece of a changelog says, as the record that a model is to write."""

from granite_ray.quickstart.changelogs import (
    HEADER,
    TRAILER,
    URGENCY,
    closed_bugs,
    named_cves,
)

ENTRY_FIELDS = (
    ("package", False),
    ("version", False),
    ("distribution", False),
    ("urgency", False),
    ("bugs", True),
    ("cves", True),
    ("maintainer", False),
    ("date", False),
)
"""Fields of a changelog entry in the order of its text, and whether each is a list."""


def record_of(text: str) -> dict[str, object]:
    """Return the first of each value and all bugs and CVE ids, as spelled; null where absent."""
    lines = text.split("\n")
    header = next((found for line in lines if (found := HEADER.fullmatch(line))), None)
    trailer = next((found for line in lines if (found := TRAILER.fullmatch(line))), None)
    urgency = URGENCY.search(header["metadata"]) if header else None
    record: dict[str, object] = {
        "package": header["package"] if header else None,
        "version": header["version"] if header else None,
        "distribution": header["distribution"] if header else None,
        "urgency": urgency[1] if urgency else None,
        "bugs": list(closed_bugs(text)),
        "cves": list(named_cves(text)),
        "maintainer": trailer["maintainer"] if trailer else None,
        "date": trailer["date"] if trailer else None,
    }
    return {name: record[name] for name, _ in ENTRY_FIELDS}
