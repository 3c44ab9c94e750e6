"""The actor around a replica: what it does when its engine breaks, and how its threads wait."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from granite_ray import run_job
from granite_ray.checkpoint import Checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import Engine, make_engine
from granite_ray.errors import InfrastructureError
from granite_ray.rank_worker import SPINS
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams, Shard, ShardPart
from granite_ray.stages import ShardWork, pack, read_work, unpack, write_work
from tests.corpus import make_config, write_corpus
from tests.invariants import check_output


@dataclass(frozen=True, slots=True)
class BreakingEngines:
    """Makes engines of which the first few break at their first call, and stay broken."""

    folder: Path
    num_broken: int

    def __call__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        engine: EngineConfig,
        num_threads: int | None = None,
    ) -> Engine:
        # Where OpenMP reads it: set, and torch, which brings OpenMP, not loaded yet.
        assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)
        assert "torch" not in sys.modules
        assert "libgomp" not in Path("/proc/self/maps").read_text()
        started = self.pids()
        with (self.folder / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")
        inner = make_engine(checkpoint, model, engine, num_threads)
        return BrokenEngine(inner) if len(started) < self.num_broken else inner

    def pids(self) -> list[int]:
        """The process of each engine made so far."""
        path = self.folder / "pids"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


class BrokenEngine:
    """An engine that is dead while its process lives."""

    num_calls = num_steps = num_cached_tokens = 0

    def __init__(self, inner: Engine) -> None:
        self._inner = inner

    async def generate(self, *_: Prompt | SamplingParams | Grammar | None) -> Completion:
        raise InfrastructureError("The engine's loop failed: a step did not come back")

    async def score(self, *_: Prompt | Sequence[tuple[int, ...]]) -> list[float]:
        raise InfrastructureError("The engine's loop failed: a step did not come back")

    def count(self, text: str) -> int:
        return self._inner.count(text)

    def shutdown(self) -> None:
        self._inner.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("joined_ray")
def test_a_replica_whose_engine_broke_is_replaced_and_every_document_answered(
    tmp_path: Path,
) -> None:
    config = make_config(write_corpus(tmp_path / "in", num_files=1), tmp_path / "out")
    engines = BreakingEngines(tmp_path, num_broken=1)
    report = run_job(config, make_engine=engines)
    check_output(tmp_path / "out", 25)
    assert report.exit_code == 0
    assert report.worker_deaths >= 1
    assert len(set(engines.pids())) == 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("joined_ray")
def test_engines_that_always_break_end_in_rows_that_say_so_after_bounded_deaths(
    tmp_path: Path,
) -> None:
    source = write_corpus(tmp_path / "in", num_files=1, rows_per_file=2)
    config = make_config(source, tmp_path / "out")
    engines = BreakingEngines(tmp_path, num_broken=1000)
    report = run_job(config, make_engine=engines)
    assert report.exit_code == 4
    assert report.failures == {"worker_death": 2}
    assert len(engines.pids()) == 2 + 2 * 2 + 1


def test_openmp_itself_says_that_its_threads_wait_briefly() -> None:
    program = (
        "import sys; from granite_ray.workers import wait_briefly; "
        "assert 'torch' not in sys.modules, 'too late'; wait_briefly(); import torch"
    )
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr


def test_work_travels_as_json_without_loss() -> None:
    parts = (ShardPart("a/b.parquet", '"etag"', 5, 10), ShardPart("ü.jsonl", "7-8", 0, None, 99))
    works = [ShardWork(Shard("s", parts), 3, ("results/x",)), ShardWork(Shard("s", parts), job=2)]
    assert read_work(pa.table({"work": [write_work(works)]})) == works
    assert read_work(pa.table({"work": [write_work(works[1:])]})) == works[1:]


def test_tables_travel_packed_without_loss_or_copy() -> None:
    tables = [pa.table({"n": [1, 2]}), pa.table({"text": ["a", None, "ü"]}), pa.table({"n": [3]})]
    for several in (tables, tables[:1]):
        block = pa.table([pack(several)], names=["packed"])
        assert block.num_rows == 1
        found = [unpack(block["packed"], at) for at in range(len(several))]
        assert found == several
    inside = block["packed"].chunks[0].values.buffers()[2]
    place = unpack(block["packed"])["n"].chunks[0].buffers()[1].address
    assert inside.address <= place < inside.address + inside.size
