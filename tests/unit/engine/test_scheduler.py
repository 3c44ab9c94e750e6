"""Who runs when: everybody finishes, nobody's memory is touched, limits hold, turns are fair."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from granite_ray.engine.scheduler import MAX_OVERTAKES, SchedulerLimits
from granite_ray.engine.sequence import SequenceStatus, StepPlan
from tests.unit.engine.simulation import Simulation

MAX_TOKENS = 24
BEGINNINGS = ((0,) * 14, (0, 1) * 7, (1, 1, 0) * 4)
beginnings = st.builds(
    lambda tokens, stop: tokens[:stop], st.sampled_from(BEGINNINGS), st.integers(1, 14)
)
endings = st.lists(st.integers(0, 1), max_size=2).map(tuple)
junctions = st.lists(st.integers(1, 14), max_size=3, unique=True).map(sorted)
branches = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12).map(tuple), max_size=5)


class EngineMachine(RuleBasedStateMachine):
    """Arrivals, cancellations and steps in any order, on caches as small as they may be."""

    @initialize(
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 20),
        max_num_branch_tokens=st.integers(1, 20),
        block_size=st.sampled_from([1, 2, 4]),
        num_spare_blocks=st.integers(0, 12),
        num_slots=st.integers(0, 8),
    )
    def start(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_branch_tokens: int,
        block_size: int,
        num_spare_blocks: int,
        num_slots: int,
    ) -> None:
        self.simulation = Simulation(
            SchedulerLimits(max_num_seqs, max_num_batched_tokens, max_num_branch_tokens),
            num_blocks=MAX_TOKENS // block_size + num_spare_blocks,
            block_size=block_size,
            num_slots=num_slots,
        )

    @rule(
        beginning=beginnings,
        ending=endings,
        num_new=st.integers(1, 8),
        junctions=junctions,
        is_interactive=st.booleans(),
        jumps=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    )
    def generate(
        self,
        beginning: tuple[int, ...],
        ending: tuple[int, ...],
        num_new: int,
        junctions: list[int],
        is_interactive: bool,
        jumps: tuple[int, ...],
    ) -> None:
        self.simulation.add(
            beginning + ending,
            num_new=num_new,
            junctions=tuple(place for place in junctions if place <= len(beginning)),
            is_interactive=is_interactive,
            jumps=jumps,
        )

    @rule(
        beginning=beginnings,
        ending=endings,
        branches=branches.map(tuple),
        is_interactive=st.booleans(),
    )
    def score(
        self,
        beginning: tuple[int, ...],
        ending: tuple[int, ...],
        branches: tuple[tuple[int, ...], ...],
        is_interactive: bool,
    ) -> None:
        self.simulation.add(
            beginning + ending,
            branches=branches,
            junctions=(len(beginning),),
            is_interactive=is_interactive,
        )

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.simulation.live)))
        self.simulation.finish(self.simulation.live[seq_id])

    @rule(num_steps=st.integers(1, 5), prefers_interactive=st.booleans())
    def step(self, num_steps: int, prefers_interactive: bool) -> None:
        for _ in range(num_steps):
            self.simulation.step(prefers_interactive=prefers_interactive)

    @precondition(lambda self: self.simulation.live)
    @rule()
    def fail_step(self) -> None:
        self.simulation.fail_step()

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check_ownership()

    def teardown(self) -> None:
        if not hasattr(self, "simulation") or self.simulation.is_broken:
            return
        self.simulation.run()
        assert self.simulation.cache.num_free_blocks == self.simulation.num_blocks
        assert self.simulation.cache.num_free_slots == self.simulation.num_slots


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(  # on top of those that suit a machine: no health checks
    EngineMachine.TestCase.settings, max_examples=60, stateful_step_count=30
)


def limits(num_seqs: int = 8, num_tokens: int = 64, num_branch_tokens: int = 16) -> SchedulerLimits:
    return SchedulerLimits(num_seqs, num_tokens, num_branch_tokens)


def counts(plan: StepPlan) -> list[tuple[int, int]]:
    return [(item.sequence.seq_id, item.num_tokens) for item in plan.scheduled]


def numbers(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


def test_decodes_come_first_and_runs_take_what_is_left() -> None:
    simulation = Simulation(limits(num_tokens=10), num_blocks=64, block_size=4)
    simulation.add(numbers(0, 5), num_new=9)
    simulation.add(numbers(10, 28), num_new=9)
    simulation.add(numbers(30, 33), num_new=9)
    assert counts(simulation.step()) == [(0, 5), (1, 5)]
    assert counts(simulation.step()) == [(0, 1), (1, 9)]
    plan = simulation.step()
    assert counts(plan) == [(0, 1), (1, 4), (2, 3)]
    assert plan.num_decodes == 1
    plan = simulation.step()
    assert counts(plan) == [(0, 1), (1, 1), (2, 1)]
    assert plan.num_decodes == 3


def test_decodes_come_first_even_if_a_run_takes_precedence() -> None:
    simulation = Simulation(limits(num_tokens=10), num_blocks=64, block_size=4)
    simulation.add(numbers(0, 5), num_new=9)
    simulation.step()
    simulation.add(numbers(10, 40), is_interactive=True)
    assert counts(simulation.step()) == [(0, 1), (1, 9)]
    assert counts(simulation.step()) == [(0, 1), (1, 9)]


def test_tokens_appended_together_are_one_run() -> None:
    simulation = Simulation(limits(), num_blocks=64, block_size=4)
    simulation.add(numbers(0, 5), num_new=12, jumps=(6,))
    simulation.step()
    plan = simulation.step()
    assert counts(plan) == [(0, 6)]
    assert plan.num_decodes == 0
    simulation.run()


@pytest.mark.parametrize("num_slots", [0, 33])
def test_common_prefix_of_requests_that_arrive_at_once_is_computed_once(num_slots: int) -> None:
    simulation = Simulation(limits(num_seqs=32, num_tokens=2048), 1024, 16, num_slots)
    prefix = numbers(0, 256)
    for index in range(32):
        simulation.add((*prefix, 1000 + index), junctions=(256,))
    simulation.run()
    assert simulation.num_computed == 256 + 32


def test_prefix_is_waited_for_also_while_it_takes_several_steps() -> None:
    simulation = Simulation(limits(), num_blocks=64, block_size=4, num_slots=12)
    for token in (97, 98):
        simulation.add((*numbers(0, 16), token), junctions=(8, 16))
    plans = [counts(plan) for plan in simulation.run()]
    assert plans == [[(0, 8)], [(0, 8)], [(0, 1), (1, 1)]]


def test_others_pass_those_that_wait_for_a_prefix() -> None:
    simulation = Simulation(limits(), num_blocks=64, block_size=4)
    for token in (97, 98):
        simulation.add((*numbers(0, 8), token), junctions=(8,))
    simulation.add(numbers(50, 59))
    assert counts(simulation.step()) == [(0, 9), (2, 9)]
    assert counts(simulation.step()) == [(1, 1)]


def test_nobody_waits_for_a_prefix_whose_computation_was_cancelled() -> None:
    simulation = Simulation(limits(num_tokens=4), num_blocks=64, block_size=4)
    first, _ = [simulation.add((*numbers(0, 8), 9), junctions=(8,)) for _ in range(2)]
    assert counts(simulation.step()) == [(0, 4)]
    simulation.finish(first)
    assert counts(simulation.step()) == [(1, 4)]
    simulation.run()


def test_interactive_sequences_go_first_and_others_in_order_of_arrival() -> None:
    simulation = Simulation(limits(num_seqs=1), num_blocks=64, block_size=4)
    for is_interactive in (False, False, True, True, False):
        simulation.add((1, 2, 3), is_interactive=is_interactive)
    simulation.run()
    assert simulation.finished == [2, 3, 0, 1, 4]


def test_others_rest_where_interactive_sequences_are_preferred_and_can_do_something() -> None:
    simulation = Simulation(limits(num_tokens=20), num_blocks=64, block_size=4)
    simulation.add(numbers(0, 4), num_new=9)
    assert counts(simulation.step(prefers_interactive=True)) == [(0, 4)], "nobody else is there"
    simulation.add(numbers(10, 13), num_new=3, is_interactive=True)
    simulation.add(numbers(20, 23), num_new=3)
    assert counts(simulation.step(prefers_interactive=True)) == [(1, 3)]
    assert counts(simulation.step(prefers_interactive=True)) == [(1, 1)]
    assert counts(simulation.step()) == [(1, 1), (0, 1), (2, 3)]
    assert simulation.finished == [1]
    assert counts(simulation.step(prefers_interactive=True)) == [(0, 1), (2, 1)]


def test_others_that_rest_are_not_promoted_for_it() -> None:
    simulation = Simulation(limits(), num_blocks=64, block_size=4)
    batch = simulation.add(numbers(0, 4), num_new=99)
    simulation.step()
    for _ in range(3 * MAX_OVERTAKES):
        simulation.add((5, 6, 7), is_interactive=True)
        simulation.step(prefers_interactive=True)
    simulation.step()
    assert not batch.is_interactive


def test_latest_of_the_lowest_precedence_is_preempted() -> None:
    simulation = Simulation(limits(), num_blocks=14, block_size=2)
    batch = [simulation.add((index, 7), num_new=12) for index in range(2)]
    interactive = simulation.add((5, 7), num_new=12, is_interactive=True)
    simulation.run()
    assert [sequence.num_preemptions for sequence in (*batch, interactive)] == [0, 1, 0]
    assert simulation.finished == [2, 0, 1]


def test_preempted_sequence_finds_its_own_blocks_again() -> None:
    simulation = Simulation(limits(), num_blocks=10, block_size=2)
    simulation.add(numbers(0, 4), num_new=8)
    victim = simulation.add(numbers(10, 18), num_new=8)
    simulation.run()
    assert victim.num_preemptions == 1
    assert victim.num_cached_tokens == 0  # of the first admission
    num_computed_again = simulation.num_computed - (15 + 11)
    assert 0 < num_computed_again < victim.num_prompt_tokens


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    simulation = Simulation(limits(), num_blocks=6, block_size=4)
    simulation.add(numbers(0, 4), num_new=8)
    simulation.step()
    newcomer = simulation.add(numbers(10, 25))  # needs all 4 blocks that are left
    assert counts(simulation.step()) == [(0, 1)]
    simulation.run()
    assert newcomer.num_preemptions == 0


def test_sequence_that_lacks_a_block_keeps_what_it_holds_while_others_go_on() -> None:
    simulation = Simulation(limits(), num_blocks=6, block_size=2)
    simulation.add(numbers(0, 3), num_new=3)
    last = simulation.add(numbers(10, 15), num_new=5)
    plans = [counts(plan) for plan in simulation.run()]
    assert plans[:4] == [[(0, 3), (1, 5)], [(0, 1), (1, 1)], [(0, 1)], [(1, 1)]]
    assert last.num_preemptions == 0


def test_nobody_is_admitted_while_a_running_sequence_lacks_blocks() -> None:
    simulation = Simulation(limits(), num_blocks=10, block_size=2)
    simulation.add(numbers(0, 2), num_new=3)
    simulation.add(numbers(10, 18), num_new=10, jumps=(9,))
    simulation.step()
    simulation.add((30,))
    assert counts(simulation.step()) == [(0, 1)]
    simulation.run()


def test_batch_work_advances_under_a_steady_stream_of_interactive_work() -> None:
    simulation = Simulation(limits(num_seqs=2), num_blocks=32, block_size=4)
    batch = [simulation.add((1, 2, index), num_new=5) for index in range(6)]
    for _ in range(400):
        while simulation.scheduler.num_waiting < 8:
            simulation.add((3, 4, 5), num_new=5, is_interactive=True)
        simulation.step()
    assert all(sequence.status is SequenceStatus.FINISHED for sequence in batch)
    places = [simulation.finished.index(sequence.seq_id) for sequence in batch]
    assert places == sorted(places)
    assert places[-1] < len(batch) * MAX_OVERTAKES + simulation.limits.max_num_seqs
    assert places[-1] >= (len(batch) - 1) * MAX_OVERTAKES


def test_turn_of_batch_work_goes_to_whoever_got_nothing() -> None:
    simulation = Simulation(limits(num_seqs=2), num_blocks=64, block_size=4)
    simulation.add((1, 2, 3), num_new=100)
    simulation.step()
    simulation.add((1, 2, 3))
    for _ in range(MAX_OVERTAKES + 2):
        simulation.add((3, 4, 5), is_interactive=True)
        simulation.step()
    assert simulation.finished.index(1) == MAX_OVERTAKES


def test_turn_of_batch_work_comes_at_once_also_where_it_runs() -> None:
    simulation = Simulation(limits(num_branch_tokens=4), num_blocks=64, block_size=4)
    labels = ((1, 2), (3, 4)) * 8
    simulation.add((1, 2, 3), branches=labels)
    simulation.step()
    for _ in range(MAX_OVERTAKES - 1):
        simulation.add((3, 4, 5), branches=labels, is_interactive=True)
    simulation.step()
    simulation.add((3, 4, 5), branches=labels, is_interactive=True)
    assert 0 not in dict(counts(simulation.step()))
    assert counts(simulation.step()) == [(0, 4)]


def test_batch_scoring_advances_although_interactive_branches_take_all_rows() -> None:
    simulation = Simulation(limits(num_seqs=4, num_branch_tokens=4), num_blocks=64, block_size=4)
    labels = ((1, 2), (3, 4)) * 8
    batch = simulation.add((1, 2, 3), branches=labels)
    for _ in range(200):
        while simulation.scheduler.num_waiting < 4:
            simulation.add((3, 4, 5), branches=labels, is_interactive=True)
        simulation.step()
    assert batch.status is SequenceStatus.FINISHED


def test_branches_go_in_groups_after_the_prompt() -> None:
    simulation = Simulation(limits(num_tokens=10, num_branch_tokens=6), 64, 4)
    branches = ((1,), (2, 2), (3, 3, 3), (4, 4), (5, 5, 5, 5), (6,))
    simulation.add(numbers(0, 12), branches=branches)
    plans = simulation.run()
    assert [counts(plan) for plan in plans] == [[(0, 10)], [(0, 2)], [(0, 6)], [(0, 6)], [(0, 1)]]
    assert sum((plan.scheduled[0].branches for plan in plans), ()) == branches


def test_scoring_without_branches_ends_with_the_prompt() -> None:
    simulation = Simulation(limits(), num_blocks=64, block_size=4)
    simulation.add(numbers(0, 12), branches=())
    assert [counts(plan) for plan in simulation.run()] == [[(0, 12)]]


def test_branch_longer_than_a_limit_goes_without_another_branch() -> None:
    simulation = Simulation(limits(num_tokens=10, num_branch_tokens=4), 64, 4)
    simulation.add(numbers(0, 3), branches=((1,) * 12, (2,) * 5, (3,)))
    simulation.add(numbers(10, 13), num_new=5)
    plans = [counts(simulation.step()) for _ in range(4)]
    assert plans == [[(0, 3), (1, 3)], [(0, 12)], [(1, 1), (0, 5)], [(1, 1), (0, 1)]]
    simulation.run()


def test_preempted_scoring_goes_on_with_the_branches_left() -> None:
    simulation = Simulation(limits(num_branch_tokens=2), num_blocks=8, block_size=2)
    scoring = simulation.add(numbers(0, 7), branches=((1, 2), (3, 4), (5, 6), (7, 8)))
    simulation.add(numbers(10, 12), num_new=14, is_interactive=True, jumps=(4,))
    plans = simulation.run()
    assert scoring.num_preemptions == 1
    done = [item.branches for plan in plans for item in plan.scheduled if item.branches]
    assert sum(done, ()) == scoring.branches


@pytest.mark.parametrize(("prompt", "num_new"), [((), 1), ((1, 2, 3), 6)])
def test_sequence_that_could_never_finish_is_refused(prompt: tuple[int, ...], num_new: int) -> None:
    simulation = Simulation(limits(), num_blocks=2, block_size=4)
    with pytest.raises(AssertionError):
        simulation.add(prompt, num_new=num_new)


def test_failed_step_is_done_again_in_halves() -> None:
    simulation = Simulation(limits(num_tokens=12), num_blocks=64, block_size=4)
    simulation.add(numbers(0, 9), num_new=2)
    simulation.add(numbers(10, 19), num_new=2)
    assert counts(simulation.fail_step()) == [(0, 9), (1, 3)]
    assert simulation.scheduler.num_running == 0
    plans = [counts(plan) for plan in simulation.run()]
    assert plans[:2] == [[(0, 6)], [(0, 3), (1, 3)]]


def test_what_a_failed_step_was_to_compute_is_not_found() -> None:
    simulation = Simulation(limits(), num_blocks=64, block_size=4, num_slots=10)
    sequence = simulation.add(numbers(0, 20), junctions=(8, 16))
    simulation.step()
    assert len(simulation.fail_step().saved) == 1
    assert counts(simulation.step()) == [(0, 8)]
    assert sequence.num_computed_tokens == 16
    simulation.run()
