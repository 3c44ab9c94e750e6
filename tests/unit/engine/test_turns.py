"""Interactive answers beside others, where steps take as long as a model of them says."""

from collections.abc import Callable

import pytest

from granite_ray.engine.sequence import ScheduledSequence, Sequence, StepPlan
from granite_ray.engine.turns import MAX_SLOWDOWN, Turns

ALONE_S = 0.002
Seconds = Callable[[int], float]


def plan(num_interactive: int, num_others: int) -> StepPlan:
    kinds = [True] * num_interactive + [False] * num_others
    sequences = [
        Sequence(at, [1], 1, 9, is_interactive=is_interactive)
        for at, is_interactive in enumerate(kinds)
    ]
    return StepPlan(tuple(ScheduledSequence(sequence, 1) for sequence in sequences))


def steps_until(
    turns: Turns, num_tokens: int, num_others: int, seconds: Seconds
) -> tuple[float, int]:
    """Let an interactive sequence grow; return how long it took, and in how many steps of it."""
    took, num_shared = 0.0, 0
    for _ in range(num_tokens):
        beside = 0 if turns.are_interactive_only else num_others
        num_shared += beside > 0
        step_s = seconds(1 + beside)
        turns.note(plan(1, beside), step_s)
        took += step_s
    return took, num_shared


def costs_nothing(_: int) -> float:
    return ALONE_S


def costs_by_number(num_sequences: int) -> float:
    return ALONE_S * num_sequences


def test_all_steps_are_shared_where_others_cost_nothing() -> None:
    turns = Turns()
    steps_until(turns, 10, 8, costs_nothing)  # it must be seen first
    assert steps_until(turns, 100, 8, costs_nothing) == (pytest.approx(100 * ALONE_S), 100)


@pytest.mark.parametrize("num_others", [1, 8, 63])
def test_where_others_cost_much_answers_take_twice_as_long_and_others_go_on(
    num_others: int,
) -> None:
    turns = Turns()
    steps_until(turns, 200, num_others, costs_by_number)
    took, num_shared = steps_until(turns, 1000, num_others, costs_by_number)
    assert took <= 1.1 * MAX_SLOWDOWN * 1000 * ALONE_S
    assert took >= 0.9 * min(MAX_SLOWDOWN, 1 + num_others) * 1000 * ALONE_S
    assert num_shared >= 900 / num_others


def test_a_debt_is_forgotten_when_nobody_waits() -> None:
    turns = Turns()
    turns.note(plan(1, 5), 1.0)
    assert turns.are_interactive_only
    turns.note(plan(0, 5), 1.0)
    assert not turns.are_interactive_only


def test_answers_that_are_alone_are_never_held_back() -> None:
    turns = Turns()
    for seconds in (0.5, 0.4, 0.6, 0.5):
        turns.note(plan(3, 0), seconds)
        assert not turns.are_interactive_only
