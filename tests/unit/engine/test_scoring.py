"""Label scores against one plain forward per label."""

import asyncio
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from granite_ray.engine.choices import plan_branches
from granite_ray.records import Prompt
from tests.unit.engine.conftest import load_plain

TOKEN_IDS = range(20, 740)


def score_plainly(model, prompt, choice):
    """One forward over prompt and choice, alone."""
    ids = torch.tensor([[*prompt.token_ids, *choice]])
    with torch.inference_mode():
        logits = model(ids).logits[0].double()
    start = len(prompt.token_ids) - 1
    table = logits[start : start + len(choice)].log_softmax(dim=-1)
    return sum(float(table[place, token]) for place, token in enumerate(choice))


def make_prompt(numbers, length):
    return Prompt(tuple(numbers.choice(TOKEN_IDS) for _ in range(length)))


def test_scores_equal_a_plain_forward_per_choice(checkpoint, start_engine):
    numbers = random.Random(5)
    shared = tuple(numbers.choice(TOKEN_IDS) for _ in range(3))
    choices = [shared, shared[:1], shared[:2], (*shared, 40), (*shared, 41, 42), (50,), (60, 61)]
    cases = [(make_prompt(numbers, length), choices) for length in (30, 1, 77)]
    cases.append((make_prompt(numbers, 20), choices[:2]))
    engine = start_engine(checkpoint)

    async def score_all():
        return await asyncio.gather(*(engine.score(*case) for case in cases))

    model = load_plain(checkpoint.path)
    for (prompt, asked), scores in zip(cases, asyncio.run(score_all()), strict=True):
        expected = [score_plainly(model, prompt, choice) for choice in asked]
        assert scores == pytest.approx(expected, abs=1e-4)
        assert max(expected) - min(expected) > 1


def test_a_thousand_choices_in_small_batches_equal_one_by_one(moe, start_engine):
    numbers = random.Random(6)
    prompt = make_prompt(numbers, 25)
    choices = [
        tuple(numbers.choice(TOKEN_IDS) for _ in range(numbers.randint(1, 6))) for _ in range(1000)
    ]
    engine = start_engine(moe, max_num_batched_tokens=500)
    scores = asyncio.run(engine.score(prompt, choices))
    model = load_plain(moe.path)
    for index in numbers.sample(range(1000), 25):
        assert scores[index] == pytest.approx(
            score_plainly(model, prompt, choices[index]), abs=1e-4
        )


def test_no_choices_have_no_scores(moe, start_engine):
    assert asyncio.run(start_engine(moe).score(Prompt((30, 31)), [])) == []


@given(st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), max_size=30))
def test_every_choice_is_read_off_exactly_one_branch_that_begins_with_it(choices):
    branches = {b.token_ids: b.choice_indexes for b in plan_branches(tuple(choices))}
    read = sorted(index for indexes in branches.values() for index in indexes)
    assert read == list(range(len(choices)))
    for token_ids, indexes in branches.items():
        for index in indexes:
            assert token_ids[: len(choices[index][:-1])] == choices[index][:-1]
    for branch in branches:
        others = [other for other in branches if other != branch]
        assert not any(other[: len(branch)] == branch for other in others), "computed twice"
