"""What a folder on disk does beyond the common interface: full disks, rights, links, clocks."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from granite_ray.errors import StorageDeniedError, StorageError
from granite_ray.io.local import LocalStorage

MAX_FILE_BYTES = 10_000

# The system refuses to let a file grow, in the middle of a write, as a full disk does.
PUT_BEYOND_LIMIT = """
import resource, sys
from granite_ray.errors import StorageError
from granite_ray.io.local import LocalStorage
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
storage = LocalStorage(sys.argv[1])
for write in (storage.put_if_absent, lambda path, data: storage.replace(path, data, None)):
    try:
        write("results/shard.parquet", bytes(100_000))
    except StorageError as error:
        print(error)
"""


def test_a_write_cut_short_leaves_nothing_and_names_the_path(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUT_BEYOND_LIMIT, str(tmp_path), str(MAX_FILE_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    path = str(tmp_path / "results" / "shard.parquet")
    assert done.stdout.count(f"{path}: File too large") == 2
    assert not [file for file in (tmp_path / "results").iterdir() if not file.match(".*.lock")]


def test_a_system_that_refuses_to_open_is_a_storage_error(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(StorageError, match="Too many open files"):
            storage.put_if_absent("a", b"1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert list(tmp_path.iterdir()) == []


def as_nobody(action: str, folder: Path) -> str:
    """Run one call as a user without rights, since tests may run as root."""
    code = (
        "import os, sys\n"
        "from granite_ray.errors import StorageDeniedError\n"
        "from granite_ray.io.local import LocalStorage\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try:\n"
        f"    LocalStorage(sys.argv[1]).{action}\n"
        "except StorageDeniedError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("action", ["put_if_absent('b', b'')", "read('a')", "list()", "info('a')"])
def test_a_folder_without_rights_is_denied_by_name(tmp_path: Path, action: str) -> None:
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    folder.chmod(0)
    try:
        assert as_nobody(action, folder).startswith(str(folder))
    finally:
        folder.chmod(0o700)


def test_a_file_in_the_place_of_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(StorageDeniedError, match="out cannot be a folder"):
        LocalStorage(str(tmp_path / "out")).put_if_absent("a", b"")


def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalStorage(str(tmp_path)).put_if_absent("a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_versions_differ_when_size_and_clock_do_not(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    versions = [storage.replace("lease", b"00", None)]
    future_ns = 4_000_000_000 * 10**9
    os.utime(tmp_path / "lease", ns=(future_ns, future_ns))
    versions.append(storage.info("lease").version)
    for number in range(20):
        versions.append(storage.replace("lease", b"%02d" % number, versions[-1]))
    assert len(set(versions)) == len(versions)
    assert storage.info("lease").version == versions[-1]


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_bytes(b"1")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "dangling").symlink_to(tmp_path / "nowhere")
    listed = LocalStorage(str(tmp_path / "corpus")).list()
    assert [(info.path, info.size) for info in listed] == [("linked/a", 1)]


def test_a_folder_linked_into_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="loop is a link to a folder above it"):
        LocalStorage(str(tmp_path)).list()


def test_a_relative_root_means_the_folder_where_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("out")
    monkeypatch.chdir("/")
    storage.put_if_absent("a", b"1")
    assert (tmp_path / "out" / "a").read_bytes() == b"1"
