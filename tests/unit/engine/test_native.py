"""The native engine against transformers' own classes, for every row of the Granite family."""

import asyncio
import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import Engine
from granite_ray.engine.native import load_native_engine
from granite_ray.engine.sizing import GIB
from granite_ray.errors import ConfigError
from granite_ray.model.architecture import read_architecture
from granite_ray.model.state import block_bytes, slot_bytes
from granite_ray.records import Completion, Prompt, SamplingParams
from granite_ray.tokenizer import load_tokenizer
from tests.family import FAMILY, write_member
from tests.unit.engine.conftest import load_plain
from tests.unit.engine.test_engines import gather_answers, prompts

NUM_LAYERS = 11
"""Enough for the first attention layer of every hybrid."""
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 48, 64, 100, 127, 128, 129, 255, 300, 511, 700)
NEAR = 1e-4
"""Two logits nearer than this may change places by rounding."""


@pytest.fixture
def backend() -> str:
    return "native"


@pytest.fixture(scope="module", params=FAMILY)
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("family") / request.param
    return open_checkpoint(ModelConfig(path=str(write_member(folder, request.param, NUM_LAYERS))))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("family") / "hybrid"
    return open_checkpoint(ModelConfig(path=str(write_member(folder, "granite-4.0-h-tiny", 7))))


def gib(checkpoint: Checkpoint, num_blocks: int, num_slots: int = 0) -> float:
    """Memory for so many blocks and twice the state slots: these may take one half of it."""
    architecture = read_architecture(checkpoint.config)
    blocks = num_blocks * block_bytes(architecture, 16, torch.float32)
    return (blocks + 2 * num_slots * slot_bytes(architecture, torch.float32)) / GIB


def assert_greedy(checkpoint: Checkpoint, prompt: Prompt, answer: Completion) -> None:
    """Each token is the likeliest after those before it, as transformers has it."""
    model = checkpoint_model(checkpoint)
    ids = [*prompt.token_ids, *answer.token_ids]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, len(prompt.token_ids) - 1 :]
    expected = list(answer.token_ids)
    if answer.finish_reason == "stop":
        expected.append(model.config.eos_token_id)
    for row, token_id in zip(logits, expected, strict=False):
        assert row[token_id] >= row.max() - NEAR


LOADED = {}


def checkpoint_model(checkpoint: Checkpoint):
    if checkpoint.path not in LOADED:
        LOADED.clear()
        LOADED[checkpoint.path] = load_plain(checkpoint.path)
    return LOADED[checkpoint.path]


def test_a_mixed_batch_in_partial_prefills_is_greedy_as_transformers(
    member: Checkpoint, start_engine: Callable[..., Engine]
) -> None:
    requests = [(prompt, SamplingParams(64)) for prompt in prompts(LENGTHS)]
    engine = start_engine(member, max_num_batched_tokens=200)
    answers = asyncio.run(gather_answers(engine, requests))
    for (prompt, _), answer in zip(requests, answers, strict=True):
        assert_greedy(member, prompt, answer)
        assert answer.finish_reason == "stop" or len(answer.token_ids) == 64
    variety = {token_id for answer in answers for token_id in answer.token_ids}
    assert len(variety) > 200, "a model that repeats itself proves nothing"


def test_preemption_sharing_and_company_change_no_token(
    member: Checkpoint, start_engine: Callable[..., Engine]
) -> None:
    begin = prompts([75], seed=8)[0].token_ids
    requests = [
        (Prompt(begin + prompt.token_ids, junctions=(75,)), SamplingParams(40))
        for prompt in prompts([3, 40, 90, 17, 60, 33, 8, 51], seed=9)
    ]
    small = dataclasses.replace(member, max_model_len=256)
    tight = start_engine(small, cache_gib=gib(member, 18, 6), max_num_seqs=8)
    crowded = asyncio.run(gather_answers(tight, requests))
    alone = [
        asyncio.run(start_engine(small, max_num_seqs=1).generate(*request)) for request in requests
    ]
    assert [answer.token_ids for answer in crowded] == [answer.token_ids for answer in alone]
    assert all(answer.num_cached_tokens == 0 for answer in alone)
    assert sum(answer.num_cached_tokens == 64 for answer in crowded) >= 5, "75 tokens are 4 blocks"
    for (prompt, _), answer in zip(requests, alone, strict=True):
        assert_greedy(member, prompt, answer)


def test_a_prompt_of_the_whole_context_is_answered(
    hybrid: Checkpoint, start_engine: Callable[..., Engine]
) -> None:
    [prompt] = prompts([2044])
    engine = start_engine(hybrid, max_num_batched_tokens=512)
    answer = asyncio.run(engine.generate(prompt, SamplingParams(4)))
    assert_greedy(hybrid, prompt, answer)


def test_memory_for_not_even_one_sequence_is_refused_at_start(
    moe: Checkpoint, hybrid: Checkpoint, start_engine: Callable[..., Engine]
) -> None:
    for checkpoint in (moe, hybrid):
        with pytest.raises(ConfigError, match=r"model\.max_model_len is 2048.*engine\.cache_gib"):
            start_engine(checkpoint, cache_gib=1e-5)


def test_ten_thousand_requests_leave_nothing_behind(moe: Checkpoint) -> None:
    numbers = random.Random(3)
    small = dataclasses.replace(moe, max_model_len=64)
    config = EngineConfig(backend="native", device="cpu", cache_gib=gib(moe, 40), max_num_seqs=16)
    engine = load_native_engine(small, load_tokenizer(moe.path), ModelConfig(), config, None)
    begins = [prompt.token_ids for prompt in prompts([20, 34], seed=2)]

    async def ask() -> None:
        begin = numbers.choice(begins)
        more = tuple(numbers.randrange(20, 740) for _ in range(numbers.randint(1, 20)))
        call = asyncio.ensure_future(
            engine.generate(Prompt(begin + more, (len(begin),)), SamplingParams(3))
            if numbers.random() < 0.8
            else engine.score(Prompt(begin + more), [(30, 31), (30, 32, 33), (40,)])
        )
        if numbers.random() < 0.05:
            await asyncio.sleep(0.005)
            call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async def ask_all() -> None:
        for _ in range(100):
            await asyncio.gather(*(ask() for _ in range(100)))
        await engine.generate(Prompt((30,)), SamplingParams(1))  # a step that drops the cancelled

    asyncio.run(ask_all())
    engine.shutdown()
    scheduler = engine._core._scheduler  # type: ignore[attr-defined]
    assert not scheduler.has_work
    assert scheduler._cache.num_free_blocks == 40
    assert not engine._core._continuations  # type: ignore[attr-defined]
    assert not engine._core._weighings  # type: ignore[attr-defined]
    assert not engine._unsettled
