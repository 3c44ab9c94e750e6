"""Engines that step together: each rank's answers are those of a quiet engine with all experts."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from granite_ray.checkpoint import open_checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import Engine, make_engine
from granite_ray.parallel.place import RankPlace
from granite_ray.records import Completion, Prompt, SamplingParams
from tests.family import write_member
from tests.faults import wait_until
from tests.ranks import PATIENCE_S, Ranks, join, run_ranks
from tests.tiny_models import write_checkpoint
from tests.unit.engine.test_native_fuzz import Call, draw_call, is_same
from tests.unit.engine.watched import Sizes, WatchedRunner, make_runner, start_native

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

LITTLE_MEMORY = Sizes(num_blocks=11, num_slots=6, max_num_seqs=5, max_num_batched_tokens=90)
QUIET = Sizes(max_num_seqs=1)
GROWING = [
    Call(Prompt(tuple(range(start, start + 20))), SamplingParams(50)) for start in (30, 60, 90, 120)
]
"""Together they come to need twice the memory that there is."""
DOCUMENT = tuple(range(200, 248))
ASKED_TWICE = [
    Call(Prompt((*DOCUMENT, question), junctions=(48,)), SamplingParams(8)) for question in (30, 31)
]
"""The second one begins with what the first one computes, where it comes to the same rank."""


def write_moe(folder: Path) -> Path:
    return write_checkpoint(folder, "granitemoe")


def write_hybrid(folder: Path) -> Path:
    return write_checkpoint(folder, "granitemoehybrid")


def write_forty_experts(folder: Path) -> Path:
    return write_member(folder, "granite-3.1-3b-a800m", num_layers=3)


def write_h_tiny(folder: Path) -> Path:
    return write_member(folder, "granite-4.0-h-tiny", num_layers=6)


def answer(place: RankPlace, path: str, shares: list[list[Call]]) -> tuple[list[Any], list[int]]:
    """One rank's answers to its share of calls, with little memory; and what happened to it."""
    checkpoint = open_checkpoint(ModelConfig(path=path))
    group = join(place)
    watched = WatchedRunner(make_runner(checkpoint, LITTLE_MEMORY, group)[0])
    engine, scheduler = start_native(checkpoint, watched, LITTLE_MEMORY, group)

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*(call.ask(engine) for call in shares[place.rank]))

    answers = asyncio.run(asyncio.wait_for(ask_all(), PATIENCE_S))
    wait_until(lambda: not scheduler.has_work)
    cache = scheduler._cache
    assert (cache.num_free_blocks, cache.num_free_slots) == (11, 6)
    return answers, [len(watched.preempted), len(watched.token_counts)]


def divide(calls: list[Call], size: int) -> list[list[Call]]:
    """Uneven shares: the last rank has none, and the first one more than the others together."""
    others = size - 2
    return [calls[: len(calls) - 4 * others], *(calls[-4 * n - 4 :][:4] for n in range(others)), []]


@pytest.mark.parametrize(
    ("write", "size"),
    [
        (write_hybrid, 2),
        (write_forty_experts, 3),  # 14, 13 and 13 experts
        pytest.param(write_moe, 3, marks=pytest.mark.slow),  # of 4 experts a token has 2, one here
        pytest.param(write_moe, 4, marks=pytest.mark.slow),
        pytest.param(write_hybrid, 4, marks=pytest.mark.slow),
        pytest.param(write_h_tiny, 4, marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_one_quiet_rank(
    tmp_path: Path, write: Callable[[Path], Path], size: int
) -> None:
    """Short and long prompts, shared ones, scores, grammars, samples, preemption, idle ranks."""
    path = write(tmp_path / "checkpoint")
    numbers = random.Random(size)
    calls = [*ASKED_TWICE, *GROWING, *(draw_call(numbers) for _ in range(12))]
    shares = divide(calls, size)
    outcomes = run_ranks(size, answer, str(path), shares)
    assert outcomes[0][1][0], "nothing was preempted"
    assert outcomes[-1][1] == [0, 0], "the last rank had work"
    assert outcomes[0][0][1].num_cached_tokens == len(DOCUMENT)
    checkpoint = open_checkpoint(ModelConfig(path=str(path)))
    quiet, _ = start_native(checkpoint, make_runner(checkpoint, QUIET)[0], QUIET)
    try:
        for share, (answers, _) in zip(shares, outcomes, strict=True):
            assert len(answers) == len(share)
            for call, found in zip(share, answers, strict=True):
                assert is_same(found, asyncio.run(call.ask(quiet))), call
    finally:
        quiet.shutdown()
    texts = [found.text for answers, _ in outcomes for found in answers if is_long(found)]
    assert min(len(set(text)) for text in texts) > 5, "text that does not vary proves nothing"


def is_long(answer: Any) -> bool:
    return isinstance(answer, Completion) and answer.num_completion_tokens > 15


# whole engines ───────────────────────────────────────────────────────────────────────────────────


def start_rank(place: RankPlace, path: str, **model: Any) -> Engine:
    checkpoint = open_checkpoint(ModelConfig(path=path, **model))
    engine = EngineConfig(device="cpu", cache_gib=0.05, max_num_seqs=8)
    return make_engine(checkpoint, ModelConfig(path=path, **model), engine, 1, place)


def write_text(place: RankPlace, path: str, model: dict[str, Any]) -> str:
    engine = start_rank(place, path, **model)
    asked = engine.generate(Prompt((40 + place.rank, 50, 60)), SamplingParams(12))
    return asyncio.run(asked).text


@pytest.mark.parametrize("model", [{}, {"load_format": "dummy"}], ids=["weights", "dummy"])
def test_an_engine_of_several_ranks_passes_its_own_check_and_answers(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    path = str(write_hybrid(tmp_path / "checkpoint"))
    texts = run_ranks(2, write_text, path, model)
    config = ModelConfig(path=path, **model)
    alone = make_engine(open_checkpoint(config), config, EngineConfig(device="cpu"), 1)
    try:
        for rank, text in enumerate(texts):
            asked = alone.generate(Prompt((40 + rank, 50, 60)), SamplingParams(12))
            assert asyncio.run(asked).text == text
    finally:
        alone.shutdown()


def load_only(place: RankPlace, path: str) -> None:
    start_rank(place, path)


def test_more_ranks_than_experts_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint", "granite")
    with Ranks(2, load_only, str(path), timeout_s=PATIENCE_S) as ranks:
        words = ranks.outcome(0).words
    assert "ConfigError: engine.expert_parallel_size is 2" in words
    assert "has no experts" in words
