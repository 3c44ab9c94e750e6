"""Choices against transformers' own processors, against plain formulas, and against chance."""

import asyncio
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from granite_ray.engine.continuation import Continuation
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.engine.requests import GenerateRequest
from granite_ray.engine.sampling import (
    choose_tokens,
    compute_masks,
    penalize_repetition,
    read_logprobs,
    weigh_tokens,
)
from granite_ray.errors import RowFailure
from granite_ray.records import Grammar, Prompt, SamplingParams
from tests.schemas import SCHEMAS
from tests.unit.engine.conftest import load_plain

VOCAB_SIZE = 750  # no multiple of 32, as in Granite 3
PROMPT = Prompt((30, 31, 32, 31, 700))

WISHES = {
    "greedy": SamplingParams(9),
    "penalty": SamplingParams(9, repetition_penalty=1.7),
    "temperature": SamplingParams(9, temperature=0.7),
    "top_k": SamplingParams(9, temperature=1.3, top_k=20),
    "top_p": SamplingParams(9, temperature=0.9, top_p=0.8),
    "min_p": SamplingParams(9, temperature=1.5, min_p=0.1),
    "all": SamplingParams(9, 1.2, top_k=90, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
    "top_k beyond the vocabulary": SamplingParams(9, temperature=1.0, top_k=5000),
}
SAMPLED = [name for name, sampling in WISHES.items() if sampling.temperature]
MIXED = list(WISHES.values())
"""Wishes of neighbours in one batch."""


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return GrammarCompiler(tokenizer.tokenizer_json, VOCAB_SIZE, tokenizer.eos_token_ids)


@pytest.fixture
def start(tokenizer, grammars):
    """Start continuations, under a schema or without."""

    def start_one(sampling, schema=None, prompt=PROMPT):
        grammar = None if schema is None else Grammar(json.dumps(schema))
        matcher = None if grammar is None else grammars.matcher(grammar)
        return Continuation(GenerateRequest(prompt, sampling, grammar), tokenizer, matcher)

    return start_one


def random_logits(num_rows, seed=0, vocab_size=VOCAB_SIZE):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_rows, vocab_size, generator=generator)


def prompts(lengths):
    numbers = random.Random(0)
    return [Prompt(tuple(numbers.randrange(20, 740) for _ in range(length))) for length in lengths]


@pytest.mark.parametrize("name", SAMPLED)
def test_weights_are_the_probabilities_that_transformers_samples_from(moe, start, name):
    sampling = WISHES[name]
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(5)
        told = load_plain(moe.path).generate(
            torch.tensor([PROMPT.token_ids]),
            do_sample=True,
            max_new_tokens=12,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
    continuation = start(sampling)
    for logits, scores, token_id in zip(
        told.logits, told.scores, told.sequences[0, len(PROMPT.token_ids) :].tolist(), strict=True
    ):
        ours = logits.clone()
        penalize_repetition(ours, [continuation])
        weights = weigh_tokens(ours, [sampling])
        torch.testing.assert_close(weights / weights.sum(), scores.softmax(dim=-1))
        assert ((weights > 0) == (scores > -torch.inf)).all()
        continuation.append(token_id)
    assert len(continuation.token_ids) > 8


def test_a_flat_distribution_wider_than_the_candidates_is_cut_at_the_right_place():
    logits = 0.3 * random_logits(2, vocab_size=9000)
    shares = 0.97, 0.3
    weights = weigh_tokens(logits, [SamplingParams(1, 1.0, top_p=share) for share in shares])
    for row, top_p in enumerate(shares):
        probabilities = sorted(logits[row].double().softmax(dim=-1).tolist(), reverse=True)
        sums = np.cumsum(probabilities)
        assert int((weights[row] > 0).sum()) == 1 + int((sums < top_p).sum())
    assert (weights[0] > 0).sum() > 5000


def test_a_row_that_keeps_all_loses_none_beside_one_that_keeps_few():
    logits = 0.3 * random_logits(2, vocab_size=9000)
    weights = weigh_tokens(logits, [SamplingParams(1, 1.0, top_p=0.1), SamplingParams(1, 1.0)])
    assert 0 < (weights[0] > 0).sum() < 1000
    assert (weights[1] > 0).all()


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_the_repetition_penalty_is_that_of_transformers(start, penalty):
    logits = random_logits(3)
    seen = [*PROMPT.token_ids, 40, 41, 40, 31]
    assert {float(logits[0, token_id]) > 0 for token_id in seen} == {True, False}
    scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[:1])
    continuations = [
        start(SamplingParams(9, repetition_penalty=penalty)),
        start(SamplingParams(9)),
        start(SamplingParams(9, repetition_penalty=2 * penalty)),
    ]
    for token_id in seen[len(PROMPT.token_ids) :]:
        continuations[0].append(token_id)
    penalized = logits.clone()
    penalize_repetition(penalized, continuations)
    torch.testing.assert_close(penalized[:1], scores)
    assert torch.equal(penalized[1], logits[1])
    changed = (penalized[2] != logits[2]).nonzero()[:, 0].tolist()
    assert changed == sorted(set(PROMPT.token_ids))


def test_top_p_keeps_all_tokens_that_are_as_likely_as_the_last_it_needs():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 2.0, 0.0]])
    weights = weigh_tokens(logits, [SamplingParams(1, temperature=1.0, top_p=0.3)])
    assert (weights[0] > 0).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("values", [{"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}])
def test_the_strictest_filters_leave_the_likeliest_token(start, values):
    logits = random_logits(50)
    ones = [start(SamplingParams(9, temperature=2.0, seed=seed, **values)) for seed in range(50)]
    assert choose_tokens(logits, ones, {}) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-5, 1e-30])
def test_the_lowest_temperatures_are_greedy(start, temperature):
    logits = random_logits(20)
    continuations = [start(SamplingParams(9, temperature=temperature)) for _ in range(20)]
    assert choose_tokens(logits, continuations, {}) == logits.argmax(dim=-1).tolist()


def test_greedy_takes_the_likeliest_whatever_the_filters_say(start):
    logits = random_logits(20)
    continuations = [start(SamplingParams(9, top_k=3, top_p=0.1, min_p=0.5)) for _ in range(20)]
    assert choose_tokens(logits, continuations, {}) == logits.argmax(dim=-1).tolist()


def chi_square_excess(counts, expected):
    """How many standard deviations the statistic lies above its mean; rare tokens are pooled."""
    order = np.argsort(expected)
    num_pooled = int((np.cumsum(expected[order]) < 10).sum()) + 1
    pooled = np.append(expected[order][num_pooled:], expected[order][:num_pooled].sum())
    seen = np.append(counts[order][num_pooled:], counts[order][:num_pooled].sum())
    freedom = len(pooled) - 1
    assert freedom >= 5
    return (((seen - pooled) ** 2 / pooled).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", SAMPLED)
def test_tokens_are_drawn_as_often_as_their_weights_say(start, name):
    sampling = WISHES[name]
    num_draws = 6000
    logits = 0.5 * random_logits(1)
    continuations = [start(replace(sampling, seed=seed)) for seed in range(num_draws)]
    drawn = choose_tokens(logits.expand(num_draws, -1), continuations, {})
    penalize_repetition(logits, continuations[:1])
    weights = weigh_tokens(logits, [sampling])[0].double()
    expected = (weights / weights.sum() * num_draws).numpy()
    counts = np.bincount(drawn, minlength=VOCAB_SIZE)
    assert counts[expected == 0].sum() == 0
    assert abs(chi_square_excess(counts, expected)) < 4


def test_the_ends_of_a_distribution_are_tokens_that_the_filters_leave(start):
    logits = random_logits(1)
    weights = weigh_tokens(logits, [WISHES["top_k"]])
    first, *_, last = weights[0].nonzero()[:, 0].tolist()
    assert 0 < first < last < VOCAB_SIZE - 1
    for number, token_id in ((0.0, first), (math.nextafter(1.0, 0.0), last)):
        continuation = start(WISHES["top_k"])
        continuation.number = number
        assert choose_tokens(logits, [continuation], {}) == [token_id]


def test_the_numbers_along_one_text_are_drawn_evenly_and_do_not_hang_together(start):
    continuation = start(SamplingParams(100_000, temperature=1.0, seed=3))
    numbers = []
    for _ in range(20_000):
        numbers.append(continuation.number)
        continuation.append(30)
    cells = np.floor(np.array(numbers) * 10).astype(int)
    pairs = np.bincount(10 * cells[:-1] + cells[1:], minlength=100)
    assert abs(chi_square_excess(pairs, np.full(100, pairs.sum() / 100))) < 4
    assert min(numbers) >= 0
    assert max(numbers) < 1


def test_a_choice_is_the_same_in_any_company(start, grammars):
    schemas = [None, None, SCHEMAS["pydantic_invoice"], SCHEMAS["string"], SCHEMAS["number"]]
    cases = [
        (replace(sampling, seed=seed), schema)
        for seed, schema in enumerate(schemas)
        for sampling in MIXED
    ]
    logits = random_logits(len(cases))

    def choose(rows):
        continuations = [start(*cases[row]) for row in rows]
        token_ids = choose_tokens(
            logits[rows], continuations, compute_masks(continuations, grammars)
        )
        return dict(zip(rows, token_ids, strict=True))

    numbers = random.Random(1)
    together = choose(list(range(len(cases))))
    assert len(set(together.values())) > 20
    for size in (1, 1, 1, 2, 3, 5, 8, 13, 21):
        for _ in range(5):
            for row, token_id in choose(numbers.sample(range(len(cases)), size)).items():
                assert token_id == together[row]


def test_several_grammars_share_a_batch_with_free_sequences(start, grammars):
    wanted = [None, *SCHEMAS.values(), None]
    logits = random_logits(len(wanted))
    continuations = [start(SamplingParams(99), schema) for schema in wanted]
    for _ in range(6):
        allowed = np.ones((len(wanted), VOCAB_SIZE), bool)
        for row, one in enumerate(continuations):
            if one.matcher is not None and not one.is_finished:
                allowed[row] = one.matcher.allowed_tokens()
        expected = np.where(allowed, logits.numpy(), -np.inf).argmax(axis=1).tolist()
        masks = compute_masks(continuations, grammars)
        assert choose_tokens(logits, continuations, masks) == expected
        assert expected[0] == int(logits[0].argmax())
        for one, token_id in zip(continuations, expected, strict=True):
            one.append(token_id)
    assert sum(one.is_finished for one in continuations) < len(wanted) / 2


def test_logits_are_left_as_they_were(start, grammars):
    logits = random_logits(len(MIXED))
    before = logits.clone()
    continuations = [start(sampling, SCHEMAS["integer"]) for sampling in MIXED]
    choose_tokens(logits, continuations, compute_masks(continuations, grammars))
    assert torch.equal(logits, before)


def test_half_precision_logits_are_chosen_from_like_whole_ones(start):
    logits = random_logits(len(MIXED)).bfloat16()
    chosen = [
        choose_tokens(given, [start(sampling) for sampling in MIXED], {})
        for given in (logits, logits.float())
    ]
    assert chosen[0] == chosen[1]


def test_a_grammar_that_breaks_fails_its_own_sequence_only(start, grammars, tokenizer):
    continuations = [start(SamplingParams(9), {"type": "integer"}) for _ in range(3)]
    with pytest.raises(RowFailure):
        continuations[1].matcher.consume(tokenizer.encode_text(" documentation")[0])
    masks = compute_masks(continuations, grammars)
    token_ids = choose_tokens(random_logits(3), continuations, masks)
    for continuation, token_id in zip(continuations, token_ids, strict=True):
        continuation.append(token_id)
    failure = continuations[1].request.future.exception(timeout=0)
    assert isinstance(failure, RowFailure)
    assert failure.error_type == "schema_violation"
    assert [one.is_finished for one in continuations] == [False, True, False]
    assert all(tokenizer.decode([token_ids[row]])[0] in "-0123456789" for row in (0, 2))


def test_a_finished_sequence_gets_no_mask(start, grammars):
    cancelled, running = (start(SamplingParams(9), {"type": "integer"}) for _ in range(2))
    cancelled.request.future.cancel()
    assert list(compute_masks([cancelled, running], grammars)) == [1]
    assert compute_masks([], grammars) == {}


@pytest.mark.parametrize("num_logprobs", [0, 1, 7, 5000])
def test_logprobs_are_those_of_the_raw_logits(start, grammars, num_logprobs):
    asked = [replace(sampling, num_logprobs=num_logprobs) for sampling in MIXED]
    logits = random_logits(2 * len(MIXED))
    continuations = [
        *(start(sampling, SCHEMAS["object"]) for sampling in asked),
        *(start(sampling) for sampling in MIXED),
    ]
    token_ids = choose_tokens(logits, continuations, compute_masks(continuations, grammars))
    found = read_logprobs(logits, token_ids, continuations)
    assert found[len(MIXED) :] == [None] * len(MIXED)
    for row in range(len(MIXED)):
        expected = logits[row].double() - logits[row].double().exp().sum().log()
        ranked = sorted(range(VOCAB_SIZE), key=lambda token_id: -expected[token_id])
        assert found[row].token_id == token_ids[row]
        assert found[row].logprob == pytest.approx(float(expected[token_ids[row]]), abs=1e-5)
        assert [token_id for token_id, _ in found[row].top] == ranked[:num_logprobs]
        for token_id, logprob in found[row].top:
            assert logprob == pytest.approx(float(expected[token_id]), abs=1e-5)


def test_neighbours_get_as_many_alternatives_as_each_asks_for(start):
    wanted = [3, None, 0, 1]
    logits = random_logits(len(wanted))
    continuations = [start(SamplingParams(9, num_logprobs=number)) for number in wanted]
    found = read_logprobs(logits, choose_tokens(logits, continuations, {}), continuations)
    assert [entry and len(entry.top) for entry in found] == wanted
    assert found[3].top == ((found[3].token_id, found[3].logprob),)


def test_greedy_text_with_a_repetition_penalty_equals_that_of_transformers(
    checkpoint, start_engine, tokenizer
):
    [prompt] = prompts([60])
    answer = asyncio.run(
        start_engine(checkpoint).generate(prompt, SamplingParams(24, repetition_penalty=2.5))
    )
    with torch.inference_mode():
        plain, penalized = (
            load_plain(checkpoint.path).generate(
                torch.tensor([prompt.token_ids]),
                max_new_tokens=24,
                do_sample=False,
                repetition_penalty=penalty,
            )[0, len(prompt.token_ids) :]
            for penalty in (1.0, 2.5)
        )
    assert plain.tolist() != penalized.tolist()
    assert answer.text == tokenizer.decode(penalized.tolist())


def test_completions_bring_their_tokens_and_logprobs(checkpoint, start_engine, tokenizer):
    sampling = SamplingParams(12, temperature=0.8, seed=4, num_logprobs=2)
    answer = asyncio.run(start_engine(checkpoint).generate(PROMPT, sampling))
    assert answer.text == tokenizer.decode(answer.token_ids)
    assert len(answer.token_ids) == answer.num_completion_tokens > 4
    ids = torch.tensor([[*PROMPT.token_ids, *answer.token_ids]])
    with torch.inference_mode():
        logits = load_plain(checkpoint.path)(ids).logits[0, len(PROMPT.token_ids) - 1 : -1]
    expected = logits.double().log_softmax(dim=-1)
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    for entry, row in zip(answer.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert dict(entry.top) == pytest.approx(
            {int(token_id): float(row[token_id]) for token_id in row.topk(2).indices}, abs=1e-4
        )
