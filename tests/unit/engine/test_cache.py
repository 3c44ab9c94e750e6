"""What is found again: shared blocks, snapshots at junctions, and what is given up first."""

import pytest

from granite_ray.engine.scheduler import SchedulerLimits
from granite_ray.engine.sequence import Sequence, StepPlan
from tests.unit.engine.simulation import Simulation

BLOCK_SIZE = 4
LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_num_branch_tokens=16)


def numbers(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


@pytest.fixture
def attention() -> Simulation:
    """A model whose every full block can be shared."""
    return Simulation(LIMITS, num_blocks=16, block_size=BLOCK_SIZE)


@pytest.fixture
def hybrid() -> Simulation:
    """A model that shares blocks only up to snapshots; there is room for two of them."""
    return Simulation(LIMITS, num_blocks=32, block_size=BLOCK_SIZE, num_slots=6)


def run_one(
    simulation: Simulation, prompt: tuple[int, ...], junctions: tuple[int, ...] = ()
) -> int:
    """Run a sequence to its end; return how many tokens it found in the cache."""
    sequence = simulation.add(prompt, junctions=junctions)
    simulation.run()
    return sequence.num_cached_tokens


def test_full_blocks_of_a_finished_sequence_are_shared(attention: Simulation) -> None:
    assert run_one(attention, numbers(0, 10)) == 0
    assert run_one(attention, (*numbers(0, 10), 99)) == 8
    assert run_one(attention, (*numbers(0, 7), 99, 100)) == 4
    assert run_one(attention, (99, *numbers(1, 10))) == 0


def test_last_token_of_a_prompt_is_always_computed(attention: Simulation) -> None:
    run_one(attention, numbers(0, 8))
    assert run_one(attention, numbers(0, 8)) == 4
    assert run_one(attention, numbers(0, 9)) == 8


def test_the_same_block_behind_another_beginning_is_another_block(attention: Simulation) -> None:
    run_one(attention, (*numbers(0, 4), *numbers(50, 54), 9))
    assert run_one(attention, (*numbers(10, 14), *numbers(50, 54), 9)) == 0
    assert run_one(attention, (*numbers(50, 54), 9)) == 0


def test_generated_tokens_are_shared(attention: Simulation) -> None:
    first = attention.add(numbers(0, 5), num_new=6)
    attention.run()
    assert run_one(attention, (*first.token_ids, 99)) == 8


def test_running_sequences_share_blocks(attention: Simulation) -> None:
    attention.add(numbers(0, 9), num_new=5)
    attention.step()
    attention.add(numbers(0, 9), num_new=5)
    attention.step()
    assert attention.num_blocks - attention.cache.num_free_blocks == 2 + 1 + 1
    attention.run()


def test_two_sequences_compute_the_same_block_at_once(attention: Simulation) -> None:
    both = [attention.add(numbers(0, 9), num_new=5) for _ in range(2)]
    attention.step()
    assert not set(both[0].block_table) & set(both[1].block_table)
    attention.run()
    assert run_one(attention, numbers(0, 9)) == 8
    assert attention.cache.num_free_blocks == attention.num_blocks


def test_a_beginning_outlives_what_follows_it(attention: Simulation) -> None:
    run_one(attention, numbers(0, 32))  # 8 blocks
    run_one(attention, numbers(100, 148))  # 12 of 16 blocks: 4 of the first must go
    assert run_one(attention, numbers(0, 32)) == 16


def test_what_was_used_last_is_given_up_last(attention: Simulation) -> None:
    run_one(attention, numbers(0, 17))
    run_one(attention, numbers(100, 117))
    run_one(attention, numbers(0, 17))
    run_one(attention, numbers(200, 240))
    assert run_one(attention, numbers(0, 17)) == 16
    assert run_one(attention, numbers(100, 117)) < 16


def test_hybrid_starts_from_the_snapshot_at_a_junction(hybrid: Simulation) -> None:
    first = hybrid.add(numbers(0, 20), junctions=(10,))
    plan = hybrid.step()
    assert first.num_computed_tokens == 8  # the end of a block before the junction
    assert [source for source, _ in plan.saved] == [first.state_slot]
    hybrid.run()
    second = hybrid.add((*numbers(0, 10), 99, 100))
    plan = hybrid.step()
    assert second.num_cached_tokens == 8
    assert len(plan.restored) == 1


def test_hybrid_shares_nothing_without_a_snapshot(hybrid: Simulation) -> None:
    run_one(hybrid, numbers(0, 20))
    assert run_one(hybrid, numbers(0, 20)) == 0


def test_hybrid_takes_the_longest_of_several_snapshots(hybrid: Simulation) -> None:
    run_one(hybrid, numbers(0, 20), junctions=(4, 16))
    assert run_one(hybrid, (*numbers(0, 17), 99)) == 16
    assert run_one(hybrid, (*numbers(0, 15), 99)) == 4


def test_junction_within_the_first_block_takes_no_snapshot(hybrid: Simulation) -> None:
    hybrid.add(numbers(0, 9), junctions=(3,))
    assert [plan.saved for plan in hybrid.run()] == [()]


def test_snapshot_is_taken_once(hybrid: Simulation) -> None:
    run_one(hybrid, numbers(0, 9), junctions=(8,))
    hybrid.add((*numbers(0, 8), 99), junctions=(8,))
    hybrid.add((*numbers(0, 8), 98), junctions=(8,))
    assert [plan.saved for plan in hybrid.run()] == [()]


def test_snapshot_is_taken_where_the_budget_happens_to_end_a_run() -> None:
    limits = SchedulerLimits(1, max_num_batched_tokens=8, max_num_branch_tokens=16)
    hybrid = Simulation(limits, num_blocks=64, block_size=BLOCK_SIZE, num_slots=2)
    hybrid.add(numbers(0, 9), junctions=(8,))
    assert [len(plan.saved) for plan in hybrid.run()] == [1, 0]


def test_snapshot_is_taken_of_one_of_two_that_reach_a_junction_at_once(hybrid: Simulation) -> None:
    sequences = [Sequence(index, list(numbers(0, 9)), 9, 10, junctions=(8,)) for index in range(2)]
    assert all(hybrid.cache.admit(sequence, 0) for sequence in sequences)
    assert [hybrid.cache.stop_at_junction(sequence, 9) for sequence in sequences] == [8, 9]
    assert len(hybrid.cache.saved) == 1


def test_snapshot_longest_unused_is_given_up() -> None:
    hybrid = Simulation(
        SchedulerLimits(1, 64, 16), num_blocks=64, block_size=BLOCK_SIZE, num_slots=3
    )
    run_one(hybrid, numbers(0, 9), junctions=(8,))
    run_one(hybrid, numbers(100, 109), junctions=(8,))
    assert run_one(hybrid, numbers(0, 9)) == 8
    run_one(hybrid, numbers(200, 209), junctions=(8,))
    assert run_one(hybrid, numbers(0, 9)) == 8
    assert run_one(hybrid, numbers(100, 109)) == 0


def test_no_sequence_is_held_up_for_a_snapshot() -> None:
    hybrid = hybrid_of_two_slots()
    hybrid.add(numbers(100, 109), num_new=5)
    hybrid.add(numbers(0, 9), num_new=5, junctions=(8,))
    plan = hybrid.step()
    assert [item.num_tokens for item in plan.scheduled] == [9, 9]
    assert plan.saved == ()
    hybrid.run()


def test_snapshot_makes_room_for_a_sequence_but_not_while_it_is_copied() -> None:
    hybrid = hybrid_of_two_slots()
    run_one(hybrid, numbers(0, 9), junctions=(8,))
    from_snapshot = hybrid.add(numbers(0, 10), num_new=5)
    other = hybrid.add(numbers(100, 110), num_new=5)
    plan = hybrid.step()
    assert scheduled(plan) == [from_snapshot]
    plan = hybrid.step()
    assert scheduled(plan) == [from_snapshot, other]
    hybrid.run()


def test_sequence_takes_over_the_slot_of_its_snapshot_if_there_is_no_other() -> None:
    hybrid = hybrid_of_two_slots()
    run_one(hybrid, numbers(0, 9), junctions=(8,))
    sequences = [hybrid.add(numbers(0, 10), num_new=5) for _ in range(2)]
    plans = hybrid.step(), hybrid.step()
    assert [len(plan.restored) for plan in plans] == [1, 0]
    assert scheduled(plans[1]) == sequences
    assert [sequence.num_cached_tokens for sequence in sequences] == [8, 8]
    hybrid.run()
    assert run_one(hybrid, numbers(0, 9)) == 0


def hybrid_of_two_slots() -> Simulation:
    limits = SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=64, max_num_branch_tokens=16)
    return Simulation(limits, num_blocks=64, block_size=BLOCK_SIZE, num_slots=2)


def scheduled(plan: StepPlan) -> list[Sequence]:
    return [item.sequence for item in plan.scheduled]
