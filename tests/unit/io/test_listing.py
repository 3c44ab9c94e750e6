"""What `source.path` names, on disk and on S3."""

import os
from pathlib import Path
from typing import Any

import pytest

from granite_ray.config import SourceConfig
from granite_ray.errors import ConfigError
from granite_ray.io.listing import list_input
from granite_ray.io.storage import Storage

FILES = [
    "2024/01/a.parquet",
    "2024/01/b.PQ",
    "2024/02/c.parquet",
    "2025/lang=en/d.parquet",
    "2025/lang=en/notes.txt",
    "2025/_SUCCESS",
    "_hidden/e.parquet",
    ".f.parquet",
    "g[1].parquet",
]


@pytest.fixture
def filled(storage: Storage) -> Storage:
    for path in FILES:
        storage.put_if_absent(path, path.encode())
    return storage


def listed(storage: Storage, *paths: str, **options: Any) -> tuple[str, list[str]]:
    """List paths below the storage's root; return the root below it, and the paths found."""
    full = [f"{storage.root}/{path}".rstrip("/") for path in paths]
    listing = list_input(SourceConfig(path=full, **options))
    return listing.root.removeprefix(storage.root), [file.path for file in listing.files]


PARQUET = ["2024/01/a.parquet", "2024/01/b.PQ", "2024/02/c.parquet", "2025/lang=en/d.parquet"]


@pytest.mark.parametrize(
    ("paths", "root", "found"),
    [
        ([""], "", [*PARQUET, "g[1].parquet"]),
        (["2024"], "/2024", ["01/a.parquet", "01/b.PQ", "02/c.parquet"]),
        (["2024/01/a.parquet"], "/2024/01", ["a.parquet"]),
        (["2025/lang=en/notes.txt"], "/2025/lang=en", ["notes.txt"]),
        (["g[1].parquet"], "", ["g[1].parquet"]),
        (["2024/*/?.parquet"], "/2024", ["01/a.parquet", "02/c.parquet"]),
        (["**/*.parquet"], "", [*PARQUET[:1], *PARQUET[2:], "g[1].parquet"]),
        (["202?"], "", PARQUET),
        (["*/lang=*"], "", ["2025/lang=en/d.parquet"]),
        (["*/lang=*/*"], "", ["2025/lang=en/d.parquet", "2025/lang=en/notes.txt"]),
        (["2024/02", "2024/01/*", "2024"], "/2024", ["01/a.parquet", "01/b.PQ", "02/c.parquet"]),
        (["2024/02", "2025/lang=en"], "", ["2024/02/c.parquet", "2025/lang=en/d.parquet"]),
    ],
)
def test_paths_name_files_below_one_root(
    filled: Storage, paths: list[str], root: str, found: list[str]
) -> None:
    assert listed(filled, *paths) == (root, found)


def test_a_listing_knows_size_and_version(filled: Storage) -> None:
    listing = list_input(SourceConfig(path=f"{filled.root}/2024"))
    for file in listing.files:
        assert (file.size, file.version) == (
            len(f"2024/{file.path}"),
            filled.info(f"2024/{file.path}").version,
        )


@pytest.mark.parametrize(
    ("source_format", "found"),
    [
        ("jsonl", ["a.jsonl", "b.ndjson.gz", "c.JSON.zst"]),
        ("text", ["d.txt", "e.md"]),
        ("parquet", ["f.pq"]),
    ],
)
def test_a_folder_gives_the_files_of_its_format(
    storage: Storage, source_format: str, found: list[str]
) -> None:
    for path in ["a.jsonl", "b.ndjson.gz", "c.JSON.zst", "d.txt", "e.md", "f.pq", "README"]:
        storage.put_if_absent(path, b"")
    assert listed(storage, "", format=source_format) == ("", found)


def test_the_root_does_not_depend_on_the_files_there(storage: Storage) -> None:
    storage.put_if_absent("docs/2024/a.parquet", b"")
    before = listed(storage, "docs/*/*.parquet")
    storage.put_if_absent("docs/2025/b.parquet", b"")
    after = listed(storage, "docs/*/*.parquet")
    assert before == ("/docs", ["2024/a.parquet"])
    assert after == ("/docs", ["2024/a.parquet", "2025/b.parquet"])


@pytest.mark.parametrize("path", ["missing", "missing/*.parquet", "2025/_SUCCESS/x", "_hidden/*.x"])
def test_a_path_that_names_nothing_is_refused(filled: Storage, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"source\.path '.*{path[:5]}"):
        listed(filled, "2024", path)


def test_paths_on_two_storages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixes local paths and s3"):
        list_input(SourceConfig(path=[str(tmp_path), "s3://bucket/x"]))
    with pytest.raises(ConfigError, match="several buckets"):
        list_input(SourceConfig(path=["s3://one/x", "s3://two/x"]))


def test_denied_access_is_refused(bucket: str, s3_server: Any) -> None:
    s3_server.always = "denied"
    with pytest.raises(ConfigError, match=rf"source\.path: {bucket}"):
        list_input(SourceConfig(path=f"{bucket}/docs"))


def test_a_name_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        list_input(SourceConfig(path=str(tmp_path)))
