"""Prompts are dealt to ranks by tokens, and return to where their beginning was computed."""

import random

from granite_ray.parallel.balance import MAX_PREFIXES, RankBalance
from granite_ray.records import Prompt


def prompt(num_tokens: int, shared: tuple[int, ...] = ()) -> Prompt:
    return Prompt(shared + tuple(range(num_tokens)), (len(shared),) if shared else ())


def test_no_rank_gets_more_than_another_by_more_than_one_prompt() -> None:
    numbers, balance, loads = random.Random(0), RankBalance(3), [0, 0, 0]
    for _ in range(500):
        rank, cost = balance.choose(prompt(numbers.randint(1, 900)), numbers.randint(1, 100))
        loads[rank] += cost
        assert max(loads) - min(loads) <= 1000


def test_what_is_done_weighs_no_more() -> None:
    balance = RankBalance(2)
    share = balance.choose(prompt(1000), 50)
    assert share == (0, 1050)
    assert balance.choose(prompt(900), 0)[0] == 1
    balance.release(*share)
    assert balance.choose(prompt(10), 0)[0] == 0


def test_one_long_prompt_weighs_as_much_as_many_short_ones() -> None:
    balance = RankBalance(2)
    assert balance.choose(prompt(1000), 0) == (0, 1000)
    assert [balance.choose(prompt(100), 0)[0] for _ in range(9)] == [1] * 9


def test_questions_on_one_document_go_where_it_was_read() -> None:
    balance = RankBalance(2)
    documents = [tuple(range(start, start + 500)) for start in (1000, 2000)]
    first = [balance.choose(prompt(20, document), 10) for document in documents]
    assert first == [(0, 530), (1, 530)]
    again = [balance.choose(prompt(30, document), 10) for document in reversed(documents)]
    assert again == [(1, 40), (0, 40)]


def test_a_shared_instruction_does_not_keep_all_prompts_on_one_rank() -> None:
    balance, instruction = RankBalance(2), tuple(range(50))
    ranks = [balance.choose(prompt(200, instruction), 10)[0] for _ in range(10)]
    assert sorted(ranks) == [0] * 5 + [1] * 5


def test_of_very_many_beginnings_the_latest_are_remembered() -> None:
    balance = RankBalance(1)
    for start in range(MAX_PREFIXES + 1):
        balance.choose(prompt(1, (start, 7)), 0)
    assert balance.choose(prompt(1, (MAX_PREFIXES, 7)), 0) == (0, 1)
    assert balance.choose(prompt(1, (0, 7)), 0) == (0, 3)
