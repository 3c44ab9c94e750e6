"""The engine in front of a replica's ranks, with puppets in their place: calls, failures, room."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.requests import OnToken
from granite_ray.errors import ConfigError, InfrastructureError, RowFailure
from granite_ray.io.commit import Generation
from granite_ray.parallel.place import RankPlace
from granite_ray.rank_worker import RankWorker
from granite_ray.ranks import RankedEngine, remove_ranks
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from granite_ray.stages import StageContext
from tests.corpus import make_config
from tests.faults import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(300)]

ANSWER, REFUSE, HANG, SPEAK = Prompt((1,)), Prompt((2,)), Prompt((3,)), Prompt((4,))
ONE_TOKEN = SamplingParams(1)


@dataclass(frozen=True, slots=True)
class Puppets:
    """Makes engines that do what the first token of a prompt tells, and note it in `folder`."""

    folder: str
    start_error: ConfigError | None = None

    def __call__(
        self,
        _: Checkpoint,
        __: ModelConfig,
        ___: EngineConfig,
        num_threads: int | None = None,
        place: RankPlace | None = None,
    ) -> "Puppet":
        assert place
        assert num_threads == 1
        if self.start_error is not None and place.rank == 1:
            raise self.start_error
        return Puppet(Path(self.folder), place)

    def noted(self, what: str) -> list[str]:
        """What all puppets have noted of a kind."""
        path = Path(self.folder) / what
        return path.read_text().split() if path.exists() else []


class Puppet:
    num_steps = 7
    num_cached_tokens = 3
    failure = None

    def __init__(self, folder: Path, place: RankPlace) -> None:
        self.folder, self.place = folder, place
        self.note("started", str(os.getpid()))

    def note(self, what: str, word: str) -> None:
        with (self.folder / what).open("a") as file:
            file.write(f"{word}\n")

    def noted(self, what: str) -> bool:
        return (self.folder / what).exists()

    async def generate(
        self,
        prompt: Prompt,
        _: SamplingParams,
        __: Grammar | None,
        *,
        is_interactive: bool,
        on_token: OnToken | None = None,
    ) -> Completion:
        self.note("interactive" if is_interactive else "called", str(self.place.rank))
        if prompt == REFUSE:
            raise RowFailure("schema_violation", "the grammar cannot be met")
        if on_token is not None:
            on_token(7, None)
            on_token(8, None)
        try:
            while prompt == HANG or (prompt == SPEAK and not self.noted("go on")):
                await asyncio.sleep(0.1)
        except asyncio.CancelledError:
            self.note("cancelled", str(self.place.rank))
            raise
        if on_token is not None:
            on_token(9, None)
        return Completion(f"rank {self.place.rank}", len(prompt.token_ids), 1, "stop")

    async def score(
        self, prompt: Prompt, choices: Sequence[tuple[int, ...]], *, is_interactive: bool
    ) -> list[float]:
        assert not is_interactive
        return [float(prompt.token_ids[0] - choice[0]) for choice in choices]


StartRanks = Callable[..., tuple[RankedEngine, Puppets]]


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[StartRanks]:
    """Start two ranks of puppets; shut them down in the end."""
    started: list[RankedEngine] = []

    def start(timeout_s: float = 90.0, num_cpus: float = 1.0, **puppets: Any) -> Any:
        made = Puppets(str(tmp_path), **puppets)
        context = make_context(made, timeout_s)
        started.append(RankedEngine(context, context.checkpoint, {"CPU": num_cpus}, 1))
        return started[-1], made

    yield start
    for engine in started:
        engine.shutdown()


@pytest.fixture(scope="module")
def shared(
    joined_ray: None,  # noqa: ARG001 - to be joined before
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RankedEngine, Puppets]]:
    """Ranks for several tests, which leave them as they were."""
    puppets = Puppets(str(tmp_path_factory.mktemp("shared")))
    context = make_context(puppets, 90.0, "another-run")
    engine = RankedEngine(context, context.checkpoint, {"CPU": 1.0}, 1)
    yield engine, puppets
    engine.shutdown()


def make_context(
    puppets: Puppets, timeout_s: float, run_id: str = "a-run", rank_timeout_s: float = 20
) -> StageContext:
    engine = {"backend": "fake", "expert_parallel_size": 2, "rank_timeout_s": rank_timeout_s}
    job = {"scheduling_timeout_s": timeout_s}
    config = make_config(puppets.folder, puppets.folder, engine=engine, job=job)
    checkpoint = open_checkpoint(config.model, weights_needed=False)
    unused: Any = None
    return StageContext(
        config=config,
        checkpoint=checkpoint,
        columns=unused,
        source_root="",
        schema=unused,
        max_chunk_tokens=1,
        generation=Generation(""),
        run_id=run_id,
        open_storage=unused,
        make_engine=puppets,
    )


def placed() -> list[str]:
    """Names of the run's placement groups that hold room."""
    table = ray.util.placement_group_table().values()
    groups = [group for group in table if group["state"] != "REMOVED"]
    return [group["name"] for group in groups if "a-run" in group["name"]]


def test_calls_are_dealt_out_and_answers_come_back(shared: tuple[RankedEngine, Puppets]) -> None:
    engine, _ = shared
    num_calls = engine.num_calls

    async def ask() -> Any:
        calls = [engine.generate(ANSWER, ONE_TOKEN) for _ in range(10)]
        return await asyncio.gather(engine.score(ANSWER, [(1,), (4,)]), *calls)

    scores, *answers = asyncio.run(ask())
    assert scores == [0.0, -3.0]
    texts = [answer.text for answer in answers]
    assert sorted(texts) == ["rank 0"] * 5 + ["rank 1"] * 5
    assert engine.num_calls == num_calls + 11
    wait_until(lambda: (engine.num_steps, engine.num_cached_tokens) == (14, 6))


def test_a_row_failure_on_a_rank_is_one_here(shared: tuple[RankedEngine, Puppets]) -> None:
    engine, _ = shared
    with pytest.raises(RowFailure, match="cannot be met") as failed:
        asyncio.run(engine.generate(REFUSE, ONE_TOKEN))
    assert failed.value.error_type == "schema_violation"
    with pytest.raises(RowFailure, match="more than the") as failed:
        asyncio.run(engine.generate(ANSWER, SamplingParams(10**7)))
    assert failed.value.error_type == "too_long"
    assert engine.failure is None


def test_a_caller_that_leaves_is_told_to_the_rank(shared: tuple[RankedEngine, Puppets]) -> None:
    engine, puppets = shared
    num_calls = len(puppets.noted("called"))

    async def leave() -> None:
        call = asyncio.create_task(engine.generate(HANG, ONE_TOKEN))
        await asyncio.to_thread(wait_until, lambda: len(puppets.noted("called")) > num_calls)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: puppets.noted("cancelled"), timeout_s=30)
    assert engine.failure is None


def test_tokens_of_a_rank_arrive_while_the_rest_is_still_to_come(
    shared: tuple[RankedEngine, Puppets],
) -> None:
    engine, puppets = shared
    heard: list[int] = []

    async def listen() -> tuple[list[int], Completion]:
        call = asyncio.create_task(
            engine.generate(SPEAK, ONE_TOKEN, on_token=lambda token_id, _: heard.append(token_id))
        )
        await asyncio.to_thread(wait_until, lambda: len(heard) == 2)
        before = list(heard)
        (Path(puppets.folder) / "go on").touch()
        return before, await call

    before, completion = asyncio.run(listen())
    assert (before, heard) == ([7, 8], [7, 8, 9])
    assert completion.text.startswith("rank")


@pytest.mark.parametrize("prompt", [HANG, REFUSE], ids=["leaves", "is refused"])
def test_a_listener_that_leaves_or_is_refused_hears_no_more(
    shared: tuple[RankedEngine, Puppets], prompt: Prompt
) -> None:
    engine, puppets = shared
    num_cancelled = len(puppets.noted("cancelled"))
    heard: list[int] = []

    async def listen() -> list[Any]:
        call = asyncio.create_task(
            engine.generate(prompt, ONE_TOKEN, on_token=lambda token_id, _: heard.append(token_id))
        )
        if prompt == HANG:
            await asyncio.to_thread(wait_until, lambda: heard)
            call.cancel()
        return await asyncio.gather(call, return_exceptions=True)

    [ended] = asyncio.run(listen())
    if prompt == HANG:
        assert isinstance(ended, asyncio.CancelledError)
        wait_until(lambda: len(puppets.noted("cancelled")) > num_cancelled, timeout_s=30)
    else:
        assert isinstance(ended, RowFailure)
    assert engine.failure is None


def test_ranks_that_nobody_asks_for_a_sign_of_life_end_themselves(tmp_path: Path) -> None:
    """What is left of a replica on a node that Ray has given up."""
    puppets = Puppets(str(tmp_path))
    context = make_context(puppets, 90.0, rank_timeout_s=1)
    rank = ray.remote(num_cpus=0, concurrency_groups={"life": 1})(RankWorker).remote(context)
    ray.get(rank.load.remote(1, ("", 0), 1))
    [process_id] = map(int, puppets.noted("started"))
    for _ in range(4):
        assert ray.get(rank.beat.options(concurrency_group="life").remote()) == (7, 3)
        time.sleep(1)
    wait_until(lambda: not psutil.pid_exists(process_id), timeout_s=30)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(rank.beat.remote())


def test_a_rank_that_dies_ends_all_calls_and_nothing_of_the_others_stays(
    start_ranks: StartRanks,
) -> None:
    engine, puppets = start_ranks()
    processes = [int(word) for word in puppets.noted("started")]

    async def ask() -> list[Any]:
        calls = [asyncio.create_task(engine.generate(HANG, ONE_TOKEN)) for _ in range(4)]
        await asyncio.to_thread(wait_until, lambda: len(puppets.noted("called")) == 4)
        os.kill(processes[1], signal.SIGKILL)
        return await asyncio.gather(*calls, return_exceptions=True)

    started = time.monotonic()
    answers = asyncio.run(ask())
    assert {type(answer) for answer in answers} == {InfrastructureError}
    assert time.monotonic() - started < 15, "at once, and not after engine.rank_timeout_s"
    with pytest.raises(InfrastructureError, match="A rank of the replica was lost"):
        asyncio.run(engine.generate(ANSWER, ONE_TOKEN))
    engine.shutdown()
    wait_until(lambda: not any(map(psutil.pid_exists, processes)), timeout_s=30)
    assert placed() == []


def test_a_rank_that_cannot_start_says_why_and_keeps_no_room(start_ranks: StartRanks) -> None:
    with pytest.raises(ConfigError, match=r"^engine.device is cuda, but"):
        start_ranks(start_error=ConfigError("engine.device is cuda, but"))
    assert placed() == []


def test_ranks_without_room_are_given_up_with_what_there_is(start_ranks: StartRanks) -> None:
    started = time.monotonic()
    with pytest.raises(InfrastructureError, match=r"2 ranks of .*100.* in 1 s .* CPU are free"):
        start_ranks(timeout_s=2.0, num_cpus=100.0)
    assert 1 <= time.monotonic() - started < 60
    assert placed() == []


def test_what_a_killed_process_left_is_removed(start_ranks: StartRanks) -> None:
    """As a restarted actor finds it, under its own name; and as the driver does in the end."""
    _, puppets = start_ranks()
    before = placed()
    assert len(before) == 1
    left = [int(word) for word in puppets.noted("started")]
    start_ranks()
    assert placed() == before
    wait_until(lambda: not any(map(psutil.pid_exists, left)), timeout_s=30)
    remove_ranks("b-run")
    assert placed() == before
    remove_ranks("a-run")
    assert placed() == []
