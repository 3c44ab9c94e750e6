import gzip
import hashlib
import random
import shutil
import subprocess
from email import message_from_string
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from granite_ray.quickstart import make_changelog_corpus
from granite_ray.quickstart.changelogs import (
    ChangelogEntry,
    closed_bugs,
    is_trained_on,
    named_cves,
    parse_changelog,
    read_changelogs,
)
from granite_ray.quickstart.collect_changelogs import list_debs, read_changelog
from granite_ray.quickstart.make_changelog_corpus import CORPUS_PATH, choose_entries, entry_id
from granite_ray.quickstart.packages import APT_HELPER

SECURITY = """\
hello (1:2.10-3+deb12u1) bookworm-security; urgency=HIGH (see below), binary-only=yes

  [ Ada Lovelace ]
  * Fix CVE-2023-1234 and cve-2023-99999 (patch CVE-2023-1234-1.patch).
  * Closes: #123456, Bug#23456,
    #3456
  * Mentions #999 only; closes: 77.

 -- Ada Maria Lovelace (team) <ada@example.org>  Sat, 10 Jun 2023 08:00:00 +0200
"""
PLAIN = """\
hello-old (0.9-1) stable unstable; urgency=low

  * First packaging.

 -- Bob <bob@example.org>  Mon,  2 Jan 1995 00:35:13 -0400
"""
RELEASE = """\
Origin: Debian
Version: 12.0
Codename: bookworm
Date: Sat, 10 Jun 2023 08:00:00 UTC
MD5Sum:
"""


def is_drawn_for_testing(name: str) -> bool:
    return hashlib.sha256(name.encode()).hexdigest().startswith(("0", "1"))


# parsing ─────────────────────────────────────────────────────────────────────────────────────────


def test_entry_is_read_with_its_values_as_they_are_spelled():
    entries, num_malformed = parse_changelog("hello", f"{SECURITY}\n{PLAIN}")
    assert num_malformed == 0
    assert entries == [
        ChangelogEntry(
            source="hello",
            text=SECURITY.rstrip(),
            package="hello",
            version="1:2.10-3+deb12u1",
            distribution="bookworm-security",
            urgency="HIGH",
            maintainer="Ada Maria Lovelace (team)",
            date="Sat, 10 Jun 2023 08:00:00 +0200",
            bugs=("123456", "23456", "3456", "77"),
            cves=("CVE-2023-1234", "cve-2023-99999"),
        ),
        ChangelogEntry(
            source="hello",
            text=PLAIN.rstrip(),
            package="hello-old",
            version="0.9-1",
            distribution="stable unstable",
            urgency="low",
            maintainer="Bob",
            date="Mon,  2 Jan 1995 00:35:13 -0400",
            bugs=(),
            cves=(),
        ),
    ]
    assert entries[1].body == "  * First packaging."


@pytest.mark.parametrize(
    ("text", "bugs"),
    [
        ("(Closes: #1234)", ("1234",)),
        ("closes:#1,#2, bug#3; CLOSES: 4", ("1", "2", "3", "4")),
        ("Closes: #7. Closes: #7, #8", ("7", "8")),
        ("Closes #5, fixes: #6, encloses nothing", ()),
        ("Closes: lp#9", ()),
    ],
)
def test_bugs_are_closed_as_policy_has_it(text: str, bugs: tuple[str, ...]):
    assert closed_bugs(text) == bugs


def test_one_cve_spelled_in_two_ways_is_named_once():
    assert named_cves("cve-2020-12345, CVE-2020-12345 XCVE-2020-1111 CVE-20-1") == (
        "cve-2020-12345",
    )


@pytest.mark.parametrize(
    "malformed",
    [
        PLAIN.replace(" stable unstable; urgency=low", ""),
        PLAIN.replace("-0400", "noon"),
        PLAIN.replace("Bob <", "<"),
        PLAIN.replace("  * First", "First"),
        PLAIN.replace("First", "F\N{REPLACEMENT CHARACTER}rst"),
        PLAIN.partition(" --")[0],
    ],
)
def test_malformed_entry_is_counted_and_costs_no_other(malformed: str):
    assert malformed != PLAIN
    older = PLAIN.replace("0.9-1", "0.8-1")
    entries, num_malformed = parse_changelog("hello", f"{SECURITY}\n{malformed}\n{older}")
    assert [entry.version for entry in entries] == ["1:2.10-3+deb12u1", "0.8-1"]
    assert num_malformed == 1


@pytest.mark.skipif(shutil.which("dpkg-parsechangelog") is None, reason="needs dpkg-dev")
def test_dpkg_reads_the_same_from_a_changelog(tmp_path: Path):
    path = tmp_path / "changelog"
    path.write_text(f"{SECURITY}\n{PLAIN}")
    command = ["dpkg-parsechangelog", "--all", "--format", "rfc822", "--file", str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    theirs = [message_from_string(stanza) for stanza in output.strip().split("\n\n")]
    ours, _ = parse_changelog("hello", path.read_text())
    for entry, stanza in zip(ours, theirs, strict=True):
        assert entry.package == stanza["Source"]
        assert entry.version == stanza["Version"]
        assert entry.distribution == stanza["Distribution"]
        assert entry.urgency is not None
        assert entry.urgency.lower() == stanza["Urgency"].split()[0].lower()
        assert stanza["Maintainer"].startswith(f"{entry.maintainer} <")
        assert entry.date == stanza["Date"]
        assert set(entry.bugs) == set(stanza.get("Closes", "").split())


# collecting and splitting ────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg")
def test_changelog_is_read_out_of_a_package_and_an_upstream_one_is_not(tmp_path: Path):
    docs = tmp_path / "root" / "usr" / "share" / "doc" / "hello"
    docs.mkdir(parents=True)
    (docs / "changelog.gz").write_bytes(gzip.compress(b"hello 2.10: upstream's news"))
    control = tmp_path / "root" / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text(
        "Package: hello\nSource: greetings (1)\nVersion: 2\nArchitecture: all\n"
        "Maintainer: Ada M. Lovelace <ada@example.org>\nDescription: x\n"
    )
    deb = tmp_path / "hello.deb"
    build = ["dpkg-deb", "--build", "--root-owner-group", str(tmp_path / "root"), str(deb)]
    subprocess.run(build, check=True, capture_output=True)
    (package,) = list_debs(tmp_path)
    assert (package.name, package.source) == ("hello", "greetings")
    assert package.maintainer == "Ada M. Lovelace <ada@example.org>"
    assert read_changelog(package) is None
    changelog = SECURITY.replace("hello", "greetings").encode()
    (docs / "changelog.Debian.gz").write_bytes(gzip.compress(changelog))
    subprocess.run(build, check=True, capture_output=True)
    assert read_changelog(package) == changelog


def write_sources(folder: Path, seed: int) -> None:
    """Write changelogs that share maintainers, and every tenth entry also its changes."""
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(2_000):
        source = f"source-{number}"
        entries = [
            f"{source} ({version}-1) unstable; urgency=medium\n\n"
            f"  * {rng.choice(['A change.', 'Closes: #123.', 'Fix CVE-2020-1234.'])}\n"
            f"  * {rng.randrange(9_000) if rng.random() < 0.9 else 'What others have too.'}\n\n"
            f" -- Person {rng.randrange(300)} <p@example.org>  Sat, 10 Jun 2023 08:00:00 +0000\n"
            for version in range(rng.randrange(1, 6))
        ]
        (folder / source).write_text("\n".join(entries))


def test_text_in_both_parts_stays_in_training(tmp_path: Path):
    names = [f"name-{number}" for number in range(100)]
    held_out = next(name for name in names if is_drawn_for_testing(name))
    trained_on = next(name for name in names if not is_drawn_for_testing(name))
    for name in (held_out, trained_on):
        (tmp_path / name).write_text(SECURITY)
    entries, _ = read_changelogs(tmp_path)
    assert [entry.source for entry in entries] == [trained_on]


def test_folder_without_changelogs_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no changelog.*collect_changelogs"):
        read_changelogs(tmp_path)


def test_chosen_entries_repeat_nothing_of_training(tmp_path: Path):
    write_sources(tmp_path / "sources", seed=1)
    entries, _ = read_changelogs(tmp_path / "sources")
    chosen = choose_entries(entries)
    training = [entry for entry in entries if is_trained_on(entry)]
    assert len(chosen) == make_changelog_corpus.NUM_ENTRIES
    assert all(is_drawn_for_testing(entry.source) for entry in chosen)
    assert {entry.body for entry in chosen}.isdisjoint(entry.body for entry in training)
    assert len({entry_id(entry) for entry in chosen}) == len(chosen)
    sources = [entry.source for entry in chosen]
    assert max(map(sources.count, sources)) == 2
    shuffled = random.Random(2).sample(entries, len(entries))
    assert choose_entries(shuffled) == chosen


@pytest.mark.skipif(not Path(APT_HELPER).exists(), reason="needs apt, as the scripts do")
def test_the_same_changelogs_give_the_same_bytes(tmp_path: Path):
    write_sources(tmp_path / "sources", seed=3)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "mirror_dists_bookworm_InRelease").write_text(RELEASE)
    folders = ["--sources", str(tmp_path / "sources"), "--lists", str(lists)]
    for name in ("one", "two"):
        make_changelog_corpus.main([*folders, "--out", str(tmp_path / name)])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_training_knows_no_held_out_source_or_maintainer(tmp_path: Path):
    write_sources(tmp_path / "sources", seed=3)
    entries, _ = read_changelogs(tmp_path / "sources")
    training = [entry for entry in entries if is_trained_on(entry)]
    held_out = [entry for entry in entries if is_drawn_for_testing(entry.source)]
    for entry in training:
        assert not is_drawn_for_testing(entry.source)
        assert not is_drawn_for_testing(entry.maintainer)
    assert training
    assert held_out
    assert {entry.text for entry in training}.isdisjoint(entry.text for entry in held_out)


# the corpus ──────────────────────────────────────────────────────────────────────────────────────


def test_corpus_holds_what_it_is_to_be_asked_for():
    table = pq.read_table(CORPUS_PATH)
    assert table.column_names == ["entry", "changelog", "truth"]
    rows = table.to_pylist()
    truths = [row["truth"] for row in rows]
    assert len({row["entry"] for row in rows}) == len({row["changelog"] for row in rows}) == 300
    assert sum(bool(truth["bugs"]) for truth in truths) >= 120
    assert sum(bool(truth["cves"]) for truth in truths) >= 45
    assert all(80 <= len(row["changelog"]) <= 6_000 for row in rows)
    assert sum(len(row["changelog"]) > 1_500 for row in rows) >= 10
    for row in rows:
        values = [v for v in row["truth"].values() if isinstance(v, str)]
        values += row["truth"]["bugs"] + row["truth"]["cves"]
        assert all(value in row["changelog"] for value in values)
    assert CORPUS_PATH.stat().st_size < 200_000


def test_corpus_says_where_it_is_from():
    metadata = pq.read_schema(CORPUS_PATH).metadata
    assert metadata[b"origin"] == b"changelogs of Debian bookworm main"
    assert b" 2026 " in metadata[b"release_date"]
