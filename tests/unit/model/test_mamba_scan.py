"""The recurrence in pieces against the recurrence written out, token by token, in float64."""

import random
from dataclasses import fields

import pytest
import torch

from granite_ray.model.mamba_scan import (
    READ_LENGTH,
    ScanInputs,
    scan,
    scan_trie,
    step_each,
    step_together,
)
from granite_ray.model.trie import visible_nodes

NUM_HEADS, HEAD_SIZE, STATE_SIZE = 6, 5, 7
# float32 against float64; sums of about a hundred terms.
TOLERANCE = 1e-6


def make_tokens(num_tokens: int, num_groups: int = 2, max_decay: float = 3.0) -> ScanInputs:
    """Return tokens of which some forget nearly all and some nearly nothing."""
    generator = torch.Generator().manual_seed(num_tokens)
    dt_LH = torch.rand(num_tokens, NUM_HEADS, generator=generator) ** 3
    return ScanInputs(
        x_LHM=torch.randn(num_tokens, NUM_HEADS, HEAD_SIZE, generator=generator),
        B_LGR=torch.randn(num_tokens, num_groups, STATE_SIZE, generator=generator),
        C_LGR=torch.randn(num_tokens, num_groups, STATE_SIZE, generator=generator),
        dt_LH=dt_LH,
        log_decay_LH=-max_decay * dt_LH,
    )


def make_state(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, NUM_HEADS, HEAD_SIZE, STATE_SIZE, generator=generator)


def recur(tokens: ScanInputs, state_HMR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the tokens read and the state after them."""
    heads_per_group = NUM_HEADS // tokens.B_LGR.shape[1]
    state, outputs = state_HMR.double(), []
    for x_HM, B_GR, C_GR, dt_H, log_decay_H in zip(
        *(tokens.x_LHM, tokens.B_LGR, tokens.C_LGR, tokens.dt_LH, tokens.log_decay_LH), strict=True
    ):
        B_HR, C_HR = (part.double().repeat_interleave(heads_per_group, 0) for part in (B_GR, C_GR))
        state = state * log_decay_H.double().exp()[:, None, None]
        state = state + torch.einsum("h,hm,hr->hmr", dt_H.double(), x_HM.double(), B_HR)
        outputs.append(torch.einsum("hmr,hr->hm", state, C_HR))
    return torch.stack(outputs), state


def check_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 100])
def test_scan_moves_and_reads_as_the_recurrence(num_tokens: int, num_groups: int) -> None:
    tokens, state = make_tokens(num_tokens, num_groups), make_state()
    expected, expected_state = recur(tokens, state)
    check_close(scan(tokens, state), expected)
    check_close(state, expected_state)


def test_scan_stays_exact_where_states_are_forgotten_at_once() -> None:
    tokens, state = make_tokens(100, max_decay=1000.0), make_state()
    expected, expected_state = recur(tokens, state)
    assert tokens.log_decay_LH.sum(0).min() < -1e4
    check_close(scan(tokens, state), expected)
    check_close(state, expected_state)


@pytest.mark.parametrize("num_tokens", [1, 9, READ_LENGTH, READ_LENGTH + 1, 2 * READ_LENGTH + 30])
def test_each_token_of_a_trie_reads_as_the_last_of_its_path(num_tokens: int) -> None:
    numbers = random.Random(num_tokens)
    parents = tuple(numbers.randrange(max(-1, node - 20), node) for node in range(num_tokens))
    tokens, state = make_tokens(num_tokens), make_state()
    before = state.clone()
    actual = scan_trie(tokens, visible_nodes(parents, torch.device("cpu")), state)
    expected = torch.stack([read_after_ancestors(tokens, parents, n) for n in range(num_tokens)])
    check_close(actual, expected)
    assert torch.equal(state, before)


def read_after_ancestors(tokens: ScanInputs, parents: tuple[int, ...], node: int) -> torch.Tensor:
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    rows = (getattr(tokens, field.name)[path] for field in fields(tokens))
    return recur(ScanInputs(*rows), make_state())[0][-1]


@pytest.mark.parametrize("step", [step_each, step_together])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_step_moves_the_named_slots_by_one_token(step, num_groups: int) -> None:
    slots, states = [4, 0, 2], make_state(6)
    tokens, before = make_tokens(len(slots), num_groups), states.clone()
    actual = step(tokens, states, torch.tensor(slots))
    for index, slot in enumerate(slots):
        expected, expected_state = recur(tokens.rows(index, index + 1), before[slot])
        check_close(actual[index], expected[0])
        check_close(states[slot], expected_state)
    for slot in set(range(6)) - set(slots):
        assert torch.equal(states[slot], before[slot])
