"""The native engine against transformers' own classes, for every row of the Granite family."""

import asyncio
import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

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
from tests.family import FAMILY, PRESETS, write_member
from tests.unit.engine.conftest import load_plain
from tests.unit.engine.test_engines import gather_answers, prompts
from tests.unit.engine.watched import Sizes, WatchedRunner, make_runner, start_native

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 48, 64, 100, 127, 128, 129, 255, 300, 511, 700)
NEAR = 1e-4
"""Two logits nearer than this may change places by rounding."""


@pytest.fixture
def backend() -> str:
    return "native"


@pytest.fixture(scope="module", params=FAMILY)
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    name = request.param
    folder = write_member(tmp_path_factory.mktemp("family") / name, name, few_layers(name))
    return open_checkpoint(ModelConfig(path=str(folder)))


def few_layers(name: str) -> int:
    """Of a hybrid, all up to one after its first attention layer."""
    layer_types = json.loads((PRESETS / name / "config.json").read_text()).get("layer_types", [])
    return layer_types.index("attention") + 2 if "mamba" in layer_types else 4


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("family") / "hybrid"
    return open_checkpoint(ModelConfig(path=str(write_member(folder, "granite-4.0-h-micro", 7))))


def gib(checkpoint: Checkpoint, num_blocks: int, num_slots: int = 0) -> float:
    """Memory for so many blocks and twice the state slots: these may take one half of it."""
    architecture = read_architecture(checkpoint.config)
    blocks = num_blocks * block_bytes(architecture, 16, torch.float32)
    return (blocks + 2 * num_slots * slot_bytes(architecture, torch.float32)) / GIB


class Oracle:
    """A checkpoint as transformers runs it, and where its answers hang by a rounding error.

    A router that finds two experts equally good sends a token to either, and from there on right
    implementations differ. `TIE` is a few units in the last place of its scores.
    """

    TIE = 2e-5

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = load_plain(checkpoint.path)
        self._gaps: list[torch.Tensor] = []
        for module in self.model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(self._note_gap)

    def _note_gap(self, router: Any, inputs: Any, _: object) -> None:
        scores = torch.nn.functional.linear(inputs[0].flatten(0, -2), router.weight)
        top = scores.topk(router.top_k + 1).values
        self._gaps.append(top[:, -2] - top[:, -1])

    def num_greedy(self, prompt: Prompt, answer: Completion) -> int:
        """Check that tokens are the likeliest; return how many were there before a tie."""
        self._gaps.clear()
        expected = list(answer.token_ids)
        if answer.finish_reason == "stop":
            expected.append(self.model.config.eos_token_id)
        start = len(prompt.token_ids) - 1
        with torch.inference_mode():
            logits = self.model(torch.tensor([[*prompt.token_ids, *answer.token_ids]])).logits[0]
            is_tied = torch.zeros(len(logits), dtype=torch.bool)
            for gap in self._gaps:
                is_tied |= gap < self.TIE
        for number, token_id in enumerate(expected):
            if is_tied[: start + number + 1].any():
                return number
            row = logits[start + number]
            assert row[token_id] >= row.max() - NEAR
        return len(expected)


@pytest.fixture(scope="module")
def oracle(member: Checkpoint) -> Oracle:
    return Oracle(member)


def test_a_mixed_batch_in_partial_prefills_is_greedy_as_transformers(
    member: Checkpoint, oracle: Oracle, start_engine: Callable[..., Engine]
) -> None:
    requests = [(prompt, SamplingParams(64)) for prompt in prompts(LENGTHS)]
    engine = start_engine(member, max_num_batched_tokens=200)
    answers = asyncio.run(gather_answers(engine, requests))
    num_checked = 0
    for (prompt, _), answer in zip(requests, answers, strict=True):
        num_checked += oracle.num_greedy(prompt, answer)
        assert answer.finish_reason == "stop" or len(answer.token_ids) == 64
    assert num_checked > 0.6 * sum(len(answer.token_ids) for answer in answers)
    variety = {token_id for answer in answers for token_id in answer.token_ids}
    assert len(variety) > 200, "a model that repeats itself proves nothing"


def answer(
    checkpoint: Checkpoint,
    runner: WatchedRunner,
    sizes: Sizes,
    requests: list[tuple[Prompt, SamplingParams]],
) -> list[Completion]:
    """Start an engine around a runner, ask it, and end it."""
    engine, _ = start_native(checkpoint, runner, sizes)
    try:
        return asyncio.run(gather_answers(engine, requests))
    finally:
        engine.shutdown()


MIXED = ("granite-3.1-2b", "granite-3.1-3b-a800m", "granite-4.0-h-350m", "granite-4.0-h-small")
"""One of each kind; the others run with the slow tests."""


@pytest.mark.parametrize(
    "member",
    [name if name in MIXED else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY],
    indirect=True,
)
def test_preemption_sharing_and_company_change_no_token(member: Checkpoint, oracle: Oracle) -> None:
    begin = prompts([75], seed=8)[0].token_ids
    requests = [
        (Prompt(begin + prompt.token_ids, junctions=(75,)), SamplingParams(40))
        for prompt in prompts([3, 40, 90, 17, 60, 33, 8, 51], seed=9)
    ]
    crowd, one = Sizes(num_blocks=18, num_slots=6), Sizes(num_blocks=18, max_num_seqs=1)
    watched = WatchedRunner(make_runner(member, crowd)[0])
    crowded = answer(member, watched, crowd, requests)
    assert watched.preempted
    # Each in a cache of its own, whose memory holds what those before have left.
    alone = [answer(member, watched, one, [request])[0] for request in requests]
    assert all(answer.num_cached_tokens == 0 for answer in alone)
    assert sum(answer.num_cached_tokens == 64 for answer in crowded) >= 5, "75 tokens are 4 blocks"
    num_checked = 0
    for (prompt, _), found, expected in zip(requests, crowded, alone, strict=True):
        num_sure = oracle.num_greedy(prompt, expected)
        assert found.token_ids[:num_sure] == expected.token_ids[:num_sure]
        num_checked += num_sure
    assert num_checked > 0.6 * sum(len(answer.token_ids) for answer in alone)


def test_a_prompt_of_the_whole_context_is_answered(
    hybrid: Checkpoint, start_engine: Callable[..., Engine]
) -> None:
    [prompt] = prompts([2044])
    engine = start_engine(hybrid, max_num_batched_tokens=512)
    answer = asyncio.run(engine.generate(prompt, SamplingParams(4)))
    assert Oracle(hybrid).num_greedy(prompt, answer) == 4


def test_memory_for_not_even_one_sequence_is_refused_at_start(
    moe: Checkpoint, hybrid: Checkpoint, start_engine: Callable[..., Engine]
) -> None:
    for checkpoint in (moe, hybrid):
        with pytest.raises(ConfigError, match=r"model\.max_model_len is 2048.*engine\.cache_gib"):
            start_engine(checkpoint, cache_gib=1e-5)


@pytest.mark.parametrize("num_requests", [1_000, pytest.param(10_000, marks=[pytest.mark.slow])])
def test_many_requests_through_a_small_cache_leave_nothing_behind(
    moe: Checkpoint, num_requests: int
) -> None:
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
        for _ in range(num_requests // 100):
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
