"""What the native engine draws and what it says of it, whatever runs beside and however crowded."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from granite_ray.checkpoint import Checkpoint
from granite_ray.engine.front import EngineFront
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from tests.schemas import SCHEMAS
from tests.unit.engine.conftest import load_plain
from tests.unit.engine.test_engines import prompts
from tests.unit.engine.watched import Sizes, WatchedRunner, make_runner, start_native

Start = Callable[..., tuple[EngineFront, WatchedRunner]]
Request = tuple[Any, ...]


@pytest.fixture
def start() -> Iterator[Start]:
    started = []

    def start_one(checkpoint: Checkpoint, **sizes: int) -> tuple[EngineFront, WatchedRunner]:
        watched = WatchedRunner(make_runner(checkpoint, Sizes(**sizes))[0])
        engine, _ = start_native(checkpoint, watched, Sizes(**sizes))
        started.append(engine)
        return engine, watched

    yield start_one
    for engine in started:
        engine.shutdown()


def ask(engine: EngineFront, requests: list[Request]) -> list[Completion]:
    async def ask_all() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(*request) for request in requests))

    return asyncio.run(ask_all())


# log-probabilities ───────────────────────────────────────────────────────────────────────────────


def test_logprobs_are_the_log_softmax_of_transformers_logits(
    checkpoint: Checkpoint, start: Start
) -> None:
    """In one batch of greedy, sampled, penalized and bound texts, with prompts in parts."""
    wishes: list[Request] = [
        (SamplingParams(20, num_logprobs=3),),
        (SamplingParams(20, num_logprobs=3),),
        (SamplingParams(20, temperature=1.0, seed=2, num_logprobs=3),),
        (SamplingParams(20, temperature=1.0, top_k=9, top_p=0.9, seed=3, num_logprobs=3),),
        (SamplingParams(20, repetition_penalty=1.5, num_logprobs=3),),
        (SamplingParams(20, num_logprobs=3), Grammar(json.dumps(SCHEMAS["pydantic_invoice"]))),
    ]
    lengths = [1, 100, 33, 16, 17, 60]
    requests = [
        (prompt, *wish) for prompt, wish in zip(prompts(lengths, seed=4), wishes, strict=True)
    ]
    engine, _ = start(checkpoint, max_num_batched_tokens=24)
    model = load_plain(checkpoint.path)
    for (prompt, *_), answer in zip(requests, ask(engine, requests), strict=True):
        assert len(answer.token_ids) >= 10
        ids = torch.tensor([[*prompt.token_ids, *answer.token_ids]])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
        assert_logprobs(answer, logits.double().log_softmax(dim=-1))


def assert_logprobs(answer: Completion, expected: torch.Tensor) -> None:
    """Within 1e-3: logits of 15 and rounding that grows over the layers came to 1.5e-4."""
    assert [one.token_id for one in answer.logprobs] == list(answer.token_ids)
    for one, row in zip(answer.logprobs, expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-3)
        likeliest = row.topk(3)
        assert [logprob for _, logprob in one.top] == pytest.approx(
            likeliest.values.tolist(), abs=1e-3
        )
        for token_id, logprob in one.top:
            assert logprob == pytest.approx(float(row[token_id]), abs=1e-3)


# seeds ───────────────────────────────────────────────────────────────────────────────────────────


def sampled_requests() -> list[Request]:
    """Texts drawn in many ways, some beginning alike."""
    begin = prompts([40], seed=11)[0].token_ids
    params = [
        SamplingParams(40, temperature=0.8),
        SamplingParams(30, temperature=1.2, top_k=20),
        SamplingParams(40, temperature=1.0, top_p=0.8),
        SamplingParams(25, temperature=1.5, min_p=0.05),
        SamplingParams(40, temperature=0.7, repetition_penalty=1.3),
        SamplingParams(40, repetition_penalty=1.3),
        SamplingParams(40, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01),
        SamplingParams(40, temperature=1.0, stop=("e", "the")),
    ]
    tails = prompts([3, 20, 50, 9, 31, 8, 70, 26], seed=12)
    return [
        (Prompt(begin + tail.token_ids, junctions=(40,)), replace(sampling, seed=seed))
        for seed, (tail, sampling) in enumerate(zip(tails, params, strict=True))
    ]


def test_a_seed_gives_one_text_alone_in_a_batch_and_after_preemption(
    checkpoint: Checkpoint, start: Start
) -> None:
    requests = sampled_requests()
    alone = []
    for request in requests:
        engine, watched = start(checkpoint, max_num_seqs=1)
        alone += ask(engine, [request])
        assert not watched.preempted
    assert len({answer.text for answer in alone}) == len(alone)

    roomy, _ = start(checkpoint)
    assert ask(roomy, requests) == alone
    crowded, watched = start(checkpoint, num_blocks=11, num_slots=6, max_num_batched_tokens=50)
    assert ask(crowded, requests) == alone
    assert len(watched.preempted) >= 2, "the cache is too small for all"


def test_other_seeds_give_other_texts(moe: Checkpoint, start: Start) -> None:
    [prompt] = prompts([20])
    engine, _ = start(moe)
    requests: list[Request] = [
        (prompt, SamplingParams(16, temperature=1.0, seed=seed % 10)) for seed in range(20)
    ]
    answers = ask(engine, requests)
    assert answers[:10] == answers[10:]
    assert len({answer.text for answer in answers}) == 10
