import hashlib
import itertools
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from granite_ray.config import ClassifyConfig, load_config
from granite_ray.quickstart import make_corpus, make_tokenizer
from granite_ray.quickstart.changelogs import parse_changelog
from granite_ray.quickstart.make_corpus import CORPUS_PATH, choose_documents
from granite_ray.quickstart.packages import (
    APT_HELPER,
    Package,
    join_descriptions,
    read_packages,
    split_description,
)

REPOSITORY = Path(__file__).parents[3]

INDEX = """\
Package: hello
Version: 2.10-3
Depends: libc6 (>= 2.34),
 libm
Description: example package
Description-md5: aa
Section: devel

Package: hello
Description-md5: bb
Section: devel

Package: bare
Description-md5: cc
Section: misc
"""
TRANSLATION = """\
Package: hello
Description-md5: aa
Description-en: example package based on GNU hello
 It greets the world:
   * politely
 .
 And leaves.

Package: hello
Description-md5: bb
Description-en: older
 Older.

Package: bare
Description-md5: cc
Description-en: nothing more to say
"""
CHANGELOG = """\
{source} (2.10-3) unstable; urgency=medium

  * Greet {maintainer}. (Closes: #123456)

 -- {maintainer} <person@example.org>  Tue, 02 Mar 2021 10:11:12 +0100
"""
RELEASE = """\
-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA256

Origin: Debian
Version: 12.0
Codename: bookworm
Date: Sat, 10 Jun 2023 08:00:00 UTC
MD5Sum:
 00 1 main/Contents
"""


def is_drawn_for_testing(name: str) -> bool:
    return hashlib.sha256(name.encode()).hexdigest().startswith(("0", "1"))


# the package index ───────────────────────────────────────────────────────────────────────────────


def test_description_markup_becomes_plain_paragraphs():
    synopsis, text = split_description("a tool\n First line\n goes on.\n .\n   verbatim\n Last.")
    assert synopsis == "a tool"
    assert text == "First line\ngoes on.\n\n  verbatim\nLast."


def test_index_is_joined_with_the_description_of_the_same_version():
    assert join_descriptions(INDEX, TRANSLATION) == [
        Package(
            name="hello",
            section="devel",
            synopsis="example package based on GNU hello",
            text="It greets the world:\n  * politely\n\nAnd leaves.",
        )
    ]


def test_folder_without_lists_is_refused_by_name(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has 0 files .*Packages.*Acquire::Languages=en"):
        read_packages(tmp_path)


# the corpus ──────────────────────────────────────────────────────────────────────────────────────


def test_corpus_holds_a_thousand_distinct_documents(corpus: dict[str, list[str]]):
    assert list(corpus) == ["package", "section", "synopsis", "text"]
    assert len(corpus["package"]) >= 1_000
    assert len(set(corpus["package"])) == len(corpus["package"])
    assert len(set(corpus["text"])) == len(corpus["text"])
    assert all(value.strip() for column in corpus.values() for value in column)
    assert CORPUS_PATH.stat().st_size < 1_000_000


def test_corpus_holds_held_out_packages_only(corpus: dict[str, list[str]]):
    assert all(is_drawn_for_testing(name) for name in corpus["package"])


def test_corpus_is_free_of_index_markup(corpus: dict[str, list[str]]):
    lines = [line for text in corpus["text"] for line in text.split("\n")]
    assert all(line.strip() != "." for line in lines)
    assert any("\n\n" in text for text in corpus["text"])


def test_corpus_says_where_it_is_from():
    metadata = pq.read_schema(CORPUS_PATH).metadata
    assert metadata[b"origin"].startswith(b"Debian 12.")
    assert b" 2026 " in metadata[b"release_date"]


def test_quickstart_labels_hold_the_sections_of_the_corpus(corpus: dict[str, list[str]]):
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml")
    assert isinstance(config.task, ClassifyConfig)
    assert list(config.task.labels) == sorted(config.task.labels)
    # A few sections have no held-out package, but a model may still choose them.
    assert set(corpus["section"]) < set(config.task.labels)
    assert len(config.task.labels) == 58


def test_quickstart_chunking_cuts_some_documents_and_leaves_most_whole(
    corpus: dict[str, list[str]], tokenizer: Tokenizer
):
    limit = load_config(REPOSITORY / "configs" / "quickstart.yaml").chunking.max_tokens
    lengths = [len(encoding) for encoding in tokenizer.encode_batch(corpus["text"])]
    assert 50 <= sum(length > limit for length in lengths) <= 200


def make_packages(seed: int) -> list[Package]:
    """Return packages in which about every second one repeats another's first paragraph."""
    rng = random.Random(seed)
    packages = []
    for number in range(24_000):
        opening = f"Opening {rng.randrange(30_000)}."
        text = f"{opening}\n\n{'more ' * rng.randrange(40)}end"
        section = rng.choice(["perl", "games", "net"]) if number % 500 else "rare"
        packages.append(Package(f"package-{number}", section, "a package", text))
    return packages


def test_documents_chosen_share_no_opening_with_training_or_each_other():
    packages = make_packages(seed=1)
    chosen = choose_documents(packages)
    openings = [package.text.split("\n\n")[0] for package in chosen]
    trained_on = {p.text.split("\n\n")[0] for p in packages if not is_drawn_for_testing(p.name)}
    assert len(chosen) == make_corpus.NUM_DOCUMENTS
    assert all(is_drawn_for_testing(package.name) for package in chosen)
    assert len(set(openings)) == len(openings)
    assert trained_on.isdisjoint(openings)


def test_choice_does_not_depend_on_the_order_of_the_index():
    packages = make_packages(seed=2)
    shuffled = random.Random(3).sample(packages, len(packages))
    assert choose_documents(shuffled) == choose_documents(packages)


@pytest.mark.skipif(not Path(APT_HELPER).exists(), reason="needs apt, as the scripts do")
def test_scripts_turn_the_same_lists_into_the_same_bytes(tmp_path: Path):
    lists = tmp_path / "lists"
    lists.mkdir()
    held_out = next(n for n in map("p{}".format, itertools.count()) if is_drawn_for_testing(n))
    index = INDEX + f"\nPackage: {held_out}\nDescription-md5: dd\nSection: net\n"
    entry = f"\nPackage: {held_out}\nDescription-md5: dd\nDescription-en: tool\n Held out.\n"
    (lists / "mirror_dists_bookworm_main_binary-amd64_Packages").write_text(index)
    (lists / "mirror_dists_bookworm_main_i18n_Translation-en").write_text(TRANSLATION + entry)
    (lists / "mirror_dists_bookworm_InRelease").write_text(RELEASE)
    for attempt in ("one", "two"):
        out = tmp_path / attempt
        make_corpus.main(["--lists", str(lists), "--out", str(out / "corpus.parquet")])
        changelogs = ["--changelogs", str(make_changelogs(tmp_path))]
        make_tokenizer.main(["--lists", str(lists), *changelogs, "--out", str(out)])
    for name in ("corpus.parquet", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    metadata = pq.read_schema(tmp_path / "one" / "corpus.parquet").metadata
    assert metadata[b"origin"] == b"Debian 12.0 (bookworm) main amd64"


def make_changelogs(tmp_path: Path) -> Path:
    folder = tmp_path / "changelogs"
    folder.mkdir(exist_ok=True)
    (folder / "hello").write_text(CHANGELOG.format(source="hello", maintainer="Ada Lovelace"))
    return folder


def test_training_texts_hold_nothing_held_out():
    packages = make_packages(seed=4)
    people = [f"Per Son{number}" for number in range(40)]
    sources = [f"source-{number}" for number in range(40)]
    entries = [
        entry
        for source in sources
        for maintainer in people
        for entry in parse_changelog(
            source, CHANGELOG.format(source=source, maintainer=maintainer)
        )[0]
    ]
    texts = make_tokenizer.training_texts(packages, entries)
    trained_on = {p.text for p in packages if not is_drawn_for_testing(p.name)}
    entries_trained_on = {
        CHANGELOG.format(source=source, maintainer=maintainer).rstrip()
        for source in sources
        for maintainer in people
        if not is_drawn_for_testing(source) and not is_drawn_for_testing(maintainer)
    }
    assert 0 < len(entries_trained_on) < len(entries)
    assert set(texts) >= entries_trained_on
    descriptions = set(texts) - entries_trained_on
    assert {text.partition("\n")[2] for text in descriptions} == trained_on
    assert len(texts) == len(trained_on) + len(entries_trained_on)
