"""The input's files → shards: deterministic slices, whatever the order, the run or the cluster.

A file beyond the limits of one shard is cut into row ranges of its own. Files within them are
grouped in the order of their paths, so that an added or changed file alters the groups around it
and no others. Nothing is read here.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from granite_ray.config import SourceConfig
from granite_ray.io.input_files import InputFile
from granite_ray.io.lines import Stretch
from granite_ray.records import Shard, ShardPart

MAX_STEM_CHARS = 40


def plan_shards(files: Sequence[InputFile], source: SourceConfig) -> list[Shard]:
    """Cut the input into shards, in the order of the paths; each row is in exactly one."""
    limits = _Limits(source.documents_per_shard, int(source.bytes_per_shard))
    small: list[_Range] = []
    groups: list[list[_Range]] = []
    for file in sorted(files, key=lambda file: file.path):
        ranges = _cut_file(file, limits)
        if len(ranges) == 1:
            small += ranges
        else:
            groups += [[piece] for piece in ranges]
    groups += _group_files(small, limits)
    groups.sort(key=lambda group: (group[0].part.path, group[0].part.start_row))
    conditions = _conditions(source)
    return [_make_shard([piece.part for piece in group], conditions) for group in groups]


def cut_shards(shards: Sequence[Shard], num_rows: int, source: SourceConfig) -> list[Shard]:
    """Return the shards of the plan's first rows; one that is cut gets an id of its own."""
    first: list[Shard] = []
    for shard in shards:
        parts = list(_cut_parts(shard.parts, num_rows))
        if parts:
            first.append(_make_shard(parts, _conditions(source)))
        num_rows -= sum(_num_rows(part) for part in parts)
    return first


@dataclass(frozen=True, slots=True)
class _Limits:
    """What one shard may hold."""

    num_rows: int
    num_bytes: int

    def allow(self, num_rows: int, num_bytes: int) -> bool:
        return num_rows <= self.num_rows and num_bytes <= self.num_bytes

    def num_pieces(self, stretch: Stretch) -> int:
        """Return into how many pieces a stretch must be cut; a piece has a row at least."""
        by_rows = math.ceil(stretch.num_rows / self.num_rows)
        return min(stretch.num_rows, max(by_rows, math.ceil(stretch.num_bytes / self.num_bytes)))


@dataclass(frozen=True, slots=True)
class _Range:
    """A row range with its estimated bytes."""

    part: ShardPart
    num_bytes: int

    @property
    def num_rows(self) -> int:
        return _num_rows(self.part)


def _cut_file(file: InputFile, limits: _Limits) -> list[_Range]:
    """Cut a file into ranges within the limits.

    Whole stretches (row groups) stay together while they fit, since a range that cuts a row group
    makes its reader decode the rest of it in vain. One that does not fit is cut evenly.
    """
    ranges: list[_Range] = []
    row = 0
    for run in _runs(file.stretches, limits):
        stretch = Stretch(
            sum(stretch.num_rows for stretch in run),
            sum(stretch.num_bytes for stretch in run),
            run[0].start_byte,
        )
        num_pieces = limits.num_pieces(stretch)
        cuts = [row + stretch.num_rows * index // num_pieces for index in range(num_pieces + 1)]
        for start, stop in itertools.pairwise(cuts):
            part = ShardPart(file.path, file.identity, start, stop, stretch.start_byte)
            ranges.append(_Range(part, stretch.num_bytes // num_pieces))
        row = cuts[-1]
    return ranges


def _runs(stretches: Sequence[Stretch], limits: _Limits) -> Iterator[list[Stretch]]:
    """Yield neighbouring stretches that fit one shard together; one that does not fit, alone."""
    run: list[Stretch] = []
    num_rows = num_bytes = 0
    for stretch in stretches:
        if not stretch.num_rows:
            continue
        num_rows, num_bytes = num_rows + stretch.num_rows, num_bytes + stretch.num_bytes
        if run and not limits.allow(num_rows, num_bytes):
            yield run
            run, num_rows, num_bytes = [], stretch.num_rows, stretch.num_bytes
        run.append(stretch)
    if run:
        yield run


def _group_files(small: Sequence[_Range], limits: _Limits) -> Iterator[list[_Range]]:
    """Group small files: halve the sorted list at its lowest hash until each piece fits.

    Where a list is cut depends on the paths in it alone. So an added file alters the pieces that it
    falls into, unless its own hash is the lowest of a long stretch, which is as rare as that
    stretch is long. A modulus taken from the corpus' size would move every cut when it changes.
    """
    hashes = [hashlib.blake2b(piece.part.path.encode(), digest_size=8).digest() for piece in small]
    rows = list(itertools.accumulate((piece.num_rows for piece in small), initial=0))
    sizes = list(itertools.accumulate((piece.num_bytes for piece in small), initial=0))
    waiting = [(0, len(small))] if small else []
    while waiting:
        start, stop = waiting.pop()
        if stop - start == 1 or limits.allow(rows[stop] - rows[start], sizes[stop] - sizes[start]):
            yield list(small[start:stop])
        else:
            cut = min(range(start + 1, stop), key=hashes.__getitem__)
            waiting += [(cut, stop), (start, cut)]


def _cut_parts(parts: Sequence[ShardPart], num_rows: int) -> Iterator[ShardPart]:
    for part in parts:
        if num_rows > 0:
            yield replace(part, stop_row=part.start_row + min(num_rows, _num_rows(part)))
        num_rows -= _num_rows(part)


def _num_rows(part: ShardPart) -> int:
    assert part.stop_row is not None, "a planned part has an end"
    return part.stop_row - part.start_row


def _conditions(source: SourceConfig) -> list[object]:
    return [condition.model_dump(mode="json") for condition in source.filter]


def _make_shard(parts: Sequence[ShardPart], conditions: Sequence[object]) -> Shard:
    read = [[part.path, part.identity, part.start_row, part.stop_row] for part in parts]
    digest = hashlib.sha256(json.dumps([read, conditions]).encode()).hexdigest()[:16]
    return Shard(f"{_stem(parts[0].path)}-{digest}", tuple(parts))


def _stem(path: str) -> str:
    """Return what of a path can stand in a file name; never hidden, never empty."""
    name = path.rpartition("/")[2]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:MAX_STEM_CHARS].strip("._-")
    return readable or "shard"
