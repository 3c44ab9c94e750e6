"""Storages to test with: a folder, and a bucket of an S3 server on loopback."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from granite_ray.config import SourceConfig
from granite_ray.io.input_files import InputFile, describe_file
from granite_ray.io.listing import list_input
from granite_ray.io.s3 import RetryPolicy, S3Storage
from granite_ray.io.shards import plan_shards
from granite_ray.io.sources import RawShard, SourceColumns, read_shard, resolve_columns
from granite_ray.io.storage import Storage, open_storage

_spec = importlib.util.spec_from_file_location(
    "faulty_server", Path(__file__).with_name("faulty_server.py")
)
assert _spec is not None
assert _spec.loader is not None
faulty_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(faulty_server)

QUICK = RetryPolicy(4, first_wait_s=0.01, max_wait_s=0.02, connect_timeout_s=1, read_timeout_s=1)
_bucket_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as environment:
        server = faulty_server.FaultyServer()
        server.start()
        environment.setenv("AWS_ENDPOINT_URL", server.url)
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server
        server.stop()


@pytest.fixture
def bucket(s3_server: Any) -> Iterator[str]:
    """An empty bucket, as `s3://…`."""
    name = f"bucket-{next(_bucket_numbers)}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=name)
    client.close()
    yield f"s3://{name}"
    s3_server.heal()


@pytest.fixture
def s3_storage(bucket: str) -> S3Storage:
    return S3Storage(f"{bucket}/corpus", QUICK)


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind."""
    if request.param == "local":
        return open_storage(str(tmp_path / "corpus"))
    return open_storage(f"{request.getfixturevalue('bucket')}/corpus")


class Corpus:
    """A storage as a source: files in, documents out, by the verbs that a job uses."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def put(self, path: str, content: bytes | str | pa.Table, **options: Any) -> None:
        if isinstance(content, pa.Table):
            sink = pa.BufferOutputStream()
            pq.write_table(content, sink, **options)
            content = sink.getvalue().to_pybytes()
        data = content.encode() if isinstance(content, str) else content
        self.storage.put_if_absent(path, data)

    def source(self, **options: Any) -> SourceConfig:
        return SourceConfig(**({"path": self.storage.root} | options))

    def describe(self, source: SourceConfig) -> list[InputFile]:
        listing = list_input(source)
        storage = open_storage(listing.root)
        return [describe_file(storage, file, source) for file in listing.files]

    def columns(self, source: SourceConfig, *prompt_columns: str) -> SourceColumns:
        return resolve_columns(self.describe(source), source, prompt_columns)

    def read_shards(self, source: SourceConfig, *prompt_columns: str) -> list[RawShard]:
        columns = self.columns(source, *prompt_columns)
        shards = plan_shards(self.describe(source), source)
        storage = open_storage(list_input(source).root)
        return [read_shard(storage, shard, columns, source) for shard in shards]

    def rows(self, source: SourceConfig, *prompt_columns: str) -> list[dict[str, Any]]:
        shards = self.read_shards(source, *prompt_columns)
        for shard in shards:
            shard.table.validate(full=True)
        return [row for shard in shards for row in shard.table.to_pylist()]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """An empty corpus on disk."""
    return Corpus(open_storage(str(tmp_path / "corpus")))


@pytest.fixture
def any_corpus(storage: Storage) -> Corpus:
    """An empty corpus on each kind of storage."""
    return Corpus(storage)
