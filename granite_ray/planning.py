"""plan shards: the input as it is now → shards, what its columns are, and how many documents.

Reads footers and counts lines; writes nothing, and knows nothing of what is committed.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import ray

from granite_ray.cluster import Cluster
from granite_ray.config import SourceConfig
from granite_ray.errors import ConfigError, CorruptInputError, StorageDeniedError
from granite_ray.io.columns import SourceColumns, resolve_columns
from granite_ray.io.duplicates import find_duplicates, id_hashes
from granite_ray.io.files import FileInfo
from granite_ray.io.input_files import InputFile, describe_file
from granite_ray.io.listing import InputListing, list_input
from granite_ray.io.shards import cut_shards, plan_shards
from granite_ray.io.storage import Storage
from granite_ray.records import Shard

NUM_THREADS = 16
SCAN_BYTES = 256 * 1024**2
"""Lines are counted on the cluster where there are more bytes of them than this."""

OpenStorage = Callable[[str], Storage]


@dataclass(frozen=True, slots=True)
class InputPlan:
    """The input cut into shards; `is_exact` unless a filter or a bad file hides documents."""

    root: str
    shards: tuple[Shard, ...]
    columns: SourceColumns
    num_documents: int
    is_exact: bool
    bad_files: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> frozenset[str]:
        """The input files, relative to the root."""
        return frozenset(part.path for shard in self.shards for part in shard.parts)


def plan_input(
    source: SourceConfig, prompt_columns: Sequence[str], open_storage: OpenStorage, cluster: Cluster
) -> InputPlan:
    """List the input, look into its files, and cut it into shards.

    Raises:
        ConfigError: What the input lacks: files, columns, access, distinct ids.
        CorruptInputError: An unreadable file, where `source.on_bad_file` is `fail`.
    """
    try:
        return _plan_input(source, prompt_columns, open_storage, cluster)
    except StorageDeniedError as error:
        raise ConfigError(f"source.path cannot be read: {error}") from error


def _plan_input(
    source: SourceConfig, prompt_columns: Sequence[str], open_storage: OpenStorage, cluster: Cluster
) -> InputPlan:
    listing = list_input(source, open_storage)
    files, bad_files = _describe_files(listing, source, open_storage, cluster)
    if not files:
        raise ConfigError(
            f"source.path {list(source.path)}: none of {len(bad_files)} files can be read."
        )
    columns = resolve_columns(files, source, prompt_columns)
    if source.on_duplicate == "error":
        _refuse_duplicates(open_storage(listing.root), files, columns, source)
    return InputPlan(
        root=listing.root,
        shards=tuple(plan_shards(files, source)),
        columns=columns,
        num_documents=sum(file.num_rows for file in files),
        is_exact=not source.filter and not bad_files,
        bad_files=bad_files,
    )


def limit_plan(plan: InputPlan, limit: int | None, source: SourceConfig) -> InputPlan:
    """Return the plan of the first `limit` documents; all of it without a limit."""
    if limit is None:
        return plan
    shards = tuple(cut_shards(plan.shards, limit, source))
    return replace(plan, shards=shards, num_documents=min(limit, plan.num_documents))


def _describe_files(
    listing: InputListing, source: SourceConfig, open_storage: OpenStorage, cluster: Cluster
) -> tuple[list[InputFile], dict[str, str]]:
    """Describe every file, several at a time; return the readable ones, and why others are not."""
    arguments = (listing.root, source, open_storage)
    num_bytes = sum(file.size for file in listing.files)
    if source.format == "jsonl" and num_bytes > SCAN_BYTES:
        cluster.start()
        scan = ray.remote(num_cpus=1)(_describe)
        outcomes = ray.get([scan.remote(file, *arguments) for file in listing.files])
    else:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            outcomes = list(pool.map(lambda file: _describe(file, *arguments), listing.files))
    files = [outcome for outcome in outcomes if isinstance(outcome, InputFile)]
    bad_files = {
        file.path: outcome
        for file, outcome in zip(listing.files, outcomes, strict=True)
        if isinstance(outcome, CorruptInputError)
    }
    if bad_files and source.on_bad_file == "fail":
        raise next(iter(bad_files.values()))
    return files, {path: str(error) for path, error in bad_files.items()}


def _describe(
    file: FileInfo, root: str, source: SourceConfig, open_storage: OpenStorage
) -> InputFile | CorruptInputError:
    try:
        return describe_file(open_storage(root), file, source)
    except CorruptInputError as error:
        return error


def _refuse_duplicates(
    storage: Storage, files: Sequence[InputFile], columns: SourceColumns, source: SourceConfig
) -> None:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        hashes = list(pool.map(lambda file: id_hashes(storage, file, columns, source), files))
    places = find_duplicates(storage, files, hashes, columns, source)
    if places is not None:
        raise ConfigError(
            f"source.id_column {source.id_column} has the same id at {places[0]} and {places[1]}. "
            "Remove one of them, or set source.on_duplicate to allow."
        )
